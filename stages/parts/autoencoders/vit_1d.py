"""TiTok: a picture as a short row of codes that have no rows and columns ("An Image is Worth 32 Tokens for Reconstruction and
Generation", arXiv:2406.07550, section 3.2).

The encoder is a transformer over the patches of a picture and a few learned latent tokens; what the latent tokens have become is kept,
the patches are not. The decoder is a transformer over one mask token a patch and the quantized latents; what the mask tokens have
become are the pixels. Positions are learned, so pictures have one size.

The paper's first models decode to the codes of another tokenizer and those to pixels; here, as in its authors' later models, the decoder
ends in a linear map to the pixels of a patch and a 3 x 3 convolution over the picture.

Shape letters: b batch · n latent tokens · d width · h w grid of patches.
"""

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, SerializeAsAny, model_validator
from torch import Generator, Tensor, nn

from stages.errors import DataError
from stages.parts.autoencoders.autoencoder import Reconstruction
from stages.parts.autoencoders.discrete import DiscreteAutoencoder, DiscreteConfig
from stages.parts.autoencoders.vit import blocks, grid_of, tokens_of
from stages.parts.config import Count, Length, Pixels, Ratio, Size, whole_heads
from stages.parts.quantizers import QuantizerConfig, VQConfig


class ViT1DConfig(DiscreteConfig):
    """`num_latents` codes for a picture of `image_size` pixels a side (TiTok, arXiv:2406.07550). `downsample` is the side of a patch. The
    defaults are TiTok-L-32."""

    kind: Literal["vit-1d"] = "vit-1d"
    image_size: Pixels = 256
    num_latents: Length = 32
    downsample: Pixels = 16
    width: int = Field(default=1024, ge=4, le=65_536)
    depth: Count = 24
    heads: Count = 16
    mlp_ratio: Ratio = 4.0
    latent_channels: Size = 12
    quantizer: SerializeAsAny[QuantizerConfig] = VQConfig(codebook_size=4096, codebook_dim=12, l2_normalize=True)

    @model_validator(mode="after")
    def _sizes_fit(self) -> "ViT1DConfig":
        whole_heads(self.width, self.heads)
        if self.image_size % self.downsample:
            raise ValueError(f"image_size must be a multiple of downsample, found {self.image_size} and {self.downsample}")
        if self.quantizer.code_shape(1, self.num_latents) != (1, self.num_latents):
            raise ValueError(f"quantizer: '{self.quantizer.kind}' does not give every latent one code, which a row of latents needs")
        return self

    @property
    def side(self) -> int:
        """Patches along each side of a picture."""
        return self.image_size // self.downsample

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(1, num_latents). DataError for pictures of another size."""
        if (height, width) != (self.image_size, self.image_size):
            raise DataError(
                f"pictures of {height} x {width} pixels: this autoencoder takes {self.image_size} x {self.image_size} only",
                hint=f"import them with --size {self.image_size}, or train one with image_size = {min(height, width)}",
            )
        return 1, self.num_latents

    def code_shape(self, height: int, width: int) -> tuple[int, ...]:
        return self.grid(height, width)[1:]

    def build(self) -> "ViT1DAutoencoder":
        return ViT1DAutoencoder(self)


class ViT1DAutoencoder(DiscreteAutoencoder):
    """Latents are a grid (b, latent_channels, 1, n) to the quantizer, codes a row (b, n) to everybody else."""

    encoder: "ViT1DEncoder"
    decoder: "ViT1DDecoder"

    def __init__(self, config: ViT1DConfig) -> None:
        super().__init__(config, ViT1DEncoder(config), ViT1DDecoder(config))

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def encode(self, images: Tensor) -> Tensor:
        return self.quantizer.lookup(self.encode_codes(images).unsqueeze(1))

    def encode_codes(self, images: Tensor) -> Tensor:
        return super().encode_codes(images).squeeze(1)

    def decode_codes(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return super().decode_codes(codes.unsqueeze(1), grid)

    def reconstruct(self, images: Tensor, generator: Generator) -> Reconstruction:
        result = super().reconstruct(images, generator)
        assert result.codes is not None
        return replace(result, codes=result.codes.squeeze(1))


def learned(n: int, width: int) -> nn.Parameter:
    """(n, d) tokens or positions, of length about 1."""
    return nn.Parameter(torch.randn(n, width) * width**-0.5)


class ViT1DEncoder(nn.Module):
    """(b, 3, H, W) → (b, latent_channels, 1, n)."""

    def __init__(self, config: ViT1DConfig) -> None:
        super().__init__()
        width, patch = config.width, config.downsample
        self.from_patches = nn.Conv2d(3, width, patch, stride=patch)
        self.positions, self.latent_tokens = learned(config.side**2, width), learned(config.num_latents, width)
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = blocks(config.depth, width, config.heads, config.mlp_ratio)
        self.to_latents = nn.Linear(width, config.latent_channels)

    def forward(self, images: Tensor) -> Tensor:
        patches = tokens_of(self.from_patches(images)) + self.positions
        tokens = torch.cat([patches, self.latent_tokens.expand(len(images), -1, -1)], dim=1)
        latents = self.blocks(self.norm_in(tokens))[:, patches.shape[1] :]
        return grid_of(self.to_latents(self.norm_out(latents)), 1, latents.shape[1])


class ViT1DDecoder(nn.Module):
    """(b, latent_channels, 1, n) → (b, 3, H, W), no activation at the end."""

    def __init__(self, config: ViT1DConfig) -> None:
        super().__init__()
        width = config.width
        self.side, self.patch = config.side, config.downsample
        self.from_latents = nn.Linear(config.latent_channels, width)
        self.mask_token = learned(1, width)
        self.positions, self.latent_positions = learned(config.side**2, width), learned(config.num_latents, width)
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = blocks(config.depth, width, config.heads, config.mlp_ratio)
        self.to_patches = nn.Linear(width, 3 * config.downsample**2)
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        masks = (self.mask_token + self.positions).expand(len(latents), -1, -1)
        tokens = torch.cat([masks, self.from_latents(tokens_of(latents)) + self.latent_positions], dim=1)
        patches = self.norm_out(self.blocks(self.norm_in(tokens))[:, : masks.shape[1]])
        return self.conv_out(F.pixel_shuffle(grid_of(self.to_patches(patches), self.side, self.side), self.patch))
