"""VQ-VAE and VQ-VAE-2: strided convolutions, residual blocks, ReLU, no norms ("Neural Discrete Representation Learning",
arXiv:1711.00937, section 4.1; "Generating Diverse High-Fidelity Images with VQ-VAE-2", arXiv:1906.00446, section 3.1).

Encoder: 4 x 4 convolutions of stride 2, a 3 x 3 one, residual blocks (ReLU, 3 x 3, ReLU, 1 x 1); the decoder is its mirror with
transposed convolutions. As in the authors' published example the convolution next to the pixels has half the width.

With two `levels` a second encoder halves the grid once more; that top grid is quantized first, decoded back to the size of the bottom
one, and the bottom quantizes what is left to say about the picture knowing the top. The decoder takes both: the latents are the
upsampled top codes and the bottom ones side by side. Codes are one row, the top grid first, then the bottom one; each level has a
codebook of its own, of equal sizes.

Shape letters: b batch · d channels of one level · h w bottom grid.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, SerializeAsAny, model_validator
from torch import Generator, Tensor, nn

from stages.errors import DataError
from stages.parts.autoencoders.discrete import DiscreteAutoencoder, DiscreteConfig
from stages.parts.config import Size
from stages.parts.quantizers import Quantized, Quantizer, QuantizerConfig, VQConfig


class StridedCNNConfig(DiscreteConfig):
    """Strided convolutions around one quantizer (VQ-VAE, arXiv:1711.00937) or a top and a bottom one (VQ-VAE-2, arXiv:1906.00446).

    `latent_channels` are those the decoder takes, with two levels half of them for each. The defaults are VQ-VAE's ImageNet model.
    """

    kind: Literal["strided-cnn"] = "strided-cnn"
    downsample: int = Field(default=4, ge=2, le=8192)
    levels: Literal[1, 2] = 1
    channels: int = Field(default=256, ge=2, le=65_536)
    residual_channels: Size = 256
    residual_blocks: int = Field(default=2, ge=0, le=1024)
    latent_channels: Size = 64
    quantizer: SerializeAsAny[QuantizerConfig] = VQConfig(codebook_size=512, codebook_dim=64)

    @model_validator(mode="after")
    def _sizes_fit(self) -> "StridedCNNConfig":
        if self.downsample & (self.downsample - 1):
            raise ValueError(f"downsample must be a power of two, found {self.downsample}")
        if self.levels == 2 and self.quantizer.code_shape(2, 2) != (2, 2):
            raise ValueError(f"quantizer: '{self.quantizer.kind}' does not give every latent one code, which two levels need")
        for key in ("channels", "latent_channels") if self.levels == 2 else ("channels",):
            if getattr(self, key) % 2:
                raise ValueError(f"{key} must be even, found {getattr(self, key)}")
        return self

    @property
    def multiple(self) -> int:
        return self.downsample * self.levels

    def code_shape(self, height: int, width: int) -> tuple[int, ...]:
        h, w = self.grid(height, width)
        if self.levels == 1:
            return self.quantizer.code_shape(h, w)
        return (h * w // 4 + h * w,)

    def build(self) -> "StridedCNNAutoencoder":
        return StridedCNNAutoencoder(self)


class StridedCNNAutoencoder(DiscreteAutoencoder):
    encoder: nn.Sequential
    decoder: nn.Sequential

    def __init__(self, config: StridedCNNConfig) -> None:
        decoder = upwards(config, config.latent_channels, 3, config.downsample)
        if config.levels == 1:
            encoder = downwards(config, 3, config.downsample).append(nn.Conv2d(config.channels, config.latent_channels, 1))
            super().__init__(config, encoder, decoder)
        else:
            super().__init__(config, downwards(config, 3, config.downsample), decoder, Hierarchy(config))

    @property
    def last_layer(self) -> Tensor:
        weight = self.decoder[-1].weight
        assert isinstance(weight, Tensor)
        return weight


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))): 3 x 3 into the residual width, 1 x 1 back."""

    def __init__(self, channels: int, residual_channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, residual_channels, 3, padding=1), nn.Conv2d(residual_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def residual_stack(config: StridedCNNConfig) -> list[nn.Module]:
    return [*(ResidualBlock(config.channels, config.residual_channels) for _ in range(config.residual_blocks)), nn.ReLU()]


def downwards(config: StridedCNNConfig, in_channels: int, factor: int) -> nn.Sequential:
    """(b, in_channels, H, W) → (b, channels, H / factor, W / factor)."""
    widths = [in_channels, config.channels // 2, *[config.channels] * (factor.bit_length() - 2)]
    layers: list[nn.Module] = []
    for before, width in pairwise(widths):
        layers += [nn.Conv2d(before, width, 4, stride=2, padding=1), nn.ReLU()]
    layers.append(nn.Conv2d(widths[-1], config.channels, 3, padding=1))
    return nn.Sequential(*layers, *residual_stack(config))


def upwards(config: StridedCNNConfig, in_channels: int, out_channels: int, factor: int) -> nn.Sequential:
    """(b, in_channels, h, w) → (b, out_channels, h · factor, w · factor), no activation at the end."""
    halvings = factor.bit_length() - 1
    widths = [*[config.channels] * (halvings - 1), config.channels // 2, out_channels] if halvings > 1 else [config.channels, out_channels]
    layers: list[nn.Module] = [nn.Conv2d(in_channels, config.channels, 3, padding=1), *residual_stack(config)]
    for before, width in pairwise(widths):
        layers += [nn.ConvTranspose2d(before, width, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Hierarchy(Quantizer):
    """Top and bottom quantizer of VQ-VAE-2, with the networks between them (algorithm 1): one quantizer of (b, channels, h, w) features.

    quantized: (b, 2·d, h, w), the top codes upsampled and the bottom ones.
    """

    def __init__(self, config: StridedCNNConfig) -> None:
        nn.Module.__init__(self)  # its two quantizers project and count
        self.codebook_size, dim = config.quantizer.size, config.latent_channels // 2
        self.encode_top = downwards(config, config.channels, 2)
        self.to_top, self.to_bottom = nn.Conv2d(config.channels, dim, 1), nn.Conv2d(config.channels + dim, dim, 1)
        self.top, self.bottom = config.quantizer.build(dim), config.quantizer.build(dim)
        self.decode_top = upwards(config, dim, dim, 2)
        self.upsample_top = nn.ConvTranspose2d(dim, dim, 4, stride=2, padding=1)

    def quantize(self, latents: Tensor, generator: Generator | None = None) -> Quantized:
        top = self.top.quantize(self.to_top(self.encode_top(latents)), generator)
        bottom = self.bottom.quantize(self.to_bottom(torch.cat([self.decode_top(top.quantized), latents], dim=1)), generator)
        return Quantized(
            self._together(top.quantized, bottom.quantized),
            torch.cat([top.codes.flatten(1), bottom.codes.flatten(1)], dim=1),
            {name: loss + bottom.losses[name] for name, loss in top.losses.items()},
        )

    def lookup(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        h, w = grid or 2 * (math.isqrt(4 * codes.shape[1] // 5),)
        if codes.shape[1] != h * w // 4 + h * w:
            raise DataError(
                f"{codes.shape[1]:,} codes are not those of a top and a bottom grid of {h} x {w}",
                hint="" if grid else "say which grid of latents they describe, if it is not square",
            )
        top, bottom = codes.split([h * w // 4, h * w], dim=1)
        return self._together(self.top.lookup(top.unflatten(1, (h // 2, w // 2))), self.bottom.lookup(bottom.unflatten(1, (h, w))))

    def health(self) -> dict[str, float]:
        """The mean of the two perplexities; the dead codes of both codebooks."""
        top, bottom = self.top.health(), self.bottom.health()
        return {name: (value + bottom[name]) / (2 if name == "perplexity" else 1) for name, value in top.items()}

    def _together(self, top: Tensor, bottom: Tensor) -> Tensor:
        return torch.cat([self.upsample_top(top), bottom], dim=1)
