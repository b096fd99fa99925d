"""The world itself: splits that cannot meet, samples that depend on their coordinates only, pictures that are what they were."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from stages.data.sample import encode_field
from stages.data.scenes import LEVELS, Scene, SceneObject, render, scene_sample, split_of
from stages.data.scenes.render import Nuisance, draw_nuisance
from stages.data.scenes.world import COLOURS, SPLITS, draw_scene, generator_for

EVERY_LEVEL = range(len(LEVELS))


def scenes(level: int, split: str, count: int) -> list[Scene]:
    return [draw_scene(LEVELS[level], split, generator_for("test", level, split, i)) for i in range(count)]


def test_level_0_has_25_states_a_cell_and_level_1_has_61() -> None:
    for number, states in ((0, 25), (1, 61)):
        values = LEVELS[number].values
        assert 1 + np.prod([len(values[attribute]) for attribute in ("size", "texture", "colour", "shape")]) == states
        assert (LEVELS[number].pixels, LEVELS[number].grid) == (32, 2)


@pytest.mark.parametrize("level", EVERY_LEVEL)
def test_each_scene_belongs_to_the_split_it_was_drawn_for(level: int) -> None:
    for split in SPLITS:
        drawn = scenes(level, split, 60)
        assert {split_of(scene) for scene in drawn} == {split}
        shows = [any((o.shape, o.colour) in LEVELS[level].held_out for o in scene.objects) for scene in drawn]
        assert all(shows) if split == "heldout" else not any(shows)


@pytest.mark.parametrize("level", EVERY_LEVEL)
def test_no_training_sample_shows_or_names_what_is_held_out(level: int) -> None:
    """Neither scene, nor result of the edit, nor any question, caption or instruction."""
    secret = [f"{colour} {shape}" for shape, colour in LEVELS[level].held_out]
    for split, may_show in (("train", {"train"}), ("val", {"train", "val"})):
        for index in range(60 if level < 4 else 20):
            fields = scene_sample(level, 3, split, index).fields
            assert split_of(Scene.from_json(fields["scene"])) == split
            assert split_of(Scene.from_json(fields["result.scene"])) in may_show
            words = " ".join([*fields["captions"], *(entry["question"] for entry in fields["qa"]), fields["instruction"]])
            assert not any(pair in words for pair in secret)


def test_val_is_a_tenth_of_the_scenes_without_held_out_combinations() -> None:
    level, rng = LEVELS[1], np.random.default_rng(0)
    names = ("size", "texture", "colour", "shape")
    counts: Counter[str] = Counter()
    for _ in range(3000):
        objects = [
            SceneObject(*(str(rng.choice(level.values[name])) for name in names), place) for place in level.places[: rng.integers(1, 5)]
        ]
        counts[split_of(Scene(1, tuple(objects)))] += 1
    assert counts["val"] / (counts["val"] + counts["train"]) == pytest.approx(26 / 256, abs=0.02)


@pytest.mark.parametrize("split", SPLITS)
def test_the_number_of_objects_is_uniform_in_every_split(split: str) -> None:
    counts = Counter(len(scene.objects) for scene in scenes(1, split, 800))
    assert sorted(counts) == [1, 2, 3, 4]
    assert all(abs(number / 800 - 0.25) < 0.06 for number in counts.values())


def test_a_sample_depends_on_level_seed_split_and_index_alone() -> None:
    def digest(*address: object) -> str:
        sample = scene_sample(*address)  # type: ignore[arg-type]
        return hashlib.sha256(b"".join(encode_field(*item)[1] for item in sorted(sample.fields.items()))).hexdigest()

    addresses = [(1, 0, "train", 7), (1, 0, "train", 8), (1, 1, "train", 7), (1, 0, "val", 7), (2, 0, "train", 7)]
    once = [digest(*address) for address in addresses]
    assert once == [digest(*address) for address in reversed(addresses)][::-1]
    assert len(set(once)) == len(addresses)


def test_the_bytes_of_a_picture_do_not_change() -> None:
    """A hash written down: another one means that every data set generated so far was another one, too."""
    scene = Scene(
        1, (SceneObject("small", "plain", "red", "circle", "top left"), SceneObject("large", "plain", "blue", "cross", "bottom right"))
    )
    picture = render(scene, Nuisance(0.9, {"top left": (1, -1)}))
    assert hashlib.sha256(picture.tobytes()).hexdigest()[:16] == "42917bb8b6836d81"
    sample = scene_sample(1, 0, "train", 0)
    assert hashlib.sha256(sample.fields["image"].tobytes()).hexdigest()[:16] == "41e65ca39a2482b0"
    assert (
        sample.fields["caption"]
        == "a small magenta triangle top left, a large magenta triangle top right, a large magenta triangle bottom left, a small magenta triangle bottom right"
    )


def test_a_picture_is_the_background_with_the_colour_in_the_middle_of_the_object() -> None:
    picture = render(Scene(0, (SceneObject("large", "plain", "green", "square", "bottom left"),)), Nuisance(0.5))
    assert picture.shape == (32, 32, 3)
    assert picture[24, 8].tolist() == list(COLOURS["green"])
    assert (picture[:16] == 128).all()
    assert (picture[:, 16:] == 128).all()


def test_nearer_objects_cover_farther_ones_but_leave_most_of_them_visible() -> None:
    level = LEVELS[4]
    crowd = Scene(4, tuple(SceneObject("large", "plain", "red", "square", place) for place in level.places))
    for i in range(5):
        offsets = draw_nuisance([crowd], generator_for("crowd", i)).offsets
        for place in level.places[:-1]:
            pair = {name: SceneObject("large", "plain", "blue" if name == place else "red", "square", name) for name in level.places}
            blue = (render(Scene(4, tuple(pair.values())), Nuisance(1.0, offsets)) == COLOURS["blue"]).all(axis=2).sum()
            alone = (render(Scene(4, (pair[place],)), Nuisance(1.0, offsets)) == COLOURS["blue"]).all(axis=2).sum()
            assert level.min_visible - 0.05 <= blue / alone <= 1


def test_a_scene_survives_its_graph() -> None:
    for level in EVERY_LEVEL:
        for scene in scenes(level, "heldout", 5):
            assert Scene.from_json(scene.to_json({})) == scene
    graph = Scene(2, (SceneObject("small", "plain", "red", "cross", "centre right"),)).to_json({"centre right": (1, -1)})
    assert graph["count"] == 1
    assert (graph["objects"][0]["row"], graph["objects"][0]["column"], graph["objects"][0]["y"], graph["objects"][0]["x"]) == (1, 2, 25, 39)


def test_two_objects_at_one_place_are_refused() -> None:
    entry = SceneObject("large", "plain", "red", "circle", "top left")
    with pytest.raises(ValueError, match="two objects at one place"):
        Scene(0, (entry, entry))


def test_without_edits_a_sample_is_the_same_but_for_them() -> None:
    whole, less = scene_sample(1, 0, "train", 3).fields, scene_sample(1, 0, "train", 3, edits=False).fields
    assert whole.keys() - less.keys() == {"source", "instruction", "result", "result.scene"}
    assert all(np.array_equal(less[name], whole[name]) if name == "image" else less[name] == whole[name] for name in less)
