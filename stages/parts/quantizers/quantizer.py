"""What every quantizer promises: `lookup(quantize(z).codes)` is `quantize(z).quantized`, bit for bit, and gradients pass straight through.

Latents are projected to the width of the codes, moved to their codes there, and projected back. Codes of a grid are (b, h, w) where
each latent has one, (b, depth, h, w) where several add up to it, (b, n) where they are those of coarser grids too.

Everything happens in float32, outside autocast: in bfloat16, 1 to 6 % of the codes would change. Shape letters: b batch · d width of
the latents · h w grid · n latents in a row · k codebook size.
"""

from dataclasses import dataclass, field, replace

import torch
from pydantic import Field, field_validator
from torch import Generator, Tensor, nn

from stages import ranks
from stages.errors import RecipeError
from stages.parts.config import PartConfig

USAGE_DECAY = 0.99  # of the running counts
MAX_COUNTED = 1 << 20  # codes; of larger codebooks nobody counts the uses


@dataclass(frozen=True)
class Quantized:
    """Latents moved to their codes. `losses` are scalars that carry their weights already."""

    quantized: Tensor  # (b, d, h, w)
    codes: Tensor  # (b, *code_shape), int64
    losses: dict[str, Tensor] = field(default_factory=dict)


class QuantizerConfig(PartConfig):
    """Settings of a quantizer; `build(in_dim)` gives the module for latents of that width."""

    project: bool = True  # convolutions from the latents to the codes' width and back; without, latents have that width already
    kernel_size: int = Field(default=1, ge=1, le=31)  # of those convolutions: 3 in VAR
    min_perplexity: float = Field(default=0.0, ge=0, le=MAX_COUNTED)  # training stops where the codebook falls below

    @field_validator("kernel_size")
    @classmethod
    def _kernel_is_odd(cls, size: int) -> int:
        if size % 2 == 0:
            raise ValueError("a kernel that keeps the grid has an odd size")
        return size

    @property
    def size(self) -> int:
        """Number of codes, k."""
        raise NotImplementedError

    @property
    def dim(self) -> int:
        """Width of the vector a code stands for."""
        raise NotImplementedError

    def code_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the codes of a grid of latents."""
        return height, width

    def build(self, in_dim: int) -> "Quantizer":
        raise NotImplementedError


class Quantizer(nn.Module):
    """Subclasses say which vector each row of projected latents moves to: `assign`, and its inverse `vectors`."""

    counts: Tensor  # running number of latents each code won in a step: (k,), or (tables, k) where there are several codebooks

    def __init__(self, config: QuantizerConfig, in_dim: int, tables: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.codebook_size = config.size
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if config.project:
            padding = config.kernel_size // 2
            self.project_in = nn.Conv2d(in_dim, config.dim, config.kernel_size, padding=padding)
            self.project_out = nn.Conv2d(config.dim, in_dim, config.kernel_size, padding=padding)
        elif in_dim != config.dim:
            raise RecipeError(f"'{config.kind}' with project = false: its codes have width {config.dim}, the latents {in_dim}")
        if config.size <= MAX_COUNTED:
            self.register_buffer("counts", torch.zeros(*tables, config.size))
        elif config.min_perplexity:
            raise RecipeError(f"'{config.kind}': min_perplexity needs counts, and those of {config.size:,} codes are not kept")

    def quantize(self, latents: Tensor, generator: Generator | None = None) -> Quantized:
        """Nearest codes of (b, d, h, w) latents. In training mode the codebook may learn; what it draws comes from `generator`."""
        with torch.autocast(latents.device.type, enabled=False):
            found = self.quantize_grid(self.project_in(latents.float()), generator)
            return replace(found, quantized=self.project_out(found.quantized))

    def lookup(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(b, *code_shape) codes → (b, d, h, w) latents. `grid` says (h, w) where the codes do not; the square one if not given."""
        with torch.autocast(codes.device.type, enabled=False):
            return self.project_out(self.lookup_grid(codes, grid))

    def quantize_grid(self, latents: Tensor, generator: Generator | None) -> Quantized:
        """`quantize` between the projections."""
        b, _, h, w = latents.shape
        vectors, codes, losses = self.assign(to_rows(latents), generator)
        return Quantized(to_grid(vectors, b, h, w), codes.view(b, h, w), losses)

    def lookup_grid(self, codes: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """`lookup` before the projection."""
        return to_grid(self.vectors(codes.flatten()), *codes.shape)

    def assign(self, rows: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(n, d) latents → (n, d) vectors of their codes with the latents' gradient, (n,) codes, losses."""
        raise NotImplementedError

    def vectors(self, codes: Tensor) -> Tensor:
        """(n,) codes → (n, d) vectors."""
        raise NotImplementedError

    def health(self) -> dict[str, float]:
        """What lately was used of the codebook: its `perplexity`, and how many codes are `dead`. Nothing where nothing is counted.

        Dead are codes that win less than 1 % of a fair share. Both are of running counts, over some hundred steps. Of several codebooks
        the perplexity is the mean of theirs.
        """
        if self.codebook_size > MAX_COUNTED:
            return {}
        share = self.counts / self.counts.sum(-1, keepdim=True).clamp(min=1e-12)
        entropy = -(share * share.clamp(min=1e-12).log()).sum(-1)
        return {"perplexity": float(entropy.exp().mean()), "dead": float((share * self.codebook_size < 0.01).sum())}

    @torch.no_grad()
    def count(self, rows: Tensor, codes: Tensor, decay: float = USAGE_DECAY) -> None:
        """Note in the running counts what the (n, d) latents of one step, on all ranks, were moved to."""
        if self.training and self.codebook_size <= MAX_COUNTED:
            won = self.won(rows, codes)
            if won is not None:
                self.counts.lerp_(won, 1 - decay)

    def won(self, rows: Tensor, codes: Tensor) -> Tensor | None:
        """(k,) how many of the latents of all ranks each code won; None if one is not finite: that step is refused, nothing learns of it."""
        finite = torch.isfinite(rows).all()
        ones = torch.where(finite, 1.0, torch.nan).expand(len(codes))  # one rank's nan tells all ranks
        won = ranks.summed(torch.zeros(self.codebook_size, device=rows.device).index_add_(0, codes, ones))
        return won if torch.isfinite(won).all() else None


def to_rows(latents: Tensor) -> Tensor:
    """(b, d, h, w) → (b · h · w, d)."""
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])


def to_grid(rows: Tensor, b: int, h: int, w: int) -> Tensor:
    """(b · h · w, d) → (b, d, h, w)."""
    return rows.view(b, h, w, -1).permute(0, 3, 1, 2)


def straight_through(values: Tensor, latents: Tensor) -> Tensor:
    """`values`, with the gradient of `latents`: `latents - latents` is exactly zero, so not one bit of the values changes."""
    return values.detach() + (latents - latents.detach())
