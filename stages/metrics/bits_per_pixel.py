"""Bits per pixel of an image tokenizer's codes or latents: what its reconstructions cost, so that fidelity can be held against it.

`nominal` is what the codes cost without looking at them: codes · log2 K / (H · W), and 16 bits a number for float16 latents. `entropy`
is what an ideal coder with one table of the codes' frequencies would need: codes · H(p) / (H · W), with the frequencies found. Of few
codes H is estimated too low, by about (K' - 1) / 2N nats for K' codes that occur, so the number of codes stands beside it.
"""

import math

import numpy as np

from stages.errors import DataError
from stages.metrics.codebook import perplexity
from stages.metrics.psnr import is_reconstruction
from stages.metrics.score import Fields, Score, Setting


class BitsPerPixel:
    paired = False

    def __init__(self, setting: Setting) -> None:
        self.size = setting.codebook_size

    @staticmethod
    def applies(sample: Fields, setting: Setting) -> bool:
        has_codes = "sample.image.codes" in sample and setting.codebook_size is not None
        return is_reconstruction(sample) and (has_codes or "sample.image.latents" in sample)

    def look(self, sample: Fields) -> tuple[np.ndarray, int]:
        """The codes or latents of one picture, flat, and its pixels."""
        name = "sample.image.codes" if self.size is not None else "sample.image.latents"
        stored = np.asarray(sample[name]).ravel()
        if self.size is not None and (stored.size == 0 or stored.min() < 0 or stored.max() >= self.size):
            raise DataError(f"{name}: {stored.size} codes, which should be integers from 0 to {self.size - 1}")
        return stored, math.prod(sample["image"].shape[:2])

    def expect(self, sample: Fields) -> None:
        return None

    def scores(self, seen: list[tuple[np.ndarray, int]], expected: list[None]) -> list[Score]:
        numbers, pixels = sum(stored.size for stored, _ in seen), sum(size for _, size in seen)
        if self.size is None:
            bits = 8 * seen[0][0].itemsize
            return [Score("nominal", bits * numbers / pixels, numbers, len(seen), protocol={"stored": str(seen[0][0].dtype)})]
        protocol = {"codebook_size": self.size}
        counts = np.bincount(np.concatenate([stored for stored, _ in seen]), minlength=self.size)
        entropy = math.log2(perplexity(counts))
        return [
            Score("nominal", math.log2(self.size) * numbers / pixels, numbers, len(seen), protocol=protocol),
            Score("entropy", entropy * numbers / pixels, numbers, len(seen), protocol=protocol | {"table": "one for all codes"}),
        ]
