"""A head that mirrors the `convnext` connector: norm, one matrix, ConvNeXt blocks over each picture, one matrix (JanusFlow's light decoder,
arXiv:2411.07975, section 3.2)."""

from typing import ClassVar, Literal

from torch import Generator, Tensor, nn

from stages.parts.config import Count, PartConfig, Size
from stages.parts.connectors.convnext import ConvNeXtIn
from stages.parts.layers import LayerNorm
from stages.parts.pictures import Grid


class ConvNeXtHeadConfig(PartConfig):
    """`depth` blocks `dim` channels wide, the network's width unless written."""

    for_pictures: ClassVar[bool] = True

    kind: Literal["convnext"] = "convnext"
    depth: Count = 2
    dim: Size | None = None

    def build(self, in_dim: int, out_dim: int, tied_to: nn.Module | None = None) -> "ConvNeXtHead":
        return ConvNeXtHead(in_dim, self.dim or in_dim, out_dim, self.depth)


class ConvNeXtHead(nn.Module):
    """hidden (n, in_dim), picture after picture, with their grids → (n, out_dim); the noise level is in what it is shown."""

    sees_pictures = True

    def __init__(self, in_dim: int, dim: int, out_dim: int, depth: int) -> None:
        super().__init__()
        self.norm = LayerNorm(in_dim)
        self.decoder = ConvNeXtIn(in_dim, dim, out_dim, depth)

    def init_weights(self, generator: Generator) -> None:
        self.norm.init_weights(generator)
        self.decoder.init_weights(generator)

    def forward(self, hidden: Tensor, grids: list[Grid], timestep: Tensor) -> Tensor:
        return self.decoder(self.norm(hidden), grids)
