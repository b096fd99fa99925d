"""The two towers of CLIP (arXiv:2103.00020): a vision transformer over patches, and a causal transformer over token ids.

Both are pre-norm transformers with biases. The vision tower has a class token, learned positions and a LayerNorm *before* its blocks; its
pooled output is the LayerNorm of the class row, while its tokens are taken as they leave a block. The text tower is causal, so padding
after a text changes nothing before it; its pooled output is the normed row of the text's last token, and its tokens are normed only when
the last layer is asked for.

`layer` counts states: 0 is what enters the first block, depth is what leaves the last, -1 is depth, and -2 (LLaVA) is what leaves block
depth - 1. `projection` adds the bias-free matrix that CLIP compares the two towers through; it acts on the pooled output.

Shapes: b batch · H W pixels · h w patches · l tokens · d width.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from stages.parts.config import Count, Epsilon, Length, PartConfig, Pixels, Ratio, Size, whole_heads
from stages.parts.layers import LayerNorm, init_linear

Activation = Literal["quick-gelu", "gelu", "gelu-tanh"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "quick-gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
}

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1], as the released weights were trained with
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class Features(NamedTuple):
    """`tokens` (b, l, d) of the chosen layer, and `pooled`: one vector for each sample, (b, d) or (b, projection)."""

    tokens: Tensor
    pooled: Tensor


class TowerConfig(PartConfig):
    """Sizes of a tower of pre-norm blocks, and which of its states is read."""

    width: Size
    depth: Count
    heads: Count
    mlp_ratio: Ratio = 4.0
    activation: Activation = "quick-gelu"
    eps: Epsilon = 1e-5  # of its norms
    layer: int = Field(default=-1, ge=-1025, le=1024)
    projection: Size | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        whole_heads(self.width, self.heads)
        if not -self.depth - 1 <= self.layer <= self.depth:
            raise ValueError(f"layer {self.layer} of a tower of depth {self.depth} is not in [{-self.depth - 1}, {self.depth}]")
        return self

    @property
    def state(self) -> int:
        """`layer` as a count of blocks passed, in [0, depth]."""
        return self.layer if self.layer >= 0 else self.depth + 1 + self.layer

    @property
    def pooled_dim(self) -> int:
        return self.projection or self.width


class PatchTowerConfig(TowerConfig):
    """A tower over the patches of a picture."""

    patch_size: Pixels

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture of height × width pixels."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"a picture of {height} × {width} pixels does not divide into patches of {self.patch_size}")
        return height // self.patch_size, width // self.patch_size


class ClipVitConfig(PatchTowerConfig):
    """CLIP's vision tower. `cls = "drop"` leaves the class token out of `tokens`; the pooled output has it in any case."""

    kind: Literal["clip-vit"] = "clip-vit"
    cls: Literal["keep", "drop"] = "keep"

    def num_tokens(self, height: int, width: int) -> int:
        """Length of `tokens` for a picture of height × width pixels."""
        h, w = self.grid(height, width)
        return h * w + (self.cls == "keep")

    def build(self, image_size: int | tuple[int, int]) -> "ClipVit":
        """A tower whose positions are made for pictures of `image_size`, (height, width) or the side of a square."""
        return ClipVit(self, (image_size, image_size) if isinstance(image_size, int) else image_size)


class ClipTextConfig(TowerConfig):
    """CLIP's text tower, for texts of up to `max_length` token ids."""

    kind: Literal["clip-text"] = "clip-text"
    max_length: Length = 77

    def build(self, vocab_size: int) -> "ClipText":
        return ClipText(self, vocab_size)


class ClipBlock(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        width, hidden = config.width, round(config.width * config.mlp_ratio)
        self.heads, self.activation = config.heads, config.activation
        self.norm1, self.norm2 = LayerNorm(width, config.eps), LayerNorm(width, config.eps)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def init_weights(self, generator: Generator, depth: int) -> None:
        """CLIP's own: what adds to the stream is scaled down by sqrt(2 · depth)."""
        width = self.out.in_features
        self.norm1.init_weights(generator)
        self.norm2.init_weights(generator)
        init_linear(self.qkv, generator, std=width**-0.5)
        init_linear(self.out, generator, std=(width * 2 * depth) ** -0.5)
        init_linear(self.up, generator, std=(2 * width) ** -0.5)
        init_linear(self.down, generator, std=(width * 2 * depth) ** -0.5)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        b, length, width = x.shape
        query, key, value = self.qkv(self.norm1(x)).view(b, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        x = x + self.out(attended.transpose(1, 2).reshape(b, length, width))
        return x + self.down(ACTIVATIONS[self.activation](self.up(self.norm2(x))))


class ClipVit(nn.Module):
    """images (b, 3, H, W) in [-1, 1] → Features. CLIP's own mean and standard deviation are applied inside."""

    def __init__(self, config: ClipVitConfig, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.out_dim, self.pooled_dim = config, config.width, config.pooled_dim
        self.trained_grid = config.grid(*image_size)
        self.patch = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_token = nn.Parameter(torch.empty(config.width))
        self.positions = nn.Parameter(torch.empty(1 + math.prod(self.trained_grid), config.width))
        self.norm_in, self.norm_out = LayerNorm(config.width, config.eps), LayerNorm(config.width, config.eps)
        self.blocks = nn.ModuleList(ClipBlock(config) for _ in range(config.depth))
        self.projection = nn.Linear(config.width, config.projection, bias=False) if config.projection else None

    def init_weights(self, generator: Generator) -> None:
        nn.init.normal_(self.patch.weight, std=self.patch.weight[0].numel() ** -0.5, generator=generator)
        nn.init.normal_(self.class_token, std=self.out_dim**-0.5, generator=generator)
        nn.init.normal_(self.positions, std=self.out_dim**-0.5, generator=generator)
        _init_tower(self, generator)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.config.grid(height, width)

    def forward(self, images: Tensor) -> Features:
        shape = (1, 3, 1, 1)
        mean, std = images.new_tensor(PIXEL_MEAN).view(shape), images.new_tensor(PIXEL_STD).view(shape)
        patches = self.patch(((images + 1) / 2 - mean) / std).flatten(2).transpose(1, 2)
        class_row = self.class_token.expand(len(images), 1, -1)
        positions = resize_positions(self.positions, self.trained_grid, self.grid(*images.shape[2:]))
        x = self.norm_in(torch.cat([class_row, patches], dim=1) + positions)
        tokens = x
        for passed, block in enumerate(self.blocks, start=1):
            x = block(x, causal=False)
            if passed == self.config.state:
                tokens = x
        pooled = self.norm_out(x[:, 0])
        return Features(
            tokens if self.config.cls == "keep" else tokens[:, 1:], pooled if self.projection is None else self.projection(pooled)
        )

    def import_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of this module from those of a public CLIP checkpoint, of both towers or of this one (names of `transformers`).

        Positions of another grid are resized. ValueError lists names that are missing or that have no place here.
        """
        renamed = _rename(state, CLIP_VISION_HF, "vision_model.", "visual_projection.weight", self)
        side = math.isqrt(len(renamed["positions"]) - 1)
        if 1 + side * side == len(renamed["positions"]):  # public CLIP towers are square
            renamed["positions"] = resize_positions(renamed["positions"], (side, side), self.trained_grid)
        return renamed


class ClipText(nn.Module):
    """ids int64 (b, l), padded on the right, and lengths (b,) → Features. Rows of `tokens` past a text's length mean nothing."""

    def __init__(self, config: ClipTextConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.out_dim, self.pooled_dim = config, config.width, config.pooled_dim
        self.embedding = nn.Parameter(torch.empty(vocab_size, config.width))
        self.positions = nn.Parameter(torch.empty(config.max_length, config.width))
        self.norm_out = LayerNorm(config.width, config.eps)
        self.blocks = nn.ModuleList(ClipBlock(config) for _ in range(config.depth))
        self.projection = nn.Linear(config.width, config.projection, bias=False) if config.projection else None

    def init_weights(self, generator: Generator) -> None:
        nn.init.normal_(self.embedding, std=0.02, generator=generator)
        nn.init.normal_(self.positions, std=0.01, generator=generator)
        _init_tower(self, generator)

    def forward(self, ids: Tensor, lengths: Tensor) -> Features:
        if ids.shape[1] > self.config.max_length:
            raise ValueError(f"a text of {ids.shape[1]} tokens is longer than max_length {self.config.max_length}")
        x = F.embedding(ids, self.embedding) + self.positions[: ids.shape[1]]
        tokens = x
        for passed, block in enumerate(self.blocks, start=1):
            x = block(x, causal=True)
            if passed == self.config.state:
                tokens = x
        normed = self.norm_out(x)
        last = (lengths - 1).view(-1, 1, 1).expand(-1, 1, normed.shape[-1])
        pooled = normed.gather(1, last).squeeze(1)
        return Features(
            normed if self.config.state == self.config.depth else tokens, pooled if self.projection is None else self.projection(pooled)
        )

    def import_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of this module from those of a public CLIP checkpoint, of both towers or of this one (names of `transformers`).

        ValueError lists names that are missing or that have no place here.
        """
        return _rename(state, CLIP_TEXT_HF, "text_model.", "text_projection.weight", self)


def resize_positions(positions: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Learned positions (h·w, d) for another grid, bicubic; a class token's row before them stays. The same table if the grids are equal."""
    if grid == new_grid:
        return positions
    class_rows = len(positions) - math.prod(grid)
    patches = positions[class_rows:].T.reshape(1, -1, *grid)
    resized = F.interpolate(patches.float(), size=new_grid, mode="bicubic", align_corners=False).to(positions.dtype)
    return torch.cat([positions[:class_rows], resized.flatten(2).squeeze(0).T])


def _init_tower(tower: ClipVit | ClipText, generator: Generator) -> None:
    if isinstance(tower, ClipVit):
        tower.norm_in.init_weights(generator)
    tower.norm_out.init_weights(generator)
    for block in tower.blocks:
        assert isinstance(block, ClipBlock)
        block.init_weights(generator, len(tower.blocks))
    if tower.projection is not None:
        init_linear(tower.projection, generator)


# Our name → the public names whose tensors, joined along their first axis, make it. "{i}" is the number of a block.
BLOCK_HF: dict[str, tuple[str, ...]] = {
    f"blocks.{{i}}.{ours}.{tensor}": tuple(f"encoder.layers.{{i}}.{name}.{tensor}" for name in theirs)
    for tensor in ("weight", "bias")
    for ours, theirs in {
        "norm1": ("layer_norm1",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": ("self_attn.out_proj",),
        "norm2": ("layer_norm2",),
        "up": ("mlp.fc1",),
        "down": ("mlp.fc2",),
    }.items()
}

CLIP_VISION_HF: dict[str, tuple[str, ...]] = {
    "class_token": ("embeddings.class_embedding",),
    "patch.weight": ("embeddings.patch_embedding.weight",),
    "positions": ("embeddings.position_embedding.weight",),
    "norm_in.weight": ("pre_layrnorm.weight",),  # spelt so in the public checkpoints
    "norm_in.bias": ("pre_layrnorm.bias",),
    "norm_out.weight": ("post_layernorm.weight",),
    "norm_out.bias": ("post_layernorm.bias",),
    **BLOCK_HF,
}

CLIP_TEXT_HF: dict[str, tuple[str, ...]] = {
    "embedding": ("embeddings.token_embedding.weight",),
    "positions": ("embeddings.position_embedding.weight",),
    "norm_out.weight": ("final_layer_norm.weight",),
    "norm_out.bias": ("final_layer_norm.bias",),
    **BLOCK_HF,
}


def _rename(
    state: Mapping[str, Tensor], table: Mapping[str, tuple[str, ...]], prefix: str, projection: str, tower: ClipVit | ClipText
) -> dict[str, Tensor]:
    """The weights of `tower` by our names. A checkpoint of both towers is known by `prefix`; what is not under it is another part's."""
    if any(name.startswith(prefix) for name in state):
        theirs = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    else:
        theirs = {name: tensor for name, tensor in state.items() if name != projection}
    theirs.pop("embeddings.position_ids", None)  # a buffer that old checkpoints carry: 0, 1, 2 ...
    if tower.projection is not None and projection in state:
        table, theirs = {**table, "projection.weight": (projection,)}, {**theirs, projection: state[projection]}
    elif tower.projection is not None:
        raise ValueError(f"the checkpoint has no '{projection}', which `projection = {tower.config.projection}` asks for")
    return joined(theirs, table, len(tower.blocks))


def joined(theirs: Mapping[str, Tensor], table: Mapping[str, tuple[str, ...]], depth: int) -> dict[str, Tensor]:
    """Weights by our names, from public ones. ValueError lists names that are missing or that have no place here."""
    layout = {
        ours.format(i=i): tuple(name.format(i=i) for name in names)
        for ours, names in table.items()
        for i in (range(depth) if "{i}" in ours else [0])
    }
    wanted = {name for names in layout.values() for name in names}
    if missing := sorted(wanted - theirs.keys()):
        raise ValueError("the checkpoint lacks weights: " + ", ".join(missing))
    if surplus := sorted(theirs.keys() - wanted):
        raise ValueError("the checkpoint has weights that this encoder has no place for: " + ", ".join(surplus))
    return {ours: torch.cat([theirs[name] for name in names]) if len(names) > 1 else theirs[names[0]] for ours, names in layout.items()}
