"""Latents into a network through convolutions: one matrix, then ConvNeXt blocks over each picture (JanusFlow's light encoder of noised
latents, arXiv:2411.07975, section 3.2)."""

import math
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from stages.parts.config import Count, PartConfig, Size
from stages.parts.layers import LayerNorm, init_linear
from stages.parts.pictures import Grid, as_maps, as_tokens, through_pictures


class ConvNeXtConfig(PartConfig):
    """`depth` blocks `dim` channels wide, the network's width unless written."""

    for_pictures: ClassVar[bool] = True

    kind: Literal["convnext"] = "convnext"
    depth: Count = 2
    dim: Size | None = None

    def build(self, in_dim: int, out_dim: int) -> "ConvNeXtIn":
        return ConvNeXtIn(in_dim, self.dim or out_dim, out_dim, self.depth)


class ConvNeXtBlock(nn.Module):
    """x + mlp(norm(a 7 × 7 convolution of each channel)), (s, h·w, d) → the same (arXiv:2201.03545, figure 4, without its layer scale)."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.spatial = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = LayerNorm(dim, 1e-6)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def init_weights(self, generator: Generator) -> None:
        nn.init.normal_(self.spatial.weight, std=1 / 7, generator=generator)
        nn.init.zeros_(self.spatial.bias)  # type: ignore[arg-type]
        self.norm.init_weights(generator)
        init_linear(self.up, generator)
        init_linear(self.down, generator, std=1 / math.sqrt(self.down.in_features * 2 * self.depth))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        mixed = as_tokens(self.spatial(as_maps(x, grid).contiguous()))
        return x + self.down(F.gelu(self.up(self.norm(mixed))))


class ConvNeXtIn(nn.Module):
    """values (n, in_dim), picture after picture → (n, out_dim)."""

    def __init__(self, in_dim: int, dim: int, out_dim: int, depth: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(in_dim, dim), nn.Linear(dim, out_dim)
        self.blocks = nn.ModuleList(ConvNeXtBlock(dim, depth) for _ in range(depth))

    def init_weights(self, generator: Generator) -> None:
        init_linear(self.inner, generator)
        for block in self.blocks:
            assert isinstance(block, ConvNeXtBlock)
            block.init_weights(generator)
        init_linear(self.outer, generator)

    def forward(self, values: Tensor, grids: list[Grid]) -> Tensor:
        return self.outer(through_pictures(self.inner(values), grids, self.mixed))

    def mixed(self, x: Tensor, grid: Grid, numbers: list[int]) -> Tensor:
        """Tokens (s, h·w, dim) of pictures of one grid through the blocks."""
        for block in self.blocks:
            x = block(x, grid)
        return x
