"""A head that is a small denoiser: an MLP that removes the noise from one token, given the hidden row of that token.

MAR's `DiffLoss` network (arXiv:2406.11838, section 3 and appendix): residual blocks whose norm is modulated (adaptive layer norm, DiT,
arXiv:2212.09748) by the sum of the noise level and the condition z. Tokens are independent given z, so the loop that denoises them runs
in this head alone. With a `decoder`, z first passes MAR's decoder, blocks over all tokens of the picture; the rows of the network are
added to what the connector kept of them (Harmon, arXiv:2503.21979, section 3.2).
"""

from typing import Literal

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from stages.parts.config import Count, PartConfig, Size
from stages.parts.layers import LayerNorm, TimestepEmbedding, init_linear
from stages.parts.picture_blocks import EPS, BlocksConfig, Grids, PictureBlocks


class DiffusionMLPConfig(PartConfig):
    """`width` and `depth` of the MLP. `decoder`: blocks over the picture between the network and the MLP."""

    kind: Literal["diffusion-mlp"] = "diffusion-mlp"
    width: Size
    depth: Count = 3
    decoder: BlocksConfig | None = None

    def build(self, in_dim: int, out_dim: int, tied_to: nn.Module | None = None) -> "DiffusionHead":
        return DiffusionHead(self, in_dim, out_dim)


class DiffusionHead(nn.Module):
    """`condition` once a pass of the network, then `forward` for every noise level: noisy (k, c), t (k,), z (k, w) → prediction (k, c)."""

    def __init__(self, config: DiffusionMLPConfig, in_dim: int, channels: int) -> None:
        super().__init__()
        self.decoder = PictureDecoder(config.decoder, in_dim) if config.decoder is not None else None
        z_dim = in_dim if config.decoder is None else config.decoder.width
        self.inner, self.condition_in = nn.Linear(channels, config.width), nn.Linear(z_dim, config.width)
        self.timestep = TimestepEmbedding(config.width)
        self.blocks = nn.ModuleList(ModulatedMLP(config.width) for _ in range(config.depth))
        self.modulation_out = nn.Linear(config.width, 2 * config.width)
        self.outer = nn.Linear(config.width, channels)

    def init_weights(self, generator: Generator) -> None:
        """Modulations and the last layer start at zero, as DiT's do: the first prediction is zero."""
        if self.decoder is not None:
            self.decoder.init_weights(generator)
        for layer in (self.inner, self.condition_in):
            init_linear(layer, generator)
        self.timestep.init_weights(generator)
        for block in self.blocks:
            assert isinstance(block, ModulatedMLP)
            block.init_weights(generator)
        init_linear(self.modulation_out, generator, zero=True)
        init_linear(self.outer, generator, zero=True)

    def condition(self, hidden: Tensor, grids: Grids, memory: Tensor | None = None) -> Tensor:
        """The network's rows (n, d) of whole pictures → what tokens are denoised by (n, w)."""
        return hidden if self.decoder is None else self.decoder(hidden, grids, memory)

    def forward(self, noisy: Tensor, t: Tensor, z: Tensor) -> Tensor:
        x = self.inner(noisy)
        by = F.silu(self.timestep(t) + self.condition_in(z))
        for block in self.blocks:
            x = block(x, by)
        shift, scale = self.modulation_out(by).chunk(2, dim=-1)
        return self.outer(modulated(F.layer_norm(x, x.shape[-1:], eps=EPS), shift, scale))


class ModulatedMLP(nn.Module):
    """x + gate · mlp(modulated norm x); shift, scale and gate are linear in `by` (k, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width, EPS)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def init_weights(self, generator: Generator) -> None:
        self.norm.init_weights(generator)
        init_linear(self.up, generator)
        init_linear(self.down, generator)
        init_linear(self.modulation, generator, zero=True)

    def forward(self, x: Tensor, by: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(by).chunk(3, dim=-1)
        return x + gate * self.down(F.silu(self.up(modulated(self.norm(x), shift, scale))))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class PictureDecoder(nn.Module):
    """hidden (n, d), memory (n, w) or None → (n, w): memory plus the network's rows, through blocks over each picture."""

    def __init__(self, config: BlocksConfig, in_dim: int) -> None:
        super().__init__()
        self.up, self.into = nn.Linear(in_dim, in_dim), nn.Linear(in_dim, config.width)
        self.inner = nn.Linear(config.width, config.width)
        self.blocks = PictureBlocks(config)

    def init_weights(self, generator: Generator) -> None:
        for layer in (self.up, self.into, self.inner):
            init_linear(layer, generator)
        self.blocks.init_weights(generator)

    def forward(self, hidden: Tensor, grids: Grids, memory: Tensor | None) -> Tensor:
        x = self.into(F.silu(self.up(hidden)))
        x = self.inner(x if memory is None else memory + x)
        return self.blocks(x + self.blocks.places(grids).to(x), grids)
