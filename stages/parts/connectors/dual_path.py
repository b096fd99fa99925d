"""Two paths into the network for the same latents, noised or clean (Show-o2, arXiv:2506.15564, section 3.1).

The semantic path is a tower of SigLIP's blocks over a picture's patches, each seeing the whole picture; the low-level path is one matrix.
Side by side they pass an RMSNorm and an MLP.
"""

from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from stages.parts.config import Count, Epsilon, PartConfig, Ratio, whole_heads
from stages.parts.encoders.clip import Activation, ClipBlock, TowerConfig
from stages.parts.layers import LayerNorm, RMSNorm, init_linear, sincos_2d
from stages.parts.pictures import Grid, through_pictures


class DualPathConfig(PartConfig):
    """Sizes of the semantic path, named as those of SigLIP's tower."""

    for_pictures: ClassVar[bool] = True

    kind: Literal["dual-path"] = "dual-path"
    width: int = Field(ge=4, le=65_536)
    depth: Count
    heads: Count
    mlp_ratio: Ratio = 4.0
    activation: Activation = "gelu-tanh"
    eps: Epsilon = 1e-6

    @model_validator(mode="after")
    def _whole_heads(self) -> Self:
        whole_heads(self.width, self.heads)
        return self

    def build(self, in_dim: int, out_dim: int) -> "DualPath":
        return DualPath(self, in_dim, out_dim)


class DualPath(nn.Module):
    """values (n, in_dim), picture after picture → (n, out_dim)."""

    def __init__(self, config: DualPathConfig, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.config = config
        self.patch, self.low = nn.Linear(in_dim, config.width), nn.Linear(in_dim, out_dim)
        tower = TowerConfig(**config.model_dump())
        self.blocks = nn.ModuleList(ClipBlock(tower) for _ in range(config.depth))
        self.norm_out = LayerNorm(config.width, config.eps)
        self.norm = RMSNorm(config.width + out_dim)
        self.inner, self.outer = nn.Linear(config.width + out_dim, out_dim), nn.Linear(out_dim, out_dim)

    def init_weights(self, generator: Generator) -> None:
        for layer in (self.patch, self.low, self.inner, self.outer):
            init_linear(layer, generator)
        for block in self.blocks:
            assert isinstance(block, ClipBlock)
            block.init_weights(generator, len(self.blocks))
        self.norm_out.init_weights(generator)
        self.norm.init_weights(generator)

    def forward(self, values: Tensor, grids: list[Grid]) -> Tensor:
        both = torch.cat([through_pictures(self.patch(values), grids, self.semantic), self.low(values)], dim=1)
        return self.outer(F.gelu(self.inner(self.norm(both))))

    def semantic(self, x: Tensor, grid: Grid, numbers: list[int]) -> Tensor:
        """Patches (s, l, width) of pictures of one grid → what the tower says of each."""
        x = x + sincos_2d(grid, self.config.width).to(x)
        for block in self.blocks:
            x = block(x, causal=False)
        return self.norm_out(x)
