"""Adaptive layer norm: how far a denoiser's pictures are from clean scales, shifts and gates every branch of every layer.

adaln-zero (DiT, arXiv:2212.09748, section 3.2): each layer has a matrix of its own, which starts at zero, so that every layer starts as
the identity. adaln-single (PixArt-alpha, arXiv:2310.00426, section 2.3; Sana, arXiv:2410.10629): one matrix for all layers, and for each
layer a learned table that is added.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from stages.parts.layers import TimestepEmbedding, init_linear

ModulationKind = Literal["none", "adaln-zero", "adaln-single"]
BRANCH_PARTS = 6  # shift, scale, gate of attention, and of the MLP
FINAL_PARTS = 2  # shift, scale before the head


class Modulation(nn.Module):
    """What one layer makes of the condition: (m, d) → (m, parts, d)."""

    def __init__(self, kind: ModulationKind, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        if kind == "adaln-zero":
            self.linear = nn.Linear(width, parts * width)
        else:
            self.table = nn.Parameter(torch.empty(parts, width))

    def init_weights(self, generator: Generator) -> None:
        if hasattr(self, "linear"):
            init_linear(self.linear, generator, zero=True)
        else:
            nn.init.normal_(self.table, std=self.table.shape[1] ** -0.5, generator=generator)

    def forward(self, condition: "Condition") -> Tensor:
        if hasattr(self, "linear"):
            return self.linear(F.silu(condition.vector)).unflatten(1, (self.parts, -1))
        assert condition.shared is not None
        return self.table + (condition.shared if self.parts == BRANCH_PARTS else condition.vector.unsqueeze(1))


class Condition:
    """The distinct noise levels of a pass, embedded once each: `vector` (m, d), and (m, 6, d) of the `shared` matrix."""

    def __init__(self, vector: Tensor, shared: Tensor | None) -> None:
        self.vector, self.shared = vector, shared


class TimestepCondition(nn.Module):
    """Noise levels t (m,) → a Condition. Owned by the network, once."""

    def __init__(self, kind: ModulationKind, width: int) -> None:
        super().__init__()
        self.embedding = TimestepEmbedding(width)
        self.shared = nn.Linear(width, BRANCH_PARTS * width) if kind == "adaln-single" else None

    def init_weights(self, generator: Generator) -> None:
        self.embedding.init_weights(generator)
        if self.shared is not None:
            init_linear(self.shared, generator)

    def forward(self, levels: Tensor) -> Condition:
        vector = self.embedding(levels)
        return Condition(vector, None if self.shared is None else self.shared(F.silu(vector)).unflatten(1, (BRANCH_PARTS, -1)))


def shifted(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x · (1 + scale) + shift."""
    return torch.addcmul(x + shift, x, scale)
