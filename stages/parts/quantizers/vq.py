"""Vector quantization: every latent moves to the nearest of k learned vectors (VQ-VAE, arXiv:1711.00937).

Gradients pass straight through to the encoder. The codebook learns either by gradient (`decay = 0`: the codebook loss pulls each
code to its latents) or as the running mean of the latents it won (codebook.py). The commitment loss pulls latents to their code.
Published code disagrees about where the factor 0.25 belongs: here, as in the paper, it weights the commitment.

Shape letters: n latents · d width · k codebook size.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Generator, Tensor

from stages.parts.quantizers.codebook import CodebookConfig, CodebookQuantizer, nearest_codes
from stages.parts.quantizers.quantizer import straight_through


class VQConfig(CodebookConfig):
    """Nearest-neighbour codebook (arXiv:1711.00937). `l2_normalize` compares directions only (ViT-VQGAN, arXiv:2110.04627)."""

    kind: Literal["vq"] = "vq"
    l2_normalize: bool = False

    def build(self, in_dim: int) -> "VQ":
        return VQ(self, in_dim, unit_length=self.l2_normalize)


class VQ(CodebookQuantizer):
    def codes_to_use(self) -> Tensor:
        """(k, d) codebook as compared: of unit length when l2_normalize."""
        return F.normalize(self.codebook, dim=-1) if self.unit_length else self.codebook

    def assign(self, rows: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if self.unit_length:
            rows = F.normalize(rows, dim=-1)
        codes = nearest_codes(rows.detach(), self.codes_to_use().detach())
        chosen = self.vectors(codes)
        losses = {"commitment": self.config.commitment_weight * F.mse_loss(rows, chosen.detach())}
        if not self.config.decay:
            losses["codebook"] = F.mse_loss(chosen, rows.detach())
        if self.training:
            self.learn(rows.detach(), codes, chosen.detach(), generator)
        return straight_through(chosen, rows), codes, losses

    def vectors(self, codes: Tensor) -> Tensor:
        chosen = F.embedding(codes, self.codebook)
        return F.normalize(chosen, dim=-1) if self.unit_length else chosen
