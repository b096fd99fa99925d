"""The convolutional autoencoder of taming transformers and latent diffusion, with a quantizer between encoder and decoder.

VQGAN, "Taming Transformers for High-Resolution Image Synthesis", arXiv:2012.09841, table 7. Residual blocks (GroupNorm, SiLU,
3 x 3 convolution, twice) in levels; between levels of the encoder a stride-2 convolution padded at the right and bottom only,
between levels of the decoder nearest-neighbour doubling and a convolution; attention in the middle and, if asked for, at the lowest
level; one block a level more in the decoder. Successors leave some of that out or add to it: MaskGIT's tokenizer (arXiv:2202.04200) and
MAGVIT-v2 (arXiv:2310.05737) have no attention, as many blocks in the decoder as in the encoder, and as many in the middle; MAGVIT-v2's
decoder doubles by a convolution to four times the channels, which become pixels (depth to space), and before each of its levels norms
with a scale and shift of the latents. Two additions of ours for small machines: with `patch_size` > 1 pictures enter and
leave as patches, which moves the expensive first levels to a coarser grid; with `local` the encoder sees one cell of the grid at a
time, so that a code says what is in its own cell and nothing about the neighbours, and fewer pictures teach a model to predict it.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from stages.parts.autoencoders.autoencoder import AutoencoderConfig
from stages.parts.autoencoders.discrete import DiscreteAutoencoder, DiscreteConfig
from stages.parts.config import Count, Pixels, Size

MAX_GROUPS, CHANNELS_PER_GROUP = 32, 4  # 32 groups at published widths; narrow levels have fewer, so that a group keeps 4 channels


class ConvolutionalConfig(AutoencoderConfig):
    """The sizes shared by `cnn` and `kl-cnn`. `multipliers` has one entry a level: its width in units of `channels`."""

    downsample: Pixels
    channels: int = Field(default=128, ge=4, le=65_536)
    multipliers: tuple[Count, ...] = Field(max_length=16)
    blocks_per_level: Count = 2
    decoder_blocks_per_level: Count | None = None  # one more than the encoder's if not given
    middle_blocks: Count = 2
    attention: bool  # at the lowest level
    middle_attention: bool = True
    upsample: Literal["nearest", "depth-to-space"] = "nearest"
    adaptive_norm: bool = False  # before each level of the decoder, a norm that the latents scale and shift
    latent_channels: Size
    patch_size: Pixels = 1
    local: bool = False  # the encoder takes each cell of the grid for a picture of its own

    @model_validator(mode="after")
    def _levels_match_downsample(self) -> "ConvolutionalConfig":
        reached = self.patch_size * 2 ** (len(self.multipliers) - 1)
        if reached != self.downsample:
            raise ValueError(
                f"downsample = {self.downsample}, but patch_size = {self.patch_size} with {len(self.multipliers)} multipliers "
                f"(a halving between each) gives {reached}"
            )
        if self.channels % CHANNELS_PER_GROUP:
            raise ValueError(f"channels must be a multiple of {CHANNELS_PER_GROUP}, found {self.channels}")
        for width in (self.channels * multiplier for multiplier in self.multipliers):
            if width % groups_of(width):
                raise ValueError(f"channels = {self.channels}: a level of {width} channels does not divide into {groups_of(width)} groups")
        return self


class CNNConfig(DiscreteConfig, ConvolutionalConfig):
    """Convolutional encoder and decoder around a quantizer (VQGAN, arXiv:2012.09841). The defaults are its ImageNet model f = 16."""

    kind: Literal["cnn"] = "cnn"
    downsample: Pixels = 16
    multipliers: tuple[Count, ...] = Field(default=(1, 1, 2, 2, 4), max_length=16)
    attention: bool = True
    latent_channels: Size = 256

    def build(self) -> "CNNAutoencoder":
        return CNNAutoencoder(self)


class CNNAutoencoder(DiscreteAutoencoder):
    encoder: "Encoder"
    decoder: "Decoder"

    def __init__(self, config: CNNConfig) -> None:
        super().__init__(config, Encoder(config, config.latent_channels), Decoder(config))

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight


def groups_of(channels: int) -> int:
    return min(MAX_GROUPS, channels // CHANNELS_PER_GROUP)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups_of(channels), channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1 x 1 convolution on the shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = group_norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class Attention(nn.Module):
    """One head of full attention over the cells of the grid, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.query, self.key, self.value, self.out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        cells = self.norm(x).flatten(2).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(self.query(cells), self.key(cells), self.value(cells))
        return x + self.out(mixed).transpose(1, 2).reshape(b, c, h, w)


class Halve(nn.Module):
    """Stride-2 convolution; the padding is at the right and bottom only, as in the published weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class DepthToSpace(nn.Module):
    """Doubling by a convolution to four times the channels, of which each four become the corners of a cell (MAGVIT-v2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)


class AdaptiveNorm(nn.Module):
    """GroupNorm whose scale and shift are linear in the latents' standard deviation and mean over the grid (MAGVIT-v2, section 3.2)."""

    def __init__(self, latent_channels: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups_of(channels), channels, eps=1e-6, affine=False)
        self.scale, self.shift = nn.Linear(latent_channels, channels), nn.Linear(latent_channels, channels)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        variance, mean = torch.var_mean(latents.flatten(2), dim=2)
        scale, shift = self.scale((variance + 1e-6).sqrt()), self.shift(mean)
        return scale[:, :, None, None] * self.norm(x) + shift[:, :, None, None]


class Double(nn.Module):
    """Nearest-neighbour doubling and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def level(in_channels: int, out_channels: int, blocks: int, attention: bool) -> list[nn.Module]:
    """The residual blocks of one level, each followed by attention if asked for."""
    layers: list[nn.Module] = []
    for index in range(blocks):
        layers.append(ResidualBlock(out_channels if index else in_channels, out_channels))
        if attention:
            layers.append(Attention(out_channels))
    return layers


def middle(channels: int, blocks: int, attention: bool) -> list[nn.Module]:
    """The blocks at the lowest grid, with attention after the first if asked for."""
    first, attentions = ResidualBlock(channels, channels), [Attention(channels)] if attention else []
    return [first, *attentions, *(ResidualBlock(channels, channels) for _ in range(blocks - 1))]


class Encoder(nn.Module):
    """(b, 3, H, W) → (b, out_channels, h, w)."""

    def __init__(self, config: ConvolutionalConfig, out_channels: int) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        self.patch_size = config.patch_size
        self.cell = config.downsample if config.local else None
        self.conv_in = nn.Conv2d(3 * config.patch_size**2, config.channels, 3, padding=1)
        layers: list[nn.Module] = []
        for index, (before, width) in enumerate(zip([config.channels, *widths[:-1]], widths, strict=True)):
            lowest = index == len(widths) - 1
            layers += level(before, width, config.blocks_per_level, config.attention and lowest)
            if not lowest:
                layers.append(Halve(width))
        self.layers = nn.Sequential(*layers, *middle(widths[-1], config.middle_blocks, config.middle_attention))
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        if self.cell is None:
            return self.encode(images)
        cells = F.pixel_unshuffle(images, self.cell).permute(0, 2, 3, 1)  # (b, h, w, 3 · cell²)
        encoded = self.encode(cells.reshape(-1, 3, self.cell, self.cell))
        return encoded.reshape(*cells.shape[:3], -1).permute(0, 3, 1, 2)

    def encode(self, images: Tensor) -> Tensor:
        hidden = self.layers(self.conv_in(F.pixel_unshuffle(images, self.patch_size)))
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Decoder(nn.Module):
    """(b, latent_channels, h, w) → (b, 3, H, W), no activation at the end."""

    def __init__(self, config: ConvolutionalConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in reversed(config.multipliers)]
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        blocks = config.decoder_blocks_per_level or config.blocks_per_level + 1
        layers = middle(widths[0], config.middle_blocks, config.middle_attention)
        for index, (before, width) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True)):
            if config.adaptive_norm:
                layers.append(AdaptiveNorm(config.latent_channels, before))
            layers += level(before, width, blocks, config.attention and index == 0)
            if index < len(widths) - 1:
                layers.append(Double(width) if config.upsample == "nearest" else DepthToSpace(width))
        self.layers = nn.Sequential(*layers)
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], 3 * config.patch_size**2, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = self.conv_in(latents)
        for layer in self.layers:
            hidden = layer(hidden, latents) if isinstance(layer, AdaptiveNorm) else layer(hidden)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(hidden))), self.patch_size)
