"""What every quantizer promises: `lookup(quantize(z).codes)` is `quantize(z).quantized`, bit for bit, and gradients pass straight through.

Shape letters: b batch · d width of the latents · h w grid · k codebook size.
"""

from dataclasses import dataclass, field

from torch import Generator, Tensor, nn

from stages.parts.config import PartConfig


@dataclass(frozen=True)
class Quantized:
    """Latents moved to their codes. `losses` are scalars that carry their weights already."""

    quantized: Tensor  # (b, d, h, w)
    codes: Tensor  # (b, h, w), int64
    losses: dict[str, Tensor] = field(default_factory=dict)


class QuantizerConfig(PartConfig):
    """Settings of a quantizer; `build(in_dim)` gives the module for latents of that width."""

    @property
    def size(self) -> int:
        """Number of codes, k."""
        raise NotImplementedError

    def build(self, in_dim: int) -> "Quantizer":
        raise NotImplementedError


class Quantizer(nn.Module):
    codebook_size: int

    def quantize(self, latents: Tensor, generator: Generator | None = None) -> Quantized:
        """Nearest codes of (b, d, h, w) latents. In training mode the codebook may learn; what it draws comes from `generator`."""
        raise NotImplementedError

    def lookup(self, codes: Tensor) -> Tensor:
        """(b, h, w) codes → (b, d, h, w) latents."""
        raise NotImplementedError

    def health(self) -> dict[str, float]:
        """What lately was used of the codebook: its `perplexity`, and how many codes are `dead`. Nothing where nothing is counted."""
        return {}
