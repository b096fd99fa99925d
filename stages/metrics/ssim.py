"""Structural similarity of reconstructions (Wang et al. 2004), per picture and channel, then the mean.

The constants of the paper: an 11×11 Gaussian window of standard deviation 1.5, K1 = 0.01, K2 = 0.03, and a data range of 1 for
values in [0, 1]. (A range of 2 on such values, seen in published scripts, inflates the score.) Only whole windows count.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stages.errors import DataError
from stages.metrics.intervals import bootstrap_mean
from stages.metrics.psnr import is_reconstruction
from stages.metrics.score import Fields, Score, Setting

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def ssim(picture: np.ndarray, truth: np.ndarray) -> float:
    """Similarity in [-1, 1] of two uint8 pictures (H, W, 3), each side at least 11 pixels."""
    if picture.shape != truth.shape or min(picture.shape[:2]) < WINDOW:
        raise DataError(f"SSIM: pictures {picture.shape} and {truth.shape}; expected equal shapes, {WINDOW} pixels a side or more")
    x, y = (torch.from_numpy(np.ascontiguousarray(p)).permute(2, 0, 1)[:, None].double() / 255 for p in (picture, truth))
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(similarity.mean())


def blur(maps: Tensor) -> Tensor:
    """Gaussian means over whole windows: (c, 1, H, W) -> (c, 1, H - 10, W - 10)."""
    weights = torch.exp(-((torch.arange(WINDOW, dtype=maps.dtype) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    return F.conv2d(F.conv2d(maps, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


class SSIM:
    paired = False

    def __init__(self, setting: Setting) -> None:
        self.seed = setting.seed

    @staticmethod
    def applies(sample: Fields, setting: Setting) -> bool:
        return is_reconstruction(sample) and min(sample["image"].shape[:2]) >= WINDOW

    def look(self, sample: Fields) -> float:
        return ssim(sample["sample.image"], sample["image"])

    def expect(self, sample: Fields) -> None:
        return None

    def scores(self, seen: list[float], expected: list[None]) -> list[Score]:
        protocol = {"window": WINDOW, "sigma": SIGMA, "data_range": 1, "colour": "mean of channels"}
        return [Score("all", float(np.mean(seen)), len(seen), len(seen), bootstrap_mean(np.array(seen), self.seed), protocol=protocol)]
