"""Multi-scale residual quantization: a grid of latents as a row of ever finer grids of codes that add up to it.

VAR, "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction", arXiv:2404.02905, section 3.2 and
algorithms 1 and 2. At each scale what is left over is averaged down to the scale's grid, moved to the nearest codes of one codebook,
brought back to full size by bicubic interpolation and a convolution φ, and subtracted. φ(x) = (1 - ratio) x + ratio · conv3×3(x); a few
of them are shared by all scales, each scale taking the one nearest to its place in the row. The losses are means over the scales
of the distance between latents and partial sums: weighted towards the latents (commitment), and in full towards codes and φ (codebook).

`sides` are published for a square grid as large as the last of them. For another grid every scale keeps its proportion to
the last, rounded, at least 1; codes are in the order of scales, each row by row.
"""

import itertools
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Generator, Tensor, nn

from stages.errors import DataError
from stages.parts.config import Count, Fraction, Pixels, Size
from stages.parts.quantizers.codebook import CodebookConfig, CodebookQuantizer, nearest_codes
from stages.parts.quantizers.quantizer import MAX_COUNTED, Quantized, straight_through, to_grid, to_rows


class MultiScaleConfig(CodebookConfig):
    """Codes of ever finer grids (VAR, arXiv:2404.02905). The defaults are its tokenizer for 16 x 16 latents: 680 codes."""

    kind: Literal["multi-scale"] = "multi-scale"
    codebook_size: int = Field(default=4096, ge=2, le=MAX_COUNTED)
    codebook_dim: Size = 32
    kernel_size: int = Field(default=3, ge=1, le=31)
    sides: tuple[Pixels, ...] = Field(default=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), min_length=1, max_length=64)
    phis: Count = 4
    phi_ratio: Fraction = 0.5

    @field_validator("sides")
    @classmethod
    def _sides_grow(cls, sides: tuple[int, ...]) -> tuple[int, ...]:
        if sides[0] < 1 or any(later <= earlier for earlier, later in itertools.pairwise(sides)):
            raise ValueError("sides must grow from 1 or more")
        return sides

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of each scale of a grid of latents; the last is the grid itself."""
        last = self.sides[-1]
        return [(max(1, (2 * height * side + last) // (2 * last)), max(1, (2 * width * side + last) // (2 * last))) for side in self.sides]

    def code_shape(self, height: int, width: int) -> tuple[int, ...]:
        return (sum(rows * columns for rows, columns in self.grids(height, width)),)

    def square_grid(self, length: int) -> tuple[int, int]:
        """The square grid of latents with that many codes. DataError if there is none."""
        side = 1
        while self.code_shape(side, side)[0] < length:
            side += 1
        if self.code_shape(side, side)[0] != length:
            raise DataError(f"{length:,} codes are not those of a square grid", hint="say which grid of latents they describe")
        return side, side

    def build(self, in_dim: int) -> "MultiScaleVQ":
        return MultiScaleVQ(self, in_dim)


class MultiScaleVQ(CodebookQuantizer):
    config: MultiScaleConfig

    def __init__(self, config: MultiScaleConfig, in_dim: int) -> None:
        super().__init__(config, in_dim)
        self.phi = nn.ModuleList(nn.Conv2d(config.dim, config.dim, 3, padding=1) for _ in range(config.phis))

    def quantize_grid(self, latents: Tensor, generator: Generator | None) -> Quantized:
        left = latents.detach()
        total = torch.zeros_like(left, memory_format=torch.contiguous_format)
        scales = self.config.grids(*left.shape[2:])
        steps: list[tuple[Tensor, Tensor]] = []  # of each scale: what was left over, and its codes
        commitment, codebook = left.new_zeros(()), left.new_zeros(())
        for number, grid in enumerate(scales):
            rows = to_rows(F.interpolate(left, size=grid, mode="area"))
            codes = nearest_codes(rows, self.codebook.detach())
            steps.append((rows, codes))
            part = self.part(codes.view(len(left), -1), number, grid, scales[-1])
            total, left = total + part, left - part.detach()
            commitment = commitment + F.mse_loss(latents, total.detach())
            codebook = codebook + F.mse_loss(total, latents.detach())
        losses = {"commitment": self.config.commitment_weight * commitment / len(scales), "codebook": codebook / len(scales)}
        if self.training:
            rows, codes = (torch.cat(parts) for parts in zip(*steps, strict=True))
            self.learn(rows, codes, F.embedding(codes, self.codebook.detach()), generator)
        return Quantized(straight_through(total, latents), torch.cat([codes.view(len(left), -1) for _, codes in steps], dim=1), losses)

    def lookup_grid(self, codes: Tensor, grid: tuple[int, int] | None) -> Tensor:
        scales = self.config.grids(*(grid or self.config.square_grid(codes.shape[1])))
        sizes = [rows * columns for rows, columns in scales]
        if sum(sizes) != codes.shape[1]:
            raise DataError(f"a grid of {scales[-1][0]} x {scales[-1][1]} latents has {sum(sizes):,} codes, found {codes.shape[1]:,}")
        total = self.codebook.new_zeros(len(codes), self.config.dim, *scales[-1])
        for number, (part, scale) in enumerate(zip(codes.split(sizes, dim=1), scales, strict=True)):
            total = total + self.part(part, number, scale, scales[-1])
        return total

    def part(self, codes: Tensor, number: int, grid: tuple[int, int], full: tuple[int, int]) -> Tensor:
        """What the (b, n) codes of one scale add to the full (b, d, h, w) grid."""
        vectors = to_grid(F.embedding(codes.flatten(), self.codebook), len(codes), *grid).contiguous()
        if number < len(self.config.sides) - 1:
            vectors = F.interpolate(vectors, size=full, mode="bicubic")
        ratio = self.config.phi_ratio
        return (1 - ratio) * vectors + ratio * self.phi[self.phi_of(number)](vectors)

    def phi_of(self, number: int) -> int:
        """Which φ a scale takes: the nearest of ticks spread over [0, 1], as the published code spreads them, to its place in the row.

        Of ten scales two lie halfway between ticks, so it is that code's float64 rounding which decides for them.
        """
        phis, place = self.config.phis, number / max(1, len(self.config.sides) - 1)
        margin = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
        return int(np.abs(np.linspace(margin, 1 - margin, phis) - place).argmin())

    def map_for(self, total: Tensor, grid: tuple[int, int]) -> Tensor:
        """The (b, d, h, w) sum of coarser scales as a scale of that grid is shown it: averaged over its cells, rows (b, n, d)."""
        return F.interpolate(total, size=grid, mode="area").flatten(2).transpose(1, 2)

    @torch.no_grad()
    def maps(self, codes: Tensor, grid: tuple[int, int], given: Tensor) -> Tensor:
        """What a network is shown in the places of (b, n) codes: (b, n, d), in float32 outside autocast.

        Of a picture to be drawn, the sum of all scales before a code's own (VAR, algorithm 2; zeros for the first), so that the code can
        be predicted there; of one that is `given` (bool (b,)), the sum with its own scale, so that nothing of the picture is missing.
        """
        with torch.autocast(codes.device.type, enabled=False):
            scales = self.config.grids(*grid)
            total = self.codebook.new_zeros(len(codes), self.config.dim, *grid)
            shown: list[Tensor] = []
            for number, (own, scale) in enumerate(zip(codes.split([h * w for h, w in scales], dim=1), scales, strict=True)):
                before, total = total, total + self.part(own, number, scale, grid)
                shown.append(self.map_for(torch.where(given[:, None, None, None], total, before), scale))
            return torch.cat(shown, dim=1)
