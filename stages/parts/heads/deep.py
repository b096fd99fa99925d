"""A head with blocks of its own: the tokens of a picture attend to each other once more, modulated by the noise level (Show-o2,
arXiv:2506.15564, section 3.1; the modulation is DiT's adaLN-zero, arXiv:2212.09748, section 3.2).

Shapes: s pictures of one grid · l tokens · d width.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from stages.parts.config import Count, PartConfig, Ratio, whole_heads
from stages.parts.layers import TimestepEmbedding, init_linear
from stages.parts.pictures import Grid, first_of_each, through_pictures


class DeepHeadConfig(PartConfig):
    """`depth` modulated blocks at the network's width, then a modulated linear layer."""

    for_pictures: ClassVar[bool] = True

    kind: Literal["deep"] = "deep"
    depth: Count = 10
    heads: Count = 16
    mlp_ratio: Ratio = 4.0

    def build(self, in_dim: int, out_dim: int, tied_to: nn.Module | None = None) -> "DeepHead":
        return DeepHead(self, in_dim, out_dim)


class ModulatedBlock(nn.Module):
    """x + gate · attention(shifted and scaled norm x), then x + gate · mlp(shifted and scaled norm x); shifts, scales and gates are a
    linear function of the condition, zero at the start."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def init_weights(self, generator: Generator) -> None:
        init_linear(self.modulation, generator, zero=True)
        for layer in (self.qkv, self.out, self.up, self.down):
            init_linear(layer, generator)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (s, l, d), condition (s, d) → (s, l, d)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, dim=-1)
        qkv = self.qkv(modulated(x, shift, scale)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + gate * self.out(attended)
        return x + mlp_gate * self.down(F.gelu(self.up(modulated(x, mlp_shift, mlp_scale)), approximate="tanh"))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) · (1 + scale) + shift."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class DeepHead(nn.Module):
    """hidden (n, in_dim), picture after picture, with their grids and each token's noise level (n,) → (n, out_dim)."""

    sees_pictures = True

    def __init__(self, config: DeepHeadConfig, in_dim: int, out_dim: int) -> None:
        super().__init__()
        whole_heads(in_dim, config.heads)
        self.time = TimestepEmbedding(in_dim)
        self.blocks = nn.ModuleList(ModulatedBlock(in_dim, config.heads, round(config.mlp_ratio * in_dim)) for _ in range(config.depth))
        self.modulation, self.outer = nn.Linear(in_dim, 2 * in_dim), nn.Linear(in_dim, out_dim)

    def init_weights(self, generator: Generator) -> None:
        """The last layer starts at zero too, so that the first prediction is zero."""
        self.time.init_weights(generator)
        for block in self.blocks:
            assert isinstance(block, ModulatedBlock)
            block.init_weights(generator)
        init_linear(self.modulation, generator, zero=True)
        init_linear(self.outer, generator, zero=True)

    def forward(self, hidden: Tensor, grids: list[Grid], timestep: Tensor) -> Tensor:
        def part(x: Tensor, grid: Grid, numbers: list[int]) -> Tensor:
            condition = self.time(levels.index_select(0, torch.tensor(numbers, device=levels.device)))
            for block in self.blocks:
                x = block(x, condition)
            shift, scale = self.modulation(F.silu(condition)).unsqueeze(1).chunk(2, dim=-1)
            return self.outer(modulated(x, shift, scale))

        levels = first_of_each(timestep, grids)
        return through_pictures(hidden, grids, part)
