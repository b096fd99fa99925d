"""Transformer blocks in which the tokens of a picture see each other and nothing else: MAR's encoder and decoder (arXiv:2406.11838,
section 4), which a connector and a head may hold on either side of the backbone.

Blocks are those of a vision transformer (pre-norm, biases, GELU). Where a token stands is told by a fixed 2-D table, so that pictures
may have any grid. Shapes: n tokens of all pictures, in order · s pictures · l tokens of one · w width.
"""

import math
from collections.abc import Sequence
from typing import Self

import torch
from pydantic import model_validator
from torch import Generator, Tensor, nn

from stages.parts.config import Count, Ratio, Size, Strict, whole_heads
from stages.parts.encoders.clip import ClipBlock, TowerConfig
from stages.parts.layers import LayerNorm, sincos_2d

EPS = 1e-6
Grids = Sequence[tuple[int, ...]]


class BlocksConfig(Strict):
    """Sizes of a stack of blocks."""

    width: Size
    depth: Count
    heads: Count
    mlp_ratio: Ratio = 4.0

    @model_validator(mode="after")
    def _whole_heads(self) -> Self:
        whole_heads(self.width, self.heads)
        return self


class PictureBlocks(nn.Module):
    """x (n, w) of pictures of these grids → (n, w), after a last norm. Every picture is computed as if it were alone."""

    def __init__(self, config: BlocksConfig) -> None:
        super().__init__()
        tower = TowerConfig(
            kind="blocks",
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            activation="gelu",
            eps=EPS,
        )
        self.width = config.width
        self.blocks = nn.ModuleList(ClipBlock(tower) for _ in range(config.depth))
        self.norm_out = LayerNorm(config.width, EPS)

    def init_weights(self, generator: Generator) -> None:
        for block in self.blocks:
            assert isinstance(block, ClipBlock)
            block.init_weights(generator, len(self.blocks))
        self.norm_out.init_weights(generator)

    def places(self, grids: Grids) -> Tensor:
        """What says where each token stands in its picture, (n, w)."""
        return torch.cat([sincos_2d(tuple(grid), self.width) for grid in grids])

    def forward(self, x: Tensor, grids: Grids) -> Tensor:
        sizes = [math.prod(grid) for grid in grids]
        pictures = x.split(sizes)
        done: dict[int, Tensor] = {}
        for size in dict.fromkeys(sizes):  # pictures of one size go through together
            members = [number for number, own in enumerate(sizes) if own == size]
            stacked = torch.stack([pictures[number] for number in members])
            for block in self.blocks:
                stacked = block(stacked, causal=False)
            done |= zip(members, stacked, strict=True)
        return self.norm_out(torch.cat([done[number] for number in range(len(sizes))]))
