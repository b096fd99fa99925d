"""PSNR, SSIM and codebook usage: closed forms, and scikit-image as the oracle."""

import math

import numpy as np
import pytest

from stages.errors import DataError
from stages.metrics.codebook import Codebook, perplexity, usage
from stages.metrics.psnr import PSNR, psnr
from stages.metrics.score import Setting
from stages.metrics.ssim import SSIM, ssim


def picture(seed: int, height: int = 17, width: int = 23) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def reconstruction(key: str, made: np.ndarray, true: np.ndarray) -> dict:
    return {"__key__": key, "sample.image": made, "image": true, "meta": {"tasks": ["reconstruct"]}}


@pytest.mark.parametrize("offset", [1, 5, 51])
def test_psnr_of_a_constant_offset_is_the_closed_form(offset):
    grey = np.full((5, 7, 3), 100, np.uint8)
    assert psnr(grey + np.uint8(offset), grey) == pytest.approx(20 * math.log10(255 / offset))


def test_psnr_averages_decibels_not_errors():
    grey = np.full((5, 7, 3), 100, np.uint8)
    metric = PSNR(Setting())
    seen = [metric.look(reconstruction(str(offset), grey + np.uint8(offset), grey)) for offset in (1, 51)]
    [score] = metric.scores(seen, [None, None])
    assert score.value == pytest.approx((psnr(grey + np.uint8(1), grey) + psnr(grey + np.uint8(51), grey)) / 2)
    of_mean_error = 10 * math.log10(255**2 / ((1 + 51**2) / 2))
    assert score.value - of_mean_error > 10


def test_identical_pictures_stay_finite():
    assert psnr(picture(0), picture(0)) == 100


def test_pixels_are_compared_only_where_the_task_was_to_reconstruct():
    sample = reconstruction("a", picture(0), picture(1))
    assert PSNR.applies(sample, Setting())
    assert not PSNR.applies(sample | {"meta": {"tasks": ["generate"]}}, Setting())
    assert not SSIM.applies(reconstruction("a", picture(0, 8, 8), picture(1, 8, 8)), Setting())


def test_ssim_and_psnr_agree_with_scikit_image():
    skimage = pytest.importorskip("skimage.metrics")
    smooth = np.clip(np.add.outer(np.arange(17) * 9, np.arange(23) * 4)[..., None] + np.array([0, 20, 40]), 0, 255).astype(np.uint8)
    noisy = np.clip(smooth + np.random.default_rng(0).normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
    for one, two in [(noisy, smooth), (picture(0), picture(1)), (picture(2), picture(2))]:
        wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0, "channel_axis": 2}
        assert ssim(one, two) == pytest.approx(skimage.structural_similarity(one / 255, two / 255, **wang), abs=1e-9)
    assert psnr(noisy, smooth) == pytest.approx(skimage.peak_signal_noise_ratio(smooth, noisy, data_range=255))


def test_ssim_refuses_pictures_smaller_than_its_window():
    with pytest.raises(DataError, match="11 pixels"):
        ssim(picture(0, 10, 30), picture(1, 10, 30))


def test_a_reconstruction_of_another_shape_is_an_error_not_a_crop():
    with pytest.raises(DataError, match="same shape"):
        psnr(picture(0, 5, 7), picture(0, 7, 5))


def test_perplexity_is_the_number_of_equally_frequent_codes():
    counts = np.array([0, 6, 6, 6, 0])
    assert perplexity(counts) == pytest.approx(3)
    assert usage(counts) == pytest.approx(3 / 5)
    assert perplexity(np.array([1, 3])) == pytest.approx(4 / 3**0.75)


def test_codebook_scores_count_every_token_and_refuse_codes_out_of_range():
    setting = Setting(codebook_size=4)
    samples = [{"sample.image.codes": np.array([[0, 1, 1]])}, {"sample.image.codes": np.array([[3], [1]])}]
    assert Codebook.applies(samples[0], setting)
    assert not Codebook.applies(samples[0], Setting())
    metric = Codebook(setting)
    scores = {score.category: score for score in metric.scores([metric.look(sample) for sample in samples], [None, None])}
    assert scores["usage"].value == 0.75
    assert scores["usage"].n == 5
    assert scores["perplexity"].value == pytest.approx(math.exp(0.6 * math.log(5 / 3) + 0.4 * math.log(5)))
    with pytest.raises(DataError, match="0 to 3"):
        metric.look({"sample.image.codes": np.array([4])})
