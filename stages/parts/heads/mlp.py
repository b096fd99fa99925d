"""A head of two layers with GELU between them (Janus's image head, arXiv:2410.13848, section 3.1)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.parts.config import PartConfig, Size
from stages.parts.heads.linear import LinearHead
from stages.parts.layers import init_linear


class MLPHeadConfig(PartConfig):
    """`width` of the layer between, the backbone's own unless written."""

    kind: Literal["mlp"] = "mlp"
    width: Size | None = None

    def build(self, in_dim: int, out_dim: int, tied_to: nn.Module | None = None) -> "MLPHead":
        return MLPHead(in_dim, self.width or in_dim, out_dim)


class MLPHead(nn.Module):
    """hidden (n, in_dim) → (n, width) → (n, out_dim), or only columns [start, stop) of it."""

    def __init__(self, in_dim: int, width: int, out_dim: int) -> None:
        super().__init__()
        self.inner = nn.Linear(in_dim, width)
        self.outer = LinearHead(width, out_dim, bias=True, zero=False, tied_to=None)

    def init_weights(self, generator: torch.Generator) -> None:
        init_linear(self.inner, generator)
        self.outer.init_weights(generator)

    def forward(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return self.outer(F.gelu(self.inner(hidden)), start, stop)
