"""Peak signal-to-noise ratio of reconstructions, in dB: per picture, then the mean.

The mean over pictures of 10 log10(1 / MSE), on [0, 1] after rounding to uint8, is not the PSNR of the mean error: on a set of mixed
difficulty the two differ by several dB, and published scripts disagree about which they print. This one is per picture.
"""

import numpy as np

from stages.errors import DataError
from stages.metrics.intervals import bootstrap_mean
from stages.metrics.score import Fields, Score, Setting, about

IDENTICAL = 100.0  # dB given to a picture without any error, whose ratio is infinite


def psnr(picture: np.ndarray, truth: np.ndarray) -> float:
    """dB of one uint8 picture (H, W, 3) against another; 100 where they are identical."""
    if picture.shape != truth.shape:
        raise DataError(f"PSNR: the reconstruction is {picture.shape}, its original {truth.shape}; they should have the same shape")
    error = np.mean((picture.astype(np.float64) - truth.astype(np.float64)) ** 2) / 255**2
    return IDENTICAL if error == 0 else min(IDENTICAL, float(10 * np.log10(1 / error)))


class PSNR:
    paired = False

    def __init__(self, setting: Setting) -> None:
        self.seed = setting.seed

    @staticmethod
    def applies(sample: Fields, setting: Setting) -> bool:
        return is_reconstruction(sample)

    def look(self, sample: Fields) -> float:
        return psnr(sample["sample.image"], sample["image"])

    def expect(self, sample: Fields) -> None:
        return None

    def scores(self, seen: list[float], expected: list[None]) -> list[Score]:
        protocol = {"range": "uint8", "mean": "per picture", "identical": IDENTICAL}
        return [Score("all", float(np.mean(seen)), len(seen), len(seen), bootstrap_mean(np.array(seen), self.seed), protocol=protocol)]


def is_reconstruction(sample: Fields) -> bool:
    """Whether the picture was made *from* the true one, so that pixels may be compared."""
    return {"sample.image", "image"} <= sample.keys() and "reconstruct" in about(sample).get("tasks", [])
