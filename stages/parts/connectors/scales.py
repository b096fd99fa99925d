"""Codes that are drawn scale by scale: they enter a network as the picture that the scales before them add up to.

VAR, arXiv:2404.02905, section 3.2 and appendix: the input of a scale is not the codes of the one before but the accumulated map, resized
to the scale's own grid and projected; every place of every scale has a learned vector, every scale one of its own, and the first
scale, before which there is nothing, begins from a learned vector.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from stages.parts.config import PartConfig
from stages.parts.layers import init_linear
from stages.sequence.segment import PortRows


class EmbeddingScalesConfig(PartConfig):
    """One matrix from the width of the codebook's vectors, and the learned vectors of places and scales."""

    kind: Literal["embedding-scales"] = "embedding-scales"

    def build(self, in_dim: int, out_dim: int, sides: Sequence[int]) -> "EmbeddingScales":
        return EmbeddingScales(in_dim, out_dim, sides)


class EmbeddingScales(nn.Module):
    """Maps (n, in_dim) of whole scales → (n, out_dim).

    `places` are learned for square grids of `sides`; for another grid a scale's places are interpolated.
    """

    def __init__(self, in_dim: int, out_dim: int, sides: Sequence[int]) -> None:
        super().__init__()
        self.sides = tuple(sides)
        self.project = nn.Linear(in_dim, out_dim)
        self.start = nn.Parameter(torch.empty(out_dim))
        self.levels = nn.Parameter(torch.empty(len(sides), out_dim))
        self.places = nn.Parameter(torch.empty(sum(side * side for side in sides), out_dim))

    def init_weights(self, generator: Generator) -> None:
        """The learned vectors start at a standard deviation of sqrt(1 / (3 · width)), as released."""
        init_linear(self.project, generator)
        for vectors in (self.start, self.levels, self.places):
            nn.init.normal_(vectors, std=(3 * vectors.shape[-1]) ** -0.5, generator=generator)

    def forward(self, maps: Tensor, rows: PortRows) -> Tensor:
        """Row i of `maps` is of row i of the port. The first scale's map of a picture to be drawn is not looked at."""
        vectors = self.project(maps.to(self.start.dtype))
        scale = torch.tensor(rows.scales, device=maps.device).index_select(0, rows.segment)
        vectors = torch.where(((scale == 0) & rows.target)[:, None], self.start.to(vectors.dtype), vectors)
        return vectors + self.embed_places(rows)

    def embed_places(self, rows: PortRows) -> Tensor:
        """The vectors of each token's place and scale (n, out_dim), through one table of the scales that occur."""
        own, levels = self.places.split([side * side for side in self.sides]), self.levels.unbind()
        firsts: dict[tuple[int, tuple[int, ...]], int] = {}
        tables: list[Tensor] = []
        for scale, grid in dict.fromkeys(zip(rows.scales, rows.grids, strict=True)):
            firsts[scale, grid] = sum(map(len, tables))
            tables.append(levels[scale] + resized(own[scale], self.sides[scale], grid))
        places = [torch.arange(h * w) + firsts[scale, (h, w)] for scale, (h, w) in zip(rows.scales, rows.grids, strict=True)]
        return F.embedding(torch.cat(places).to(self.places.device), torch.cat(tables))


def resized(places: Tensor, side: int, grid: tuple[int, ...]) -> Tensor:
    """Vectors (side², d) of a square grid → (h · w, d) of another, bilinear; the same ones where nothing changes."""
    if grid == (side, side):
        return places
    square = places.view(1, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(square, size=grid, mode="bilinear", align_corners=False).flatten(2).squeeze(0).T


def accumulated_maps(quantizer: Any, rows: PortRows) -> Tensor:
    """The maps (n, d) of all of a port's codes, which are those of whole pictures: `MultiScaleVQ.maps`, picture sizes together."""
    depth = len(quantizer.config.sides)
    pictures = rows.grids[depth - 1 :: depth]  # the last scale's grid is the picture's
    sizes = [sum(h * w for h, w in rows.grids[first : first + depth]) for first in range(0, len(rows.grids), depth)]
    codes, given = rows.values.split(sizes), (~rows.target).split(sizes)
    maps: dict[int, Tensor] = {}
    for grid in dict.fromkeys(pictures):
        own = [number for number, picture in enumerate(pictures) if picture == grid]
        found = quantizer.maps(torch.stack([codes[i] for i in own]), grid, torch.stack([given[i][0] for i in own]))
        maps |= dict(zip(own, found, strict=True))
    return torch.cat([maps[number] for number in range(len(pictures))])
