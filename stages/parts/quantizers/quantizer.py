"""What every quantizer promises: `lookup(quantize(z).codes)` is `quantize(z).quantized`, bit for bit, and gradients pass straight through.

Codes of a grid are (b, h, w) where each latent has one, (b, depth, h, w) where several add up to it, (b, n) where they are those of
coarser grids too. Shape letters: b batch · d width of the latents · h w grid · k codebook size.
"""

from dataclasses import dataclass, field

from torch import Generator, Tensor, nn

from stages.parts.config import PartConfig


@dataclass(frozen=True)
class Quantized:
    """Latents moved to their codes. `losses` are scalars that carry their weights already."""

    quantized: Tensor  # (b, d, h, w)
    codes: Tensor  # (b, *code_shape), int64
    losses: dict[str, Tensor] = field(default_factory=dict)


class QuantizerConfig(PartConfig):
    """Settings of a quantizer; `build(in_dim)` gives the module for latents of that width."""

    @property
    def size(self) -> int:
        """Number of codes, k."""
        raise NotImplementedError

    def code_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the codes of a grid of latents."""
        return height, width

    def build(self, in_dim: int) -> "Quantizer":
        raise NotImplementedError


class Quantizer(nn.Module):
    codebook_size: int

    def quantize(self, latents: Tensor, generator: Generator | None = None) -> Quantized:
        """Nearest codes of (b, d, h, w) latents. In training mode the codebook may learn; what it draws comes from `generator`."""
        raise NotImplementedError

    def lookup(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(b, *code_shape) codes → (b, d, h, w) latents. `grid` says (h, w) where the codes do not; the square one if not given."""
        raise NotImplementedError

    def health(self) -> dict[str, float]:
        """What lately was used of the codebook: its `perplexity`, and how many codes are `dead`. Nothing where nothing is counted."""
        return {}
