"""Distances between pictures that look further than a pixel.

The published tokenizers use LPIPS, distances of VGG-16 features, which need weights that no package carries. `laplacian` needs none: it
compares the two pictures octave by octave, so blur and lost edges cost as much at every scale. It knows nothing about objects, and is
named for what it is wherever a result is printed.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stages.parts.config import PartConfig


class PerceptualConfig(PartConfig):
    """Settings of a perceptual distance; the module maps two (b, 3, H, W) pictures in [-1, 1] to a scalar."""

    def build(self) -> nn.Module:
        raise NotImplementedError


class LaplacianConfig(PerceptualConfig):
    """L1 distance of Laplacian pyramids (Lap1 of arXiv:1707.05776, section 3): the sum over octaves of the mean absolute difference."""

    kind: Literal["laplacian"] = "laplacian"
    levels: int = Field(default=3, ge=1)

    def build(self) -> nn.Module:
        return Laplacian(self)


class Laplacian(nn.Module):
    """Sum over the bands of a Laplacian pyramid, the low-pass remainder included, of the mean absolute difference.

    The paper's weight 4^j on the sum over band j, which has 4^-j as many pixels, is this equal weight on means.
    """

    binomial: Tensor

    def __init__(self, config: LaplacianConfig) -> None:
        super().__init__()
        self.levels = config.levels
        taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.register_buffer("binomial", taps.outer(taps).expand(3, 1, 5, 5).contiguous(), persistent=False)

    def forward(self, images: Tensor, reconstructed: Tensor) -> Tensor:
        remainder = images - reconstructed  # the pyramid is linear: that of a difference is the difference of the pyramids
        distance = remainder.new_zeros(())
        for _ in range(self.levels):
            if min(remainder.shape[2:]) < 2:  # nothing left to halve
                break
            smooth = self._blur(remainder)
            distance = distance + (remainder - smooth).abs().mean()
            remainder = smooth[:, :, ::2, ::2]
        return distance + remainder.abs().mean()

    def _blur(self, difference: Tensor) -> Tensor:
        return F.conv2d(difference, self.binomial, padding=2, groups=3)  # beyond the picture there is no difference
