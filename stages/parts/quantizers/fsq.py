"""Finite scalar quantization: every number of a latent is squashed and rounded to one of a few levels; there is no codebook to learn.

"Finite Scalar Quantization: VQ-VAE Made Simple", arXiv:2309.15505, section 3 and listing in appendix A.1. A code is the mixed-radix
number of the levels, the first number of the latent counting ones; its vector lies in [-1, 1]. No losses, and no code can die.
For an even number of levels the bounds are moved by half a level, and the input by as much that a latent of zero stays
at the level in the middle. (The listing moves it by tan where the inverse of tanh is meant: 0.143983 and 0.143987 for 8 levels.)
"""

import math
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Generator, Tensor

from stages.parts.config import Count
from stages.parts.quantizers.quantizer import Quantizer, QuantizerConfig, straight_through

EPS = 1e-3  # how far the bounds stay inside the outermost half levels


class FSQConfig(QuantizerConfig):
    """Rounding to `levels` (arXiv:2309.15505). The default has 64,000 codes (table 1, about 2^16)."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[Count, ...] = Field(default=(8, 8, 8, 5, 5, 5), min_length=1, max_length=64)

    @field_validator("levels")
    @classmethod
    def _levels_have_a_middle(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        if min(levels) < 3:
            raise ValueError("a number needs 3 levels at least; the paper advises 5")
        if math.prod(levels) >= 2**62:
            raise ValueError("the levels give more codes than an integer of 64 bits can count")
        return levels

    @property
    def size(self) -> int:
        return math.prod(self.levels)

    @property
    def dim(self) -> int:
        return len(self.levels)

    def build(self, in_dim: int) -> "FSQ":
        return FSQ(self, in_dim)


class FSQ(Quantizer):
    levels: Tensor
    radix: Tensor

    def __init__(self, config: FSQConfig, in_dim: int) -> None:
        super().__init__(config, in_dim)
        levels = torch.tensor(config.levels)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("radix", torch.cumprod(torch.cat([torch.ones(1, dtype=torch.int64), levels[:-1]]), 0), persistent=False)

    def bound(self, rows: Tensor) -> Tensor:
        """Numbers squashed so that rounding them gives the levels: -2 to 2 for five, -4 to 3 for eight."""
        half = (self.levels - 1) * (1 - EPS) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(rows + torch.atanh(offset / half)) * half - offset

    def assign(self, rows: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        bounded, middle = self.bound(rows), self.levels // 2
        digits = bounded.detach().nan_to_num().round().long() + middle
        codes = (digits * self.radix).sum(1)
        self.count(rows, codes)
        return straight_through((digits - middle) / middle, bounded / middle), codes, {}

    def vectors(self, codes: Tensor) -> Tensor:
        digits, middle = codes.unsqueeze(1) // self.radix % self.levels, self.levels // 2
        return (digits - middle) / middle
