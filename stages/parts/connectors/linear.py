"""Linear and MLP connectors: vectors in, rows of the backbone's width out, one for one."""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from stages.parts.config import PartConfig
from stages.parts.layers import init_linear

Positions = Literal["none", "sincos-2d"]


def sincos_2d(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed 2-D table (h·w, width): half the width for rows, half for columns, each sin beside cos (DiT, arXiv:2212.09748)."""
    quarter = width // 4
    frequency = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    h, w = grid
    row, column = torch.meshgrid(torch.arange(h, dtype=torch.float64), torch.arange(w, dtype=torch.float64), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (row, column)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return nn.functional.pad(table, (0, width - 4 * quarter)).float()


class LinearConfig(PartConfig):
    """One matrix (LLaVA v1, arXiv:2304.08485; Transfusion's linear patch layer, arXiv:2408.11039).

    `positions = "sincos-2d"` adds a fixed table of the segment's grid; without it the place of a token is the backbone's business.
    """

    kind: Literal["linear"] = "linear"
    positions: Positions = "none"
    bias: bool = True
    dim: int | None = None  # the output, on ports that enter no backbone (the joint space of contrastive towers)

    def build(self, in_dim: int, out_dim: int) -> "Projection":
        return Projection([in_dim, self.dim or out_dim], positions=self.positions, bias=self.bias)


class MLPConfig(PartConfig):
    """`depth` matrices with GELU between them (LLaVA 1.5, arXiv:2310.03744)."""

    kind: Literal["mlp"] = "mlp"
    depth: int = 2
    positions: Positions = "none"

    def build(self, in_dim: int, out_dim: int) -> "Projection":
        return Projection([in_dim] + [out_dim] * self.depth, positions=self.positions)


class Projection(nn.Module):
    """values (n, in_dim) → (n, out_dim); one token in, one token out."""

    def __init__(self, dims: list[int], *, positions: Positions = "none", bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in pairwise(dims))
        self.positions, self.out_dim = positions, dims[-1]

    def init_weights(self, generator: torch.Generator) -> None:
        for layer in self.layers:
            init_linear(layer, generator)

    def forward(self, values: Tensor, grids: list[tuple[int, ...]]) -> Tensor:
        for place, layer in enumerate(self.layers):
            values = layer(nn.functional.gelu(values) if place else values)
        if self.positions == "sincos-2d":
            tables = {grid: sincos_2d((grid[-2], grid[-1]), self.out_dim) for grid in set(grids)}
            values = values + torch.cat([tables[grid] for grid in grids]).to(values)
        return values
