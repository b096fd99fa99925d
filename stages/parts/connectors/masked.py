"""How pictures with hidden tokens enter a network: a learned vector in the place of each hidden token.

Behind other connectors the model puts a `MaskVector`. The masked encoder is a connector that looks at the whole picture first: MAR's encoder
(arXiv:2406.11838) before a language model, as in Harmon (arXiv:2503.21979, section 3.2) and UniPic (arXiv:2508.03320). What it made of
each token is kept for the head of the same port, which adds the network's output to it.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from stages.parts.config import PartConfig
from stages.parts.layers import LayerNorm, MaskVector, init_linear
from stages.parts.picture_blocks import EPS, BlocksConfig, Grids, PictureBlocks


class MaskedEncoderConfig(BlocksConfig, PartConfig):
    """A transformer over each picture's tokens, hidden ones among them, then two layers with SiLU between them to the network's width."""

    kind: Literal["masked-encoder"] = "masked-encoder"

    def build(self, in_dim: int, out_dim: int) -> "MaskedEncoder":
        return MaskedEncoder(self, in_dim, out_dim)


class MaskedEncoder(nn.Module):
    """values (n, in_dim), hidden bool (n,) or None → vectors (n, out_dim), and the memory (n, width) that goes to the port's head."""

    keeps_memory = True

    def __init__(self, config: MaskedEncoderConfig, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.inner = nn.Linear(in_dim, config.width)
        self.mask = MaskVector(config.width)
        self.norm_in = LayerNorm(config.width, EPS)
        self.blocks = PictureBlocks(config)
        self.up, self.out = nn.Linear(config.width, out_dim), nn.Linear(out_dim, out_dim)

    def init_weights(self, generator: Generator) -> None:
        for part in (self.mask, self.norm_in, self.blocks):
            part.init_weights(generator)
        for layer in (self.inner, self.up, self.out):
            init_linear(layer, generator)

    def forward(self, values: Tensor, grids: Grids, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.inner(values)
        if hidden is not None:
            x = self.mask(x, hidden)
        memory = self.blocks(self.norm_in(x + self.blocks.places(grids).to(x)), grids)
        return self.out(F.silu(self.up(memory))), memory
