"""SigLIP's vision tower ("Sigmoid Loss for Language Image Pre-Training", arXiv:2303.15343): a transformer over patches, no class token.

Patches come from a convolution with bias, positions are learned, blocks are those of CLIP's tower with other constants, and a LayerNorm
stands after the last one; `tokens` are normed only when the last layer is asked for. Janus (arXiv:2410.13848) and LLaVA-OneVision read
all tokens; SigLIP itself compares one vector a picture, read by a learned query: `pool = "attention"`.

Shapes: b batch · H W pixels · h w patches · l = h·w tokens · d width.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Generator, Tensor, nn

from stages.parts.config import Epsilon
from stages.parts.encoders.clip import ACTIVATIONS, BLOCK_HF, Activation, ClipBlock, Features, PatchTowerConfig, joined, resize_positions
from stages.parts.layers import LayerNorm, init_linear


class SiglipVitConfig(PatchTowerConfig):
    """SigLIP's vision tower. pool: how `pooled` comes from the last layer's tokens, their mean or what a learned query attends to."""

    kind: Literal["siglip-vit"] = "siglip-vit"
    activation: Activation = "gelu-tanh"
    eps: Epsilon = 1e-6
    pool: Literal["mean", "attention"] = "mean"

    @model_validator(mode="after")
    def _no_projection(self) -> Self:
        if self.projection is not None:
            raise ValueError("SigLIP's tower has no projection: its pooled output is compared as it is")
        return self

    def num_tokens(self, height: int, width: int) -> int:
        """Length of `tokens` for a picture of height × width pixels."""
        return math.prod(self.grid(height, width))

    def build(self, image_size: int | tuple[int, int]) -> "SiglipVit":
        """A tower whose positions are made for pictures of `image_size`, (height, width) or the side of a square."""
        return SiglipVit(self, (image_size, image_size) if isinstance(image_size, int) else image_size)


class AttentionPool(nn.Module):
    """One learned query attends to all tokens (b, l, d), then x + mlp(norm x): (b, d) (Set Transformer, arXiv:1810.00825, section 3.2)."""

    def __init__(self, config: SiglipVitConfig) -> None:
        super().__init__()
        width, hidden = config.width, round(config.width * config.mlp_ratio)
        self.heads, self.activation = config.heads, ACTIVATIONS[config.activation]
        self.query = nn.Parameter(torch.empty(width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = LayerNorm(width, config.eps)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def init_weights(self, generator: Generator) -> None:
        nn.init.normal_(self.query, std=self.out.in_features**-0.5, generator=generator)
        self.norm.init_weights(generator)
        for layer in (self.qkv, self.out, self.up, self.down):
            init_linear(layer, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        b, _, width = tokens.shape
        to_query, to_rest = self.qkv.weight.split([width, 2 * width])
        query_bias, rest_bias = self.qkv.bias.split([width, 2 * width])
        query = F.linear(self.query, to_query, query_bias).expand(b, 1, width)
        key, value = F.linear(tokens, to_rest, rest_bias).chunk(2, dim=-1)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        x = self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(b, width))
        return x + self.down(self.activation(self.up(self.norm(x))))


class SiglipVit(nn.Module):
    """images (b, 3, H, W) in [-1, 1], which is what SigLIP was trained on → Features."""

    def __init__(self, config: SiglipVitConfig, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.out_dim, self.pooled_dim = config, config.width, config.width
        self.trained_grid = config.grid(*image_size)
        self.patch = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.positions = nn.Parameter(torch.empty(math.prod(self.trained_grid), config.width))
        self.blocks = nn.ModuleList(ClipBlock(config) for _ in range(config.depth))
        self.norm_out = LayerNorm(config.width, config.eps)
        self.pool = AttentionPool(config) if config.pool == "attention" else None

    def init_weights(self, generator: Generator) -> None:
        nn.init.normal_(self.patch.weight, std=self.patch.weight[0].numel() ** -0.5, generator=generator)
        nn.init.zeros_(self.patch.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.positions, std=self.out_dim**-0.5, generator=generator)
        for block in self.blocks:
            assert isinstance(block, ClipBlock)
            block.init_weights(generator, len(self.blocks))
        self.norm_out.init_weights(generator)
        if self.pool is not None:
            self.pool.init_weights(generator)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.config.grid(height, width)

    def forward(self, images: Tensor) -> Features:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = x + resize_positions(self.positions, self.trained_grid, self.grid(*images.shape[2:]))
        tokens = x
        for passed, block in enumerate(self.blocks, start=1):
            x = block(x, causal=False)
            if passed == self.config.state:
                tokens = x
        normed = self.norm_out(x)
        pooled = normed.mean(1) if self.pool is None else self.pool(normed)
        return Features(normed if self.config.state == self.config.depth else tokens, pooled)

    def import_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of this module from those of a public SigLIP checkpoint, or of a Janus one (names of `transformers`).

        What of the checkpoint is not its vision tower is another part's, and a tower without a pooling head has no use for one.
        Positions of another grid are resized. ValueError lists names that are missing or that have no place here.
        """
        inside = [name for name in state if "vision_model." in name]
        theirs: dict[str, Any] = {name.split("vision_model.")[1]: state[name] for name in inside} or dict(state)
        theirs = {name.replace("self_attn.projection_layer", "self_attn.out_proj"): value for name, value in theirs.items()}
        theirs.pop("embeddings.position_ids", None)
        if self.pool is None:
            theirs = {name: value for name, value in theirs.items() if not name.startswith("head.")}
        elif "head.probe" in theirs:
            theirs["head.probe"] = theirs["head.probe"].flatten()
        renamed = joined(theirs, SIGLIP_HF if self.pool is None else SIGLIP_HF | POOL_HF, len(self.blocks))
        side = math.isqrt(len(renamed["positions"]))
        if side * side == len(renamed["positions"]):  # public towers are square
            renamed["positions"] = resize_positions(renamed["positions"], (side, side), self.trained_grid)
        return renamed


SIGLIP_HF: dict[str, tuple[str, ...]] = {
    "patch.weight": ("embeddings.patch_embedding.weight",),
    "patch.bias": ("embeddings.patch_embedding.bias",),
    "positions": ("embeddings.position_embedding.weight",),
    "norm_out.weight": ("post_layernorm.weight",),
    "norm_out.bias": ("post_layernorm.bias",),
    **BLOCK_HF,
}

POOL_HF: dict[str, tuple[str, ...]] = {
    "pool.query": ("head.probe",),
    "pool.qkv.weight": ("head.attention.in_proj_weight",),
    "pool.qkv.bias": ("head.attention.in_proj_bias",),
    **{
        f"pool.{ours}.{tensor}": (f"head.{theirs}.{tensor}",)
        for tensor in ("weight", "bias")
        for ours, theirs in {"out": "attention.out_proj", "norm": "layernorm", "up": "mlp.fc1", "down": "mlp.fc2"}.items()
    },
}
