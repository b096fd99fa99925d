"""Binary spherical quantization: lookup-free, with latents and codes on the unit sphere (arXiv:2406.07548, section 3.2).

The codes are the 2^bits corners (±1, ..., ±1) / √bits. Latents are scaled to length 1 before their signs are taken, which bounds the
error, so the commitment loss is the squared distance itself rather than its mean over the numbers. The entropy loss is that of
lookup-free quantization (lfq.py) over groups of `joint_bits`, section 3.3.
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from stages.parts.quantizers.lfq import LFQ, LFQConfig


class BSQConfig(LFQConfig):
    """Signs of a unit vector (BSQ, arXiv:2406.07548). Groups of 9 bits, as published, share an entropy."""

    kind: Literal["bsq"] = "bsq"  # type: ignore[assignment]
    joint_bits: int = Field(default=9, ge=1, le=20)

    def build(self, in_dim: int) -> "BSQ":
        return BSQ(self, in_dim)


class BSQ(LFQ):
    def __init__(self, config: BSQConfig, in_dim: int) -> None:
        super().__init__(config, in_dim)
        self.step = config.bits**-0.5

    def assign(self, rows: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return super().assign(F.normalize(rows, dim=1), generator)

    def distance(self, rows: Tensor, vectors: Tensor) -> Tensor:
        return (rows - vectors).square().sum(1).mean()
