"""Residual quantization: a latent is the sum of `depth` codes, each the nearest to what the ones before left over.

RQ-VAE, "Autoregressive Image Generation using Residual Quantization", arXiv:2203.01941, section 3.1. All levels share one codebook,
as in the paper, or have one each (SoundStream, arXiv:2107.03312). The commitment loss is of the partial sums (eq. 6):
the mean over the levels of |z - sg(sum so far)|²; so every level moves the encoder. A codebook learned by gradient
is pulled to what was left over, level by level. What is left over is computed without gradients, and one straight-through step at
the end hands the decoder's gradient to the encoder once, not `depth` times.

Codes of all levels are found with the codebook the step began with; a shared codebook then learns from all of them together.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from stages.parts.config import Below1
from stages.parts.quantizers.codebook import CodebookConfig, CodebookQuantizer, nearest_codes
from stages.parts.quantizers.quantizer import MAX_COUNTED, Quantized, straight_through, to_grid, to_rows


class ResidualConfig(CodebookConfig):
    """Sum of `depth` codes (RQ-VAE, arXiv:2203.01941). The defaults are its ImageNet model, 8 x 8 x 4 codes of 16,384."""

    kind: Literal["residual"] = "residual"
    codebook_size: int = Field(default=16384, ge=2, le=MAX_COUNTED)
    decay: Below1 = 0.99
    depth: int = Field(default=4, ge=1, le=64)
    shared: bool = True  # one codebook for all levels

    def code_shape(self, height: int, width: int) -> tuple[int, ...]:
        return self.depth, height, width

    def build(self, in_dim: int) -> "ResidualVQ":
        return ResidualVQ(self, in_dim)


class ResidualVQ(CodebookQuantizer):
    config: ResidualConfig

    def __init__(self, config: ResidualConfig, in_dim: int) -> None:
        super().__init__(config, in_dim, () if config.shared else (config.depth,))

    def table(self, level: int) -> Tensor:
        """(k, d) codebook of a level."""
        return self.codebook if self.config.shared else self.codebook[level]

    def quantize_grid(self, latents: Tensor, generator: Generator | None) -> Quantized:
        b, _, h, w = latents.shape
        latents = to_rows(latents)
        left, total = latents.detach(), torch.zeros_like(latents)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []  # of each level: what was left over, its codes, their vectors
        commitment, codebook = latents.new_zeros(()), latents.new_zeros(())
        for level in range(self.config.depth):
            codes = nearest_codes(left, self.table(level).detach())
            chosen = F.embedding(codes, self.table(level))
            steps.append((left, codes, chosen.detach()))
            codebook = codebook + F.mse_loss(chosen, left)
            total = total + chosen.detach()
            left = left - chosen.detach()
            commitment = commitment + F.mse_loss(latents, total)
        losses = {"commitment": self.config.commitment_weight * commitment / self.config.depth}
        if not self.config.decay:
            losses["codebook"] = codebook / self.config.depth
        if self.training:
            if self.config.shared:
                every, codes, chosen = (torch.cat(parts) for parts in zip(*steps, strict=True))
                self.learn(every, codes, chosen, generator)
            else:
                for level, step in enumerate(steps):
                    self.learn(*step, generator, table=level)
        codes = torch.stack([codes.view(b, h, w) for _, codes, _ in steps], dim=1)
        return Quantized(to_grid(straight_through(total, latents), b, h, w), codes, losses)

    def lookup_grid(self, codes: Tensor, grid: tuple[int, int] | None) -> Tensor:
        b, _, h, w = codes.shape
        total = self.codebook.new_zeros(b * h * w, self.config.dim)
        for level, part in enumerate(codes.unbind(1)):
            total = total + F.embedding(part.flatten(), self.table(level))
        return to_grid(total, b, h, w)
