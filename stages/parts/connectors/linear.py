"""Linear and MLP connectors: vectors in, rows of the backbone's width out, one for one."""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from stages.parts.config import Count, PartConfig, Size
from stages.parts.layers import RMSNorm, init_linear


class LinearConfig(PartConfig):
    """One matrix (LLaVA v1, arXiv:2304.08485; Transfusion's linear patch layer, arXiv:2408.11039)."""

    kind: Literal["linear"] = "linear"
    bias: bool = True
    norm: Literal["none", "rms"] = "none"  # of what comes in
    dim: Size | None = None  # the output, on ports that enter no backbone (the joint space of contrastive towers)

    def build(self, in_dim: int, out_dim: int) -> "Projection":
        return Projection([in_dim, self.dim or out_dim], bias=self.bias, norm=self.norm == "rms")


class MLPConfig(PartConfig):
    """`depth` matrices with GELU between them (LLaVA 1.5, arXiv:2310.03744)."""

    kind: Literal["mlp"] = "mlp"
    depth: Count = 2

    def build(self, in_dim: int, out_dim: int) -> "Projection":
        return Projection([in_dim] + [out_dim] * self.depth)


class Projection(nn.Module):
    """values (n, in_dim) → (n, out_dim); one token in, one token out."""

    def __init__(self, dims: list[int], *, bias: bool = True, norm: bool = False) -> None:
        super().__init__()
        self.norm = RMSNorm(dims[0]) if norm else None
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in pairwise(dims))

    def init_weights(self, generator: torch.Generator) -> None:
        if self.norm is not None:
            self.norm.init_weights(generator)
        for layer in self.layers:
            init_linear(layer, generator)

    def forward(self, values: Tensor, grids: list[tuple[int, ...]] | None = None) -> Tensor:
        values = values if self.norm is None else self.norm(values)
        for place, layer in enumerate(self.layers):
            values = layer(nn.functional.gelu(values) if place else values)
        return values
