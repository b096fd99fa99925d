"""Vector quantization: every latent moves to the nearest of k learned vectors (VQ-VAE, arXiv:1711.00937; EMA codebook: its appendix A.1).

Gradients pass straight through to the encoder. The codebook learns either by gradient (`decay = 0`: the codebook loss pulls each
code to its latents) or as the running mean of the latents it won (`decay` > 0, exact k-means in the limit). The commitment loss
pulls latents to their code. Published code disagrees about where the factor 0.25 belongs: here, as in the paper, it weights the
commitment. With `revive` (on unless it is 0), codes that win less than that fraction of their fair share are moved onto latents of the batch that are
badly served, drawn in proportion to their squared distance as k-means++ draws its seeds; counts start at zero, so the first batches
place the whole codebook.

Everything happens in float32, outside autocast: in bfloat16, 1 to 6 % of the codes would change. Shape letters: n latents · d width
· k codebook size.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from stages import ranks
from stages.parts.quantizers.quantizer import Quantized, Quantizer, QuantizerConfig

USAGE_DECAY = 0.99  # of the running counts, when the codebook itself is learned by gradient
BLOCK_NUMBERS = 1 << 18  # distances computed at once: 1 MB, which stays in the cache


class VQConfig(QuantizerConfig):
    """Nearest-neighbour codebook (arXiv:1711.00937). `l2_normalize` compares directions only (ViT-VQGAN, arXiv:2110.04627)."""

    kind: Literal["vq"] = "vq"
    codebook_size: int = Field(default=1024, ge=2)
    codebook_dim: int = Field(default=256, ge=1)
    commitment_weight: float = Field(default=0.25, ge=0)
    decay: float = Field(default=0.0, ge=0, lt=1)
    l2_normalize: bool = False
    revive: float = Field(default=0.01, ge=0, lt=1)
    min_perplexity: float = Field(default=0.0, ge=0)  # training stops where the codebook falls below

    @property
    def size(self) -> int:
        return self.codebook_size

    def build(self, in_dim: int) -> "VQ":
        return VQ(self, in_dim)


class VQ(Quantizer):
    codebook: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, config: VQConfig, in_dim: int) -> None:
        super().__init__()
        self.config = config
        self.codebook_size = config.codebook_size
        size, dim = config.codebook_size, config.codebook_dim
        self.project_in = nn.Conv2d(in_dim, dim, 1)
        self.project_out = nn.Conv2d(dim, in_dim, 1)
        codebook = torch.empty(size, dim).uniform_(-1 / size, 1 / size)
        if config.l2_normalize:
            codebook = F.normalize(torch.randn(size, dim), dim=-1)
        if config.decay:
            self.register_buffer("codebook", codebook)
            self.register_buffer("sums", torch.zeros(size, dim))  # running sum of the latents each code won
        else:
            self.codebook = nn.Parameter(codebook)
        self.register_buffer("counts", torch.zeros(size))  # running number of latents each code won in a step

    def codes_to_use(self) -> Tensor:
        """(k, d) codebook as compared and looked up: of unit length when l2_normalize."""
        return F.normalize(self.codebook, dim=-1) if self.config.l2_normalize else self.codebook

    def quantize(self, latents: Tensor, generator: Generator | None = None) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            projected = self.project_in(latents.float())
            b, d, h, w = projected.shape
            rows = projected.permute(0, 2, 3, 1).reshape(-1, d)
            if self.config.l2_normalize:
                rows = F.normalize(rows, dim=-1)
            codebook = self.codes_to_use()
            codes = nearest_codes(rows.detach(), codebook.detach())
            chosen = F.embedding(codes, codebook)
            losses = {"commitment": self.config.commitment_weight * F.mse_loss(rows, chosen.detach())}
            if not self.config.decay:
                losses["codebook"] = F.mse_loss(chosen, rows.detach())
            # `rows - rows` is exactly zero, so the value is the code's and the gradient is the identity
            straight = chosen.detach() + (rows - rows.detach())
            if self.training:
                self._follow(rows.detach(), codes, chosen.detach(), generator)
            quantized = self.project_out(straight.view(b, h, w, d).permute(0, 3, 1, 2))
        return Quantized(quantized, codes.view(b, h, w), losses)

    def lookup(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        with torch.autocast(codes.device.type, enabled=False):
            return self.project_out(F.embedding(codes, self.codes_to_use()).permute(0, 3, 1, 2))

    def health(self) -> dict[str, float]:
        """Dead are codes that win less than 1 % of a fair share. Both are of running counts, over some hundred steps."""
        share = self.counts / self.counts.sum().clamp(min=1e-12)
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        return {"perplexity": float(entropy.exp()), "dead": float((share * self.codebook_size < 0.01).sum())}

    @torch.no_grad()
    def _follow(self, rows: Tensor, codes: Tensor, chosen: Tensor, generator: Generator | None) -> None:
        """Update the running counts, an EMA codebook, and codes that have died, from the (n, d) latents of one step, on all ranks."""
        size, decay = self.codebook_size, self.config.decay or USAGE_DECAY
        rows, codes, chosen = ranks.gathered_rows(rows), ranks.gathered_rows(codes), ranks.gathered_rows(chosen)
        won = torch.zeros(size, device=rows.device).index_add_(0, codes, torch.ones(len(codes), device=rows.device))
        if not torch.isfinite(rows).all():
            return  # the step will be refused; the codebook must not have learned from it
        self.counts.lerp_(won, 1 - decay)
        if self.config.decay:
            self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, codes, rows), 1 - decay)
            # a code that wins nothing keeps its place: its sum and its count fade together
            mean = self.sums / self.counts.clamp(min=1e-12).unsqueeze(1)
            self.codebook.copy_(torch.where(self.counts.unsqueeze(1) > 1e-6, mean, self.codebook))
            if self.config.l2_normalize:
                self.codebook.copy_(F.normalize(self.codebook, dim=-1))
        if self.config.revive:
            if generator is None:
                raise ValueError("a codebook that revives dead codes draws them: quantize needs a generator while training")
            fair = won.sum() / size
            dead = (self.counts < self.config.revive * fair).unsqueeze(1)
            badness = (rows - chosen).square().sum(1) + 1e-12
            drawn = torch.multinomial(badness.to(generator.device), size, replacement=True, generator=generator)
            drawn = ranks.from_first(drawn)
            seeds = rows.index_select(0, drawn.to(rows.device))
            self.codebook.copy_(torch.where(dead, seeds, self.codebook))
            self.counts.copy_(torch.where(dead.squeeze(1), fair, self.counts))
            if self.config.decay:
                self.sums.copy_(torch.where(dead, seeds * fair, self.sums))


def nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """(n,) index of the nearest of (k, d) codes to each of (n, d) latents; of equally near ones, the first.

    |z - e|² = |z|² + 2 (|e|²/2 - z·e), and the first term does not matter, so one matrix product with a bias decides. It is done
    in blocks whose distances fit the cache.
    """
    bias = codebook.square().sum(1) / 2
    table = codebook.t()
    block = max(1, BLOCK_NUMBERS // len(codebook))
    return torch.cat([torch.addmm(bias, part, table, alpha=-1).argmin(1) for part in latents.split(block)])
