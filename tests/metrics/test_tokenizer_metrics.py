"""What a tokenizer costs, how far its pictures are from the originals, and how fast it is: closed forms for codes of every shape."""

import itertools
import math

import numpy as np
import pytest
import torch

from stages.errors import DataError
from stages.metrics import perceptual_distance, speed
from stages.metrics.bits_per_pixel import BitsPerPixel
from stages.metrics.codebook import Codebook
from stages.metrics.frechet import FrechetDistance, Gaussian, frechet_distance
from stages.metrics.perceptual_distance import PerceptualDistance
from stages.metrics.score import Metric, Reference, Score, Setting
from stages.parts.losses import LaplacianConfig
from stages.parts.views.square import to_tensor


def picture(seed: int, height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def reconstruction(made: np.ndarray, true: np.ndarray, **fields: np.ndarray) -> dict:
    named = {f"sample.image.{name}": value for name, value in fields.items()}
    return {"__key__": "k", "sample.image": made, "image": true, "meta": {"tasks": ["reconstruct"]}, **named}


def score(metric: Metric, samples: list[dict]) -> dict[str, Score]:
    scores = metric.scores([metric.look(sample) for sample in samples], [metric.expect(sample) for sample in samples])
    return {score.category: score for score in scores}


SHAPES = {"grid": (4, 6), "residual": (3, 4, 6), "row": (7,)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bits_per_pixel_of_codes_of_any_shape(shape):
    rng = np.random.default_rng(0)
    samples = [reconstruction(picture(i), picture(i), codes=rng.integers(0, 5, shape)) for i in range(3)]
    setting = Setting(codebook_size=20)
    assert BitsPerPixel.applies(samples[0], setting)
    assert not BitsPerPixel.applies(samples[0], Setting())
    assert not BitsPerPixel.applies(samples[0] | {"meta": {"tasks": ["generate"]}}, setting)
    scores = score(BitsPerPixel(setting), samples)
    assert scores["nominal"].value == pytest.approx(math.prod(shape) * math.log2(20) / (16 * 24))
    counts = np.bincount(np.concatenate([sample["sample.image.codes"].ravel() for sample in samples]))
    share = counts[counts > 0] / counts.sum()
    assert scores["entropy"].value == pytest.approx(-(share * np.log2(share)).sum() * math.prod(shape) / (16 * 24))
    assert scores["entropy"].n == 3 * math.prod(shape)
    assert score(Codebook(setting), samples)["usage"].n == 3 * math.prod(shape)


def test_equally_frequent_codes_cost_what_they_cost_nominally_and_one_code_nothing():
    setting = Setting(codebook_size=16)
    even = score(BitsPerPixel(setting), [reconstruction(picture(0), picture(0), codes=np.arange(16).reshape(4, 4))])
    assert even["entropy"].value == pytest.approx(even["nominal"].value) == pytest.approx(16 * 4 / (16 * 24))
    same = score(BitsPerPixel(setting), [reconstruction(picture(0), picture(0), codes=np.full((4, 4), 3))])
    assert same["entropy"].value == 0


def test_pictures_of_different_sizes_weigh_by_their_pixels():
    setting = Setting(codebook_size=4)
    samples = [
        reconstruction(picture(0), picture(0), codes=np.zeros((2, 3), int)),
        reconstruction(picture(1, 8, 8), picture(1, 8, 8), codes=np.zeros((5,), int)),
    ]
    assert score(BitsPerPixel(setting), samples)["nominal"].value == pytest.approx(2 * (6 + 5) / (16 * 24 + 64))


def test_latents_cost_sixteen_bits_a_number():
    samples = [reconstruction(picture(i), picture(i), latents=np.zeros((4, 2, 3), np.float16)) for i in range(2)]
    assert BitsPerPixel.applies(samples[0], Setting())
    scores = score(BitsPerPixel(Setting()), samples)
    assert scores.keys() == {"nominal"}
    assert scores["nominal"].value == 16 * 4 * 2 * 3 / (16 * 24)
    assert scores["nominal"].protocol["stored"] == "float16"


def test_codes_out_of_range_are_an_error():
    with pytest.raises(DataError, match="0 to 3"):
        BitsPerPixel(Setting(codebook_size=4)).look(reconstruction(picture(0), picture(0), codes=np.array([4])))


def test_every_installed_network_has_its_own_perceptual_distance():
    samples = [reconstruction(picture(i), picture(i + 10)) for i in range(4)]
    scores = score(PerceptualDistance(Setting()), samples)
    assert scores.keys() == perceptual_distance.networks().keys() >= {"laplacian"}
    laplacian = LaplacianConfig().build()
    expected = [float(laplacian(to_tensor(sample["image"])[None], to_tensor(sample["sample.image"])[None])) for sample in samples]
    assert scores["laplacian"].value == pytest.approx(np.mean(expected))
    assert (
        scores["laplacian"].interval is not None and scores["laplacian"].interval[0] < np.mean(expected) < scores["laplacian"].interval[1]
    )
    assert all(entry.protocol["network"] == name for name, entry in scores.items())
    same = score(PerceptualDistance(Setting()), [reconstruction(picture(0), picture(0))])
    assert {entry.value for entry in same.values()} == {0.0}


def test_a_network_that_needs_larger_pictures_is_left_out(monkeypatch):
    monkeypatch.setattr(
        perceptual_distance, "networks", lambda: {"lpips": torch.nn.PairwiseDistance(), "laplacian": LaplacianConfig().build()}
    )
    small = score(PerceptualDistance(Setting()), [reconstruction(picture(0, 8, 32), picture(1, 8, 32))])
    assert small.keys() == {"laplacian"}


def test_a_perceptual_distance_needs_equal_shapes_and_a_reconstruction():
    assert not PerceptualDistance.applies({"sample.image": picture(0), "image": picture(1)}, Setting())
    with pytest.raises(DataError, match="expected the same shape"):
        PerceptualDistance(Setting()).look(reconstruction(picture(0), picture(0, 8, 8)))


def test_reconstructions_are_held_against_their_originals_where_nothing_else_is_given():
    samples = [reconstruction(picture(i) // 2, picture(i)) for i in range(6)]
    setting = Setting(features="pixels-8x8")
    assert FrechetDistance.applies(samples[0], setting)
    metric = FrechetDistance(setting)
    made, true = (torch.stack([metric.network([sample[name]])[0] for sample in samples]) for name in ("sample.image", "image"))
    [found] = score(metric, samples).values()
    assert found.value == pytest.approx(frechet_distance(Gaussian.fit(made), Gaussian.fit(true)))
    assert (found.protocol["reference"], found.protocol["reference_n"]) == ("originals", 6)
    [other] = score(FrechetDistance(Setting(features="pixels-8x8", reference=Reference("abc", true.flip(0)))), samples).values()
    assert other.value == pytest.approx(found.value)
    assert other.protocol["reference"] == "abc"
    assert score(metric, [reconstruction(picture(0), picture(0))]) == {}


def test_speed_is_the_median_of_passes_after_the_first(monkeypatch):
    """A clock of our own: after a pass that is not timed, three of 0.2, 0.1 and 0.3 s, of eight pictures each."""
    ticks = itertools.accumulate([0.0, 0.2, 0.0, 0.1, 0.0, 0.3])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(ticks))
    passes = []

    def work() -> torch.Tensor:
        passes.append(1)
        return torch.zeros(2, 2)

    assert speed.per_second(work, 8, seconds=0.5) == pytest.approx(8 / 0.2)
    assert len(passes) == 4
