"""Index backpropagation quantization: gradients reach every code through the softmax over all of them (IBQ, arXiv:2412.02692, section 3.2).

A latent z moves to the code e with the largest ⟨z, e⟩. Forwards that is a one-hot choice, backwards the softmax of the products takes
its place (eq. 4), so the decoder's gradient moves all codes towards being chosen where they help: the codebook stays in use
without revival at sizes where plain VQ collapses. Losses, as in the published code: |z_q - z|², whose gradient flows through
the softmax too, the commitment |z - sg(e)|², and `codebook_weight` · |e - sg(z)|². The entropy loss is E H(p) - H(E p) in nats of
p = softmax(⟨z, e⟩ / temperature).

All k products of a latent are needed again in the backward pass. They are computed there once more, block by block, so that
memory does not grow with n · k. Shape letters: n latents · d width · k codebook size.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from stages import ranks
from stages.parts.config import Positive, Size, Weight
from stages.parts.quantizers.quantizer import MAX_COUNTED, Quantizer, QuantizerConfig

BLOCK_NUMBERS = 1 << 22  # products kept at once: 16 MB


class IBQConfig(QuantizerConfig):
    """Codebook trained through its softmax (IBQ, arXiv:2412.02692)."""

    kind: Literal["ibq"] = "ibq"
    codebook_size: int = Field(default=16384, ge=2, le=MAX_COUNTED)
    codebook_dim: Size = 256
    codebook_weight: Weight = 0.25
    entropy_weight: Weight = 0.05
    temperature: Positive = 0.01  # of the entropy loss

    @property
    def size(self) -> int:
        return self.codebook_size

    @property
    def dim(self) -> int:
        return self.codebook_dim

    def build(self, in_dim: int) -> "IBQ":
        return IBQ(self, in_dim)


class IBQ(Quantizer):
    def __init__(self, config: IBQConfig, in_dim: int) -> None:
        super().__init__(config, in_dim)
        self.config = config
        self.codebook = nn.Parameter(torch.randn(config.size, config.dim))

    def assign(self, rows: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        blocks = [self.assign_block(part) for part in rows.split(self.block)]
        codes, soft = torch.cat([codes for codes, _ in blocks]), torch.cat([soft for _, soft in blocks])
        self.count(rows, codes)
        chosen = self.vectors(codes)
        vectors = chosen + (soft - soft.detach())
        losses = {
            "quantization": F.mse_loss(vectors, rows),
            "commitment": F.mse_loss(rows, chosen.detach()),
            "codebook": self.config.codebook_weight * F.mse_loss(chosen, rows.detach()),
        }
        if self.config.entropy_weight and self.training:
            losses["entropy"] = self.config.entropy_weight * self.entropy(rows)
        return vectors, codes, losses

    def vectors(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook)

    @property
    def block(self) -> int:
        """Latents whose products with all codes are in memory at once."""
        return max(1, BLOCK_NUMBERS // self.codebook_size)

    def assign_block(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) codes, and (n, d) softmax means of codes; only the probabilities in them carry gradients, the codes do not."""
        return recomputed(_chosen_and_mean, rows, self.codebook)

    def entropy(self, rows: Tensor) -> Tensor:
        """E H(p) - H(E p), in nats. E p is over the latents of all ranks."""
        everyone = ranks.gathered_rows(rows)
        parts = [recomputed(_entropies_and_shares, part, self.codebook / self.config.temperature) for part in everyone.split(self.block)]
        own, mean = (torch.stack(column).sum(0) / len(everyone) for column in zip(*parts, strict=True))
        return own + (mean * mean.clamp(min=1e-12).log()).sum()


def recomputed(function, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """`function(*inputs)`, computed again in the backward pass rather than kept for it."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _chosen_and_mean(rows: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    products = rows @ codebook.t()
    return products.argmax(1), products.softmax(1) @ codebook.detach()


def _entropies_and_shares(rows: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """() sum of the entropies and (k,) sum of the probabilities of n latents."""
    log_probabilities = (rows @ codebook.t()).log_softmax(1)
    probabilities = log_probabilities.exp()
    return -(probabilities * log_probabilities).sum(), probabilities.sum(0)
