"""eval: what is scored follows from the fields, and every number has its controls, its interval and its protocol."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.data.sample import Sample
from stages.data.scenes import scene_sample
from stages.data.shards import ShardWriter, open_shards
from stages.errors import DataError, UsageError
from stages.evaluate import derangement, evaluate, fresh_autoencoder, round_trip
from stages.options import RunOptions
from stages.parts.autoencoders import Autoencoder
from stages.parts.views.square import to_pixels
from stages.recipe import load_recipe
from stages.run import Run
from stages.training.checkpoint import save_checkpoint

OPTIONS = RunOptions(quiet=True)
TOKENIZER = """
[paper]
arxiv = "2012.09841"
[autoencoders.vq]
kind = "cnn"
downsample = 8
channels = 8
multipliers = [1, 1, 2, 2]
blocks_per_level = 1
attention = false
latent_channels = 6
quantizer = { kind = "vq", codebook_size = 24, codebook_dim = 6 }
[sizes.tiny]
[sizes.small]
[sizes.paper]
"""


def oracle(sample: Sample) -> dict[str, Any]:
    """What a model without faults would have made of a prompt."""
    answers = [{**entry, "truth": entry["answer"]} for entry in sample.fields["qa"]]
    return {"sample.image": sample.fields["image"], "sample.caption": sample.fields["caption"], "sample.qa": answers}


def write(folder: Path, samples: list[Sample], made: Callable[[Sample], dict[str, Any]] = oracle, recipe: str = "") -> Path:
    run = Run(folder, stage="sample", options=OPTIONS, kind="shards", resolved_recipe=recipe)
    with run, ShardWriter(folder, name="samples") as writer:
        for sample in samples:
            writer.write(Sample(sample.key, {**sample.fields, **made(sample)}, sample.source))
    return folder


def scenes(count: int, split: str = "val") -> list[Sample]:
    return [scene_sample(1, 0, split, index) for index in range(count)]


def results(out: Path) -> dict[tuple[str, str, str | None], dict[str, Any]]:
    rows = json.loads((out / "results.json").read_text())["results"]
    keyed = {(row["metric"], row["category"], row["control"]): row for row in rows}
    assert len(keyed) == len(rows)
    return keyed


def test_a_faultless_model_scores_one_and_its_shuffled_control_near_chance(tmp_path):
    write(tmp_path / "samples", scenes(60))
    out = evaluate(str(tmp_path / "samples"), None, tmp_path / "scores", OPTIONS)
    rows = results(out)
    own = {key[:2]: row for key, row in rows.items() if key[2] is None}
    assert {row["value"] for row in own.values()} == {1.0}
    assert {metric for metric, _ in own} == {"scene-accuracy", "question-accuracy", "caption-correctness"}
    assert rows["scene-accuracy", "scenes", "shuffled"]["value"] == 0
    assert rows["scene-accuracy", "objects", "shuffled"]["value"] < 0.15
    questions = rows["question-accuracy", "all", "shuffled"]
    assert abs(questions["value"] - questions["chance"]) < 0.15
    assert {row["split"] for row in rows.values()} == {"val"}
    low, high = own["scene-accuracy", "scenes"]["interval"]
    assert low < 0.95 < high


def test_the_untrained_control_is_found_beside_the_samples_and_null_without_them(tmp_path):
    grey = np.full((32, 32, 3), 127, np.uint8)
    samples = write(tmp_path / "samples", scenes(5))
    rows = results(evaluate(str(samples), None, tmp_path / "without", OPTIONS))
    assert rows["scene-accuracy", "objects", "untrained"]["value"] is None
    write(tmp_path / "controls" / "untrained", scenes(5), lambda sample: {**oracle(sample), "sample.image": grey})
    rows = results(evaluate(str(samples), None, tmp_path / "with", OPTIONS))
    assert rows["scene-accuracy", "objects", "untrained"]["value"] == 0
    assert rows["caption-correctness", "objects", "untrained"]["value"] == 1


def test_a_control_made_for_other_prompts_is_not_used(tmp_path):
    samples = write(tmp_path / "samples", scenes(5))
    write(tmp_path / "controls" / "untrained", scenes(4))
    rows = results(evaluate(str(samples), None, tmp_path / "scores", OPTIONS))
    assert rows["scene-accuracy", "objects", "untrained"]["value"] is None


def test_the_protocol_says_how_the_samples_were_made_and_of_which_prompts(tmp_path):
    recipe = 'name = "x"\n[sample.draw]\nguidance_scale = 3.0\nnum_steps = 12\n'
    one = evaluate(str(write(tmp_path / "a", scenes(6), recipe=recipe)), None, tmp_path / "one", OPTIONS)
    two = evaluate(str(write(tmp_path / "b", scenes(5))), None, tmp_path / "two", OPTIONS)
    three = evaluate(str(write(tmp_path / "c", scenes(6)[::-1])), None, tmp_path / "three", OPTIONS)
    first, second, third = (results(out)["scene-accuracy", "objects", None]["protocol"] for out in (one, two, three))
    assert first["sampling"] == {"draw": {"guidance_scale": 3.0, "num_steps": 12}, "seed": 0}
    assert first["prompts"] == third["prompts"] != second["prompts"]
    assert "sampling" not in second


def test_foreign_samples_are_renamed_and_their_truth_is_found_by_key(tmp_path):
    truth = [Sample(sample.key, {name: sample.fields[name] for name in ("image", "scene", "caption")}) for sample in scenes(6)]
    with ShardWriter(tmp_path / "truth") as writer:
        for sample in truth:
            writer.write(sample)
    with ShardWriter(tmp_path / "foreign") as writer:
        for index, sample in enumerate(reversed(truth)):
            picture = sample.fields["image"] if index < 3 else np.full((32, 32, 3), 240, np.uint8)
            writer.write(Sample(sample.key, {"image": picture}))
    map_ = {"sample.image": "image"}
    out = evaluate(str(tmp_path / "foreign"), str(tmp_path / "truth"), tmp_path / "scores", OPTIONS, field_map=map_)
    assert results(out)["scene-accuracy", "scenes", None]["value"] == 0.5
    assert not any(metric in ("psnr", "retrieval") for metric, _, _ in results(out))
    with pytest.raises(UsageError, match="no field 'picture'"):
        evaluate(str(tmp_path / "foreign"), None, tmp_path / "wrong", OPTIONS, field_map={"sample.image": "picture"})


def test_samples_without_outputs_are_an_error_that_lists_their_fields(tmp_path):
    write(tmp_path / "data", scenes(3), lambda sample: {})
    with pytest.raises(UsageError, match=r"no metric applies.*caption, captions, image"):
        evaluate(str(tmp_path / "data"), None, tmp_path / "scores", OPTIONS)


def test_a_reference_adds_a_distance_that_shuffling_cannot_change(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.metrics.features.EfficientNetLite0Features.weights_file", staticmethod(lambda: None))
    samples = write(tmp_path / "samples", scenes(12))
    real = write(tmp_path / "real", scenes(12), lambda sample: {})
    rows = results(evaluate(str(samples), None, tmp_path / "scores", OPTIONS, reference=str(real)))
    row = rows["frechet-distance", "pixels-8x8", None]
    assert row["value"] == pytest.approx(0, abs=1e-6)
    assert row["protocol"]["reference"] == open_shards(str(real)).fingerprint
    assert ("frechet-distance", "pixels-8x8", "shuffled") not in rows
    assert row["interval"] is None


def test_all_splits_but_train_are_scored_and_named(tmp_path):
    for split in ("train", "val", "heldout"):
        write(tmp_path / "samples" / split, scenes(4, split))
    rows = json.loads((evaluate(str(tmp_path / "samples"), None, tmp_path / "scores", OPTIONS) / "results.json").read_text())["results"]
    assert {row["split"] for row in rows} == {"val", "heldout"}


def test_a_second_run_is_already_complete_and_another_target_is_refused(tmp_path):
    samples = write(tmp_path / "samples", scenes(3))
    evaluate(str(samples), None, tmp_path / "scores", OPTIONS)
    written = (tmp_path / "scores" / "results.json").stat().st_mtime_ns
    evaluate(str(samples), None, tmp_path / "scores", OPTIONS)
    assert (tmp_path / "scores" / "results.json").stat().st_mtime_ns == written
    with pytest.raises(UsageError, match="another run"):
        evaluate(str(write(tmp_path / "others", scenes(4))), None, tmp_path / "scores", OPTIONS)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    (tmp_path / "tiny-vq.toml").write_text(TOKENIZER)
    recipe = load_recipe(tmp_path / "tiny-vq.toml", size="tiny")
    trained = fresh_autoencoder(recipe, seed=5)
    with torch.no_grad():
        trained.last_layer.mul_(0.1)  # not the initial weights, so that the control differs
    save_checkpoint(tmp_path / "vq", recipe, {f"autoencoders.vq.{name}": value for name, value in trained.state_dict().items()})
    return tmp_path / "vq"


def test_an_image_tokenizer_reconstructs_and_is_scored_beside_its_untrained_twin(tmp_path, tokenizer):
    write(tmp_path / "data" / "val", scenes(7), lambda sample: {})
    out = evaluate(str(tokenizer), str(tmp_path / "data"), tmp_path / "scores", OPTIONS)
    rows = results(out)
    assert {("psnr", "all"), ("ssim", "all"), ("codebook", "usage"), ("reconstructed-scenes", "objects")} <= {key[:2] for key in rows}
    assert not any(metric == "scene-accuracy" or control == "shuffled" for metric, _, control in rows)
    assert rows["psnr", "all", None]["value"] != rows["psnr", "all", "untrained"]["value"]
    assert rows["codebook", "usage", None]["n"] == 7 * 4 * 4
    assert rows["codebook", "perplexity", None]["protocol"]["codebook_size"] == 24
    samples = open_shards(str(out / "samples" / "val"))
    assert samples.fields["sample.image.codes"]["codebook_size"] == 24
    assert samples[0].fields["meta"]["tasks"] == ["reconstruct"]
    assert json.loads((out / "results.json").read_text())["inputs"][0]["role"] == "model"


def test_a_tokenizer_is_scored_for_its_fidelity_its_cost_and_its_distance_and_its_speed_is_no_result(tmp_path, tokenizer):
    write(tmp_path / "data" / "val", scenes(7), lambda sample: {})
    once, again = (evaluate(str(tokenizer), str(tmp_path / "data"), tmp_path / name / "scores", OPTIONS) for name in ("one", "two"))
    rows = results(once)
    assert rows["bits-per-pixel", "nominal", None]["value"] == pytest.approx(4 * 4 * np.log2(24) / 32**2)
    assert rows["bits-per-pixel", "entropy", None]["value"] < rows["bits-per-pixel", "nominal", None]["value"]
    assert rows["perceptual-distance", "laplacian", None]["interval"] is not None
    assert any(metric == "frechet-distance" for metric, _, _ in rows)
    assert (once / "results.json").read_bytes() == (again / "results.json").read_bytes()
    [line] = [json.loads(line) for line in (once / "metrics.jsonl").read_text().splitlines()]
    assert line["encode_per_second"] > 0 and line["decode_per_second"] > 0
    assert (line["split"], line["height"], line["width"], line["threads"]) == ("val", 32, 32, torch.get_num_threads())


def test_continuous_latents_are_scored_as_they_are_stored(tmp_path):
    text = TOKENIZER.replace('kind = "cnn"', 'kind = "kl-cnn"').replace("attention = false\n", "").split("quantizer")[0]
    (tmp_path / "tiny-kl.toml").write_text(text + "[sizes.tiny]\n[sizes.small]\n[sizes.paper]\n")
    recipe = load_recipe(tmp_path / "tiny-kl.toml", size="tiny")
    trained = fresh_autoencoder(recipe, seed=5)
    save_checkpoint(tmp_path / "kl", recipe, {f"autoencoders.vq.{name}": value for name, value in trained.state_dict().items()})
    write(tmp_path / "data" / "val", scenes(3), lambda sample: {})
    out = evaluate(str(tmp_path / "kl"), str(tmp_path / "data"), tmp_path / "scores", OPTIONS)
    rows = results(out)
    assert rows["bits-per-pixel", "nominal", None]["value"] == 16 * 6 * 4 * 4 / 32**2
    assert not any(metric == "codebook" or category == "entropy" for metric, category, _ in rows)
    made = open_shards(str(out / "samples" / "val"))[1].fields
    assert made["sample.image.latents"].dtype == np.float16
    with torch.no_grad():
        again = trained.decode(torch.from_numpy(made["sample.image.latents"])[None].float())[0]
    assert np.array_equal(to_pixels(again), made["sample.image"])


class Renamed(Autoencoder):
    """The codes of an autoencoder in another order: residual (1, h, w), or in a row (n,) that only a grid brings back into shape."""

    def __init__(self, inner: Autoencoder, shape: str) -> None:
        super().__init__()
        self.inner, self.config, self.shape = inner, inner.config, shape

    def encode_codes(self, images: torch.Tensor) -> torch.Tensor:
        codes = self.inner.encode_codes(images)
        return codes.flatten(1) if self.shape == "row" else codes[:, None]

    def decode_codes(self, codes: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        assert grid is not None
        return self.inner.decode_codes(codes.reshape(len(codes), *grid))


@pytest.mark.parametrize(("shape", "expected"), [("row", (12,)), ("residual", (1, 2, 6))])
def test_codes_of_any_shape_come_back_as_pictures_of_their_size(tmp_path, shape, expected):
    (tmp_path / "tiny-vq.toml").write_text(TOKENIZER)
    inner = fresh_autoencoder(load_recipe(tmp_path / "tiny-vq.toml", size="tiny"), seed=5)
    rng = np.random.default_rng(0)
    group = [Sample(str(i), {"image": rng.integers(0, 256, (16, 48, 3), dtype=np.uint8)}) for i in range(3)]
    with torch.no_grad():
        plain, other = (list(round_trip(model, group, torch.device("cpu"))) for model in (inner, Renamed(inner, shape)))
    for one, two in zip(plain, other, strict=True):
        assert two.fields["sample.image.codes"].shape == expected
        assert np.array_equal(one.fields["sample.image"], two.fields["sample.image"])


def test_a_checkpoint_without_prompts_says_what_it_needs(tmp_path, tokenizer):
    with pytest.raises(UsageError, match="needs prompts"):
        evaluate(str(tokenizer), None, tmp_path / "scores", OPTIONS)


def test_a_picture_the_tokenizer_cannot_halve_names_its_sample(tmp_path, tokenizer):
    with ShardWriter(tmp_path / "odd") as writer:
        writer.write(Sample("odd", {"image": np.zeros((12, 20, 3), np.uint8)}))
    with pytest.raises(DataError, match="odd: pictures of 12 x 20 pixels: height and width must be multiples of 8"):
        evaluate(str(tokenizer), str(tmp_path / "odd"), tmp_path / "scores", OPTIONS)


@pytest.mark.parametrize("seed", range(5))
def test_no_sample_keeps_its_own_prompt_when_prompts_are_shuffled(seed):
    prompts = ["a", "b", "a", "c", "d", "d"]
    order = derangement(prompts, seed)
    assert order is not None
    lent = [prompts[i] for i in order]
    assert all(one != other for one, other in zip(prompts, lent, strict=True))
    assert set(lent) == set(prompts)
    assert lent[0] == lent[2]
    assert derangement(["a", "a"], seed) is None


def test_shuffling_depends_on_the_seed_alone():
    prompts = [str(index) for index in range(30)]
    assert derangement(prompts, 1) == derangement(prompts, 1) != derangement(prompts, 2)
