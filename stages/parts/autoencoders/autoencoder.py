"""What every autoencoder promises to the stages that train it, tokenize with it, and draw with it.

Pictures are float (b, 3, H, W) in [-1, 1], latents (b, c, h, w) with (h, w) = grid(H, W), codes int64 (b, *code_shape(H, W)): mostly
(h, w), with depth (d, h, w) where several codes add up to a latent, or a row (n,) where they have no rows and columns.
"""

from dataclasses import dataclass, field

from torch import Generator, Tensor, nn

from stages.errors import DataError
from stages.parts.config import PartConfig, Pixels, Size


@dataclass(frozen=True)
class Reconstruction:
    """What a training step needs. `losses` are the autoencoder's own scalars (commitment, codebook, kl), by name."""

    images: Tensor  # (b, 3, H, W)
    losses: dict[str, Tensor] = field(default_factory=dict)
    codes: Tensor | None = None  # (b, *code_shape) when there is a quantizer


class AutoencoderConfig(PartConfig):
    """Settings of an autoencoder. `downsample` pixels along each side become one cell; `store` names the shard field it writes."""

    downsample: Pixels
    latent_channels: Size
    store: str

    @property
    def codebook_size(self) -> int | None:
        """Number of codes, or None for continuous latents."""
        return None

    @property
    def multiple(self) -> int:
        """Height and width of pictures are multiples of so many pixels."""
        return self.downsample

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of latents for a picture of that many pixels. DataError if they do not divide."""
        if height % self.multiple or width % self.multiple:
            near = [max(self.multiple, round(side / self.multiple) * self.multiple) for side in (height, width)]
            raise DataError(
                f"pictures of {height} x {width} pixels: height and width must be multiples of {self.multiple}",
                hint=f"import them with --size {near[0]}" if near[0] == near[1] else f"nearest sizes are {near[0]} x {near[1]}",
            )
        return height // self.downsample, width // self.downsample

    def code_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the codes of one picture of that many pixels. DataError if they do not divide."""
        return self.grid(height, width)

    def build(self) -> "Autoencoder":
        raise NotImplementedError


class Autoencoder(nn.Module):
    """Pictures ↔ latents or codes."""

    config: AutoencoderConfig

    @property
    def downsample(self) -> int:
        return self.config.downsample

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def codebook_size(self) -> int | None:
        return self.config.codebook_size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.config.grid(height, width)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution, at which the adversarial weight is balanced."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) pictures → (b, c, h, w) latents that `decode` takes."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """(b, c, h, w) latents → (b, 3, H, W) pictures, not clamped."""
        raise NotImplementedError

    def encode_codes(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) pictures → (b, *code_shape) codes. TypeError if the latents are continuous."""
        raise TypeError(f"'{self.config.kind}' has no codebook")

    def decode_codes(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(b, *code_shape) codes → (b, 3, H, W) pictures. TypeError if the latents are continuous.

        grid: rows and columns of the latents, for codes in a row (n,) that do not show them; the square one if not given.
        """
        raise TypeError(f"'{self.config.kind}' has no codebook")

    def reconstruct(self, images: Tensor, generator: Generator) -> Reconstruction:
        """The pictures as the autoencoder gives them back, with what it has to pay; draws from `generator` only."""
        raise NotImplementedError
