"""Scene accuracy and caption correctness: the oracle scores 1, known mistakes cost what they should, shuffling falls to chance."""

import numpy as np
import pytest

from stages.data.scenes import LEVELS, Scene, SceneObject, render, scene_sample
from stages.data.scenes.render import draw_nuisance
from stages.errors import DataError
from stages.metrics import METRICS
from stages.metrics.caption_correctness import CaptionCorrectness
from stages.metrics.edit_accuracy import EditAccuracy
from stages.metrics.scene_accuracy import SceneAccuracy
from stages.metrics.score import Score, Setting

SAMPLES = [{"__key__": sample.key, **sample.fields} for sample in (scene_sample(1, 3, "train", index) for index in range(40))]


def score(metric: SceneAccuracy | CaptionCorrectness, samples: list[dict], truths: list[dict] | None = None) -> dict[str, Score]:
    seen, expected = [metric.look(sample) for sample in samples], [metric.expect(sample) for sample in truths or samples]
    return {score.category: score for score in metric.scores(seen, expected)}


def picture(*objects: tuple[str, str, str, str]) -> np.ndarray:
    scene = Scene(1, tuple(SceneObject(size, "plain", colour, shape, place) for size, colour, shape, place in objects))
    return render(scene, draw_nuisance([scene], np.random.default_rng(0)))


def drawn(meant: list[tuple[str, str, str, str]], made: list[tuple[str, str, str, str]]) -> dict:
    scene = Scene(1, tuple(SceneObject(size, "plain", colour, shape, place) for size, colour, shape, place in meant))
    return {"__key__": "k", "scene": scene.to_json({}), "sample.image": picture(*made), "meta": {"tasks": ["draw"]}}


def test_the_true_pictures_score_one_everywhere():
    scores = score(SceneAccuracy(Setting()), [sample | {"sample.image": sample["image"]} for sample in SAMPLES])
    assert {category: entry.value for category, entry in scores.items()} == dict.fromkeys(scores, 1.0)
    assert {"objects", "scenes", "one-object", "two-objects", "counting", "colours", "position", "colour-attribution"} <= scores.keys()
    assert scores["objects"].n == sum(sample["scene"]["count"] for sample in SAMPLES)


def test_the_true_captions_and_their_paraphrases_score_one():
    for variant in range(2):
        scores = score(CaptionCorrectness(Setting()), [sample | {"sample.caption": sample["captions"][variant]} for sample in SAMPLES])
        assert {entry.value for entry in scores.values()} == {1.0}


def test_pictures_of_other_prompts_score_near_nothing():
    samples = [sample | {"sample.image": sample["image"]} for sample in SAMPLES]
    scores = score(SceneAccuracy(Setting()), samples, samples[1:] + samples[:1])
    assert scores["scenes"].value == 0
    assert scores["objects"].value < 0.1
    assert scores["readable"].value == 1


def test_a_wrong_colour_costs_its_object_and_an_extra_object_costs_precision():
    meant = [("large", "red", "circle", "top left"), ("small", "blue", "ring", "bottom left")]
    made = [("large", "green", "circle", "top left"), ("small", "blue", "ring", "bottom left"), ("small", "red", "cross", "top right")]
    scores = score(SceneAccuracy(Setting()), [drawn(meant, made)])
    values = {category: entry.value for category, entry in scores.items()}
    assert values["objects"] == 1 / 2
    assert values["objects-precision"] == 1 / 3
    assert values["scenes"] == 0
    assert (values["object-colour"], values["object-shape"], values["object-place"]) == (0.5, 1, 1)
    assert (values["two-objects"], values["position"], values["colour-attribution"]) == (1, 1, 0)


def test_a_picture_mixed_from_two_is_not_believed_and_scores_nothing():
    one, two = picture(("large", "red", "circle", "top left")), picture(("large", "blue", "square", "top left"))
    sample = drawn([("large", "red", "circle", "top left")], []) | {"sample.image": ((one.astype(int) + two) // 2).astype(np.uint8)}
    values = {category: entry.value for category, entry in score(SceneAccuracy(Setting()), [sample]).items()}
    assert (values["readable"], values["objects"], values["one-object"]) == (0, 0, 0)


def test_a_true_but_partial_caption_is_true_and_names_no_object():
    sample = drawn([("large", "red", "circle", "top left")], [])
    values = {
        category: entry.value
        for category, entry in score(
            CaptionCorrectness(Setting()),
            [sample | {"sample.caption": "there is a circle"}, sample | {"sample.caption": "circle red the"}],
        ).items()
    }
    assert (values["parsed"], values["true"], values["objects"], values["scenes"]) == (0.5, 0.5, 0, 0)


def test_a_picture_of_the_wrong_size_names_its_sample():
    sample = drawn([("large", "red", "circle", "top left")], []) | {"sample.image": np.zeros((8, 9, 3), np.uint8)}
    with pytest.raises(DataError, match=r"k: sample.image: level 1 pictures are uint8 \(32, 32, 3\)"):
        SceneAccuracy(Setting()).look(sample)


def test_attributes_with_a_single_value_are_not_scored():
    sample = scene_sample(0, 0, "train", 0)
    fields = {"__key__": sample.key, **sample.fields, "sample.image": sample.fields["image"]}
    assert "size" not in LEVELS[0].named
    assert "object-size" not in score(SceneAccuracy(Setting()), [fields])


@pytest.mark.parametrize("name", METRICS)
def test_no_metric_applies_to_a_sample_without_outputs(name):
    assert not METRICS[name].applies(SAMPLES[0], Setting())


EDITED = [sample | {"sample.result": sample["result"], "meta": {"tasks": ["edit"]}} for sample in SAMPLES]


def edits(samples: list[dict]) -> dict[str, float]:
    metric = EditAccuracy(Setting())
    scores = metric.scores([metric.look(sample) for sample in samples], [metric.expect(sample) for sample in samples])
    return {entry.category: entry.value for entry in scores}


def test_the_true_results_of_edits_score_one_everywhere():
    values = edits(EDITED)
    assert {"changed", "kept", "objects", "scenes", "readable"} <= values.keys()
    assert set(values.values()) == {1.0}


def test_an_untouched_picture_keeps_everything_and_does_nothing_that_was_asked():
    values = edits([sample | {"sample.result": sample["source"]} for sample in EDITED])
    assert (values["kept"], values["changed"], values["scenes"], values["readable"]) == (1, 0, 0, 1)


def test_an_edit_that_spoils_a_bystander_is_done_but_not_kept():
    before = [("large", "red", "circle", "top left"), ("small", "blue", "ring", "bottom left")]
    after = [("large", "green", "circle", "top left"), before[1]]
    made = [after[0], ("small", "blue", "square", "bottom left")]
    scenes = [Scene(1, tuple(SceneObject(size, "plain", *rest) for size, *rest in objects)).to_json({}) for objects in (before, after)]
    values = edits([{"__key__": "k", "scene": scenes[0], "result.scene": scenes[1], "sample.result": picture(*made)}])
    assert (values["changed"], values["kept"], values["objects"], values["scenes"]) == (1, 0, 0.5, 0)


def test_a_spoilt_edit_is_not_believed():
    mixed = ((picture(("large", "red", "circle", "top left")).astype(int) + picture(("large", "blue", "square", "top left"))) // 2).astype(
        np.uint8
    )
    values = edits([sample | {"sample.result": mixed} for sample in EDITED])  # some ask to remove something
    assert (values["readable"], values["changed"], values["objects"], values["kept"]) == (0, 0, 0, 0)
