"""ViT-VQGAN: patches through a transformer to codes, and through another one back ("Vector-quantized Image Modeling with Improved
VQGAN", arXiv:2110.04627, section 3.1).

A linear map of each patch, pre-norm blocks with full attention (LayerNorm, GELU), and at the end of either network an MLP with tanh in
its middle, found to help, then a linear map: to the latents in the encoder, to the pixels of a patch in the decoder. Positions are the
fixed 2-D sinusoids, so that pictures of any size whose sides are multiples of a patch go through.

Shape letters: b batch · n tokens · d width · h w grid of patches.
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from stages.parts.autoencoders.discrete import DiscreteAutoencoder, DiscreteConfig
from stages.parts.config import Count, Pixels, Ratio, Size, whole_heads
from stages.parts.layers import sincos_2d
from stages.parts.quantizers import QuantizerConfig, VQConfig


class ViTConfig(DiscreteConfig):
    """Transformers around a quantizer (ViT-VQGAN, arXiv:2110.04627). `downsample` is the side of a patch. The defaults are its Base
    model, both ways; `decoder_depth` makes the decoder deeper or shallower than the encoder."""

    kind: Literal["vit"] = "vit"
    downsample: Pixels = 8
    width: int = Field(default=768, ge=4, le=65_536)
    depth: Count = 12
    decoder_depth: Count | None = None  # that of the encoder if not given
    heads: Count = 12
    mlp_ratio: Ratio = 4.0
    latent_channels: Size = 32
    quantizer: SerializeAsAny[QuantizerConfig] = VQConfig(codebook_size=8192, codebook_dim=32, l2_normalize=True)

    @model_validator(mode="after")
    def _heads_divide(self) -> "ViTConfig":
        whole_heads(self.width, self.heads)
        return self

    def build(self) -> "ViTAutoencoder":
        return ViTAutoencoder(self)


class ViTAutoencoder(DiscreteAutoencoder):
    encoder: "ViTEncoder"
    decoder: "ViTDecoder"

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config, ViTEncoder(config), ViTDecoder(config))

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.to_patches.weight


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), over (b, n, d) tokens that all see each other."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads, hidden = heads, round(width * mlp_ratio)
        self.attention_norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_norm, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        query, key, value = self.qkv(self.attention_norm(x)).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(b, n, d))
        return x + self.mlp(self.mlp_norm(x))


def blocks(depth: int, width: int, heads: int, mlp_ratio: float) -> nn.Sequential:
    return nn.Sequential(*(Block(width, heads, mlp_ratio) for _ in range(depth)))


def tanh_mlp(width: int, mlp_ratio: float) -> nn.Sequential:
    hidden = round(width * mlp_ratio)
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width))


def positions(h: int, w: int, width: int) -> Tensor:
    """(h·w, d). Made anew each time: the memory of a step is estimated with fake tensors, which must not get into a cache."""
    return sincos_2d.__wrapped__((h, w), width)


def tokens_of(grid: Tensor) -> Tensor:
    """(b, d, h, w) → (b, h·w, d)."""
    return grid.flatten(2).transpose(1, 2)


def grid_of(tokens: Tensor, h: int, w: int) -> Tensor:
    """(b, h·w, d) → (b, d, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, (h, w))


class ViTEncoder(nn.Module):
    """(b, 3, H, W) → (b, latent_channels, h, w)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.width, patch = config.width, config.downsample
        self.from_patches = nn.Conv2d(3, config.width, patch, stride=patch)
        self.blocks = blocks(config.depth, config.width, config.heads, config.mlp_ratio)
        self.norm, self.mlp = nn.LayerNorm(config.width), tanh_mlp(config.width, config.mlp_ratio)
        self.to_latents = nn.Linear(config.width, config.latent_channels)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.from_patches(images)
        h, w = patches.shape[2:]
        tokens = self.blocks(tokens_of(patches) + positions(h, w, self.width).to(patches))
        return grid_of(self.to_latents(self.mlp(self.norm(tokens))), h, w)


class ViTDecoder(nn.Module):
    """(b, latent_channels, h, w) → (b, 3, H, W), no activation at the end."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.width, self.patch = config.width, config.downsample
        self.from_latents = nn.Linear(config.latent_channels, config.width)
        self.blocks = blocks(config.decoder_depth or config.depth, config.width, config.heads, config.mlp_ratio)
        self.norm, self.mlp = nn.LayerNorm(config.width), tanh_mlp(config.width, config.mlp_ratio)
        self.to_patches = nn.Linear(config.width, 3 * config.downsample**2)

    def forward(self, latents: Tensor) -> Tensor:
        h, w = latents.shape[2:]
        tokens = self.from_latents(tokens_of(latents))
        tokens = self.blocks(tokens + positions(h, w, self.width).to(tokens))
        return F.pixel_shuffle(grid_of(self.to_patches(self.mlp(self.norm(tokens))), h, w), self.patch)
