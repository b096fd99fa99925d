"""The transformer that every sequence model of mmgen runs on.

Pre-norm blocks, rotary positions on one or three axes, grouped key/value heads, and *hard-routed experts*: each expert owns a
copy of the modules named in `duplicate`, each token passes through the copy its port names, and attention is computed once
over all tokens in their original order. One expert is the dense model; experts by modality are mixture-of-transformers
(arXiv:2411.04996) and LMFusion (arXiv:2412.15188); experts by role are BAGEL (arXiv:2505.14683). Between attentions the tokens
are kept grouped by expert, so each expert multiplies one contiguous block and nothing is computed twice or masked away.

Shape letters: b rows, l row length, q/k query and key length, d width, a heads, n = b·l tokens in expert order.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Generator, Tensor, nn

from stages.parts.backbones.modulation import (
    BRANCH_PARTS,
    FINAL_PARTS,
    Condition,
    Modulation,
    ModulationKind,
    TimestepCondition,
    shifted,
)
from stages.parts.backbones.moe import Load, MoE, MoEConfig
from stages.parts.config import MAX_NAMES, Below1, Count, Epsilon, Even, PartConfig, Positive, Ratio, Size, parse_part, whole_heads
from stages.parts.layers import NORMS, GeluMLP, HeadNorm, LayerNorm, NormKind, RMSNorm, SwiGLU, init_linear
from stages.parts.packed import Packed
from stages.sequence.masks import additive, is_causal, may_attend
from stages.sequence.segment import Layout

Duplicated = Literal["norm", "qkv", "out", "mlp", "modulation"]
MAX_STACKS = 2**16  # feed-forward networks of one transformer: twice those of the largest published mixtures
ROLES: tuple[Duplicated, ...] = ("norm", "qkv", "out", "mlp", "modulation")


class RopeScalingConfig(PartConfig):
    """Rotary positions that turn slower, for contexts longer than the model was first trained on.

    linear: every channel `factor` times slower (arXiv:2306.15595). llama3: only waves longer than original_length / low_freq_factor
    are; those shorter than original_length / high_freq_factor stay, and between the two the change is gradual in the frequency
    ("The Llama 3 Herd of Models", arXiv:2407.21783, as Llama 3.1 was released).
    """

    kind: Literal["llama3", "linear"]
    factor: Positive
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_length: int = Field(default=8192, ge=1, le=2**30)

    @model_validator(mode="after")
    def _frequencies_in_order(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor must be more than low_freq_factor, found {self.high_freq_factor} and {self.low_freq_factor}"
            )
        return self

    def slower(self, rate: Tensor) -> Tensor:
        """Radians a position → the same, scaled."""
        if self.kind == "linear":
            return rate / self.factor
        turns = self.original_length * rate / (2 * math.pi)  # within the original length
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return kept * rate + (1 - kept) * rate / self.factor


class RopeConfig(PartConfig):
    """Rotary positions (RoFormer, arXiv:2104.09864). `axes` gives the head's channels to (t, h, w); without it all turn with t.

    rates: one falling row of them, cut between the axes (Qwen2-VL, arXiv:2409.12191), or for each axis a whole row "of-its-own"
    (two-dimensional RoPE: LlamaGen, arXiv:2406.06525; EVA-02), or the axes take the falling rates in turn, "interleaved", so that each has
    fast and slow ones (Mogao, arXiv:2505.05472; Qwen3-VL)."""

    kind: Literal["rope"] = "rope"
    theta: float = Field(default=10000.0, gt=0, le=1e12)
    axes: tuple[Even, Even, Even] | None = None
    scaling: RopeScalingConfig | None = None
    rates: Literal["cut", "of-its-own", "interleaved"] = "cut"


class NormConfig(PartConfig):
    """Which normalisation, and where: before each branch."""

    kind: NormKind = "rms"
    eps: Epsilon = 1e-6


class MLPConfig(PartConfig):
    """The feed-forward network of a block."""

    kind: Literal["swiglu", "gelu"] = "swiglu"


MLPS: dict[str, type[PartConfig]] = {"swiglu": MLPConfig, "gelu": MLPConfig, "moe": MoEConfig}


class TransformerConfig(PartConfig):
    """Sizes as in the papers: `mlp_ratio` · width is the hidden width of the MLP, `kv_heads` defaults to `heads`.

    experts: names; a port says which one its tokens use. duplicate: the modules each expert owns. expert_init = "copy" starts
    every expert from the first one's weights. qk_norm: norms queries and keys, with one weight that all heads share, true for the kind
    that `norm` has, or by a LayerNorm whose weights are each head's own. modulation: noise levels act on every layer (adaptive layer
    norm), on each token that of its block.
    """

    kind: Literal["transformer"] = "transformer"
    width: Size
    depth: Count
    heads: Count
    kv_heads: Count | None = None
    head_dim: Size | None = None
    mlp_ratio: Ratio = 4.0
    mlp: MLPConfig | MoEConfig = MLPConfig()
    norm: NormConfig = NormConfig()
    qk_norm: bool | NormKind | Literal["layer-per-head"] = False
    bias: Literal["none", "qkv", "all"] = "none"
    rope: RopeConfig = RopeConfig()
    experts: tuple[str, ...] = Field(default=("main",), min_length=1, max_length=MAX_NAMES)
    duplicate: tuple[Duplicated, ...] = Field(default=ROLES, max_length=len(ROLES))
    expert_init: Literal["random", "copy"] = "random"
    dropout: Below1 = 0.0
    modulation: ModulationKind = "none"

    @field_validator("mlp", mode="before")
    @classmethod
    def _parse_mlp(cls, table: Any) -> Any:
        return parse_part(MLPS, table, "mlp") if isinstance(table, Mapping) else table

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.head_dim is None:
            whole_heads(self.width, self.heads)
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads must divide heads = {self.heads}, found {self.kv_heads}")
        if self.attention_dim % 2:
            raise ValueError(f"head_dim must be even, since its channels turn in pairs, found {self.attention_dim}")
        if self.rope.axes is not None and sum(self.rope.axes) != self.attention_dim:
            raise ValueError(f"rope.axes must add up to the {self.attention_dim} channels of a head, found {list(self.rope.axes)}")
        if not self.mlp_width:
            raise ValueError(f"mlp_ratio = {self.mlp_ratio} leaves no hidden unit for the width {self.width}")
        if len(set(self.experts)) < len(self.experts):
            raise ValueError(f"experts must have different names, found {', '.join(self.experts)}")
        stacks = self.depth * len(self.experts) * (self.mlp.experts if isinstance(self.mlp, MoEConfig) else 1)
        if stacks > MAX_STACKS:
            raise ValueError(f"depth and experts ask for {stacks:,} feed-forward networks, expected at most {MAX_STACKS:,}")
        return self

    @property
    def attention_dim(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def mlp_width(self) -> int:
        return round(self.width * self.mlp_ratio)

    def build(self) -> "Transformer":
        return Transformer(self)


class KeyValueCache:
    """Keys and values of the tokens seen so far, preallocated. Columns are shared by the whole batch; a row's padding columns
    carry sample_id -1 in `layout`, which nobody attends to, so ragged prompts need no second mechanism.

    A forward pass writes its columns behind the committed ones; without `commit` the next pass overwrites them. Denoising steps
    and rounds of masked decoding therefore reuse the prefix and leave no trace. Where many columns follow one by one, their layout
    is reserved at once and each pass is kept by `advance`.
    """

    def __init__(self, config: TransformerConfig, layout: Layout, capacity: int, dtype: torch.dtype) -> None:
        b = layout.shape[0]
        device = layout.sample_id.device
        shape = (b, config.kv_heads or config.heads, capacity, config.attention_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.depth)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.depth)]
        self.table = Layout(**{name: value.new_zeros(b, capacity, *value.shape[2:]) for name, value in vars(layout).items()})
        self.capacity, self.length = capacity, 0

    @property
    def layout(self) -> Layout:
        """Of the committed columns (b, length)."""
        return self.table.columns(0, self.length)

    def reserve(self, layout: Layout) -> Layout:
        """Say where the next columns stand; returns the layout up to and including them."""
        stop = self.length + layout.shape[1]
        if stop > self.capacity:
            raise ValueError(f"the key/value cache holds {self.capacity} columns, {stop} are needed")
        for name, value in vars(layout).items():
            getattr(self.table, name)[:, self.length : stop] = value
        return self.table.columns(0, stop)

    def advance(self, count: int = 1) -> None:
        """Keep the next `count` columns, which are reserved and were written by a pass."""
        self.length += count

    def commit(self, layout: Layout) -> None:
        """Keep the columns the last forward pass wrote for `layout`."""
        self.reserve(layout)
        self.advance(layout.shape[1])

    def end_rows(self, rows: Tensor) -> None:
        """From the next column on, what is reserved for these rows (bool (b,)) is padding."""
        self.table.sample_id[:, self.length :].masked_fill_(rows[:, None], -1)

    def extend(self, place: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new columns; returns that layer's keys and values (b, kv, k, head_dim) up to and including them."""
        start, count = self.length, key.shape[2]
        keys, values = self.keys[place], self.values[place]
        keys.narrow(2, start, count).copy_(key)
        values.narrow(2, start, count).copy_(value)
        return keys.narrow(2, 0, start + count), values.narrow(2, 0, start + count)


Function = Callable[..., Tensor]
Layer = dict[str, list[Function]]


def without_module(copy: Function) -> Function:
    """The same function with its weights looked up once: in a decode step, calling modules takes as long as computing."""
    if isinstance(packed := getattr(copy, "forward", None), Packed):
        return packed
    if type(copy) is nn.Linear:
        return partial(F.linear, weight=copy.weight, bias=copy.bias)
    if type(copy) is RMSNorm:
        return partial(torch.rms_norm, normalized_shape=(copy.dim,), weight=copy.weight, eps=copy.eps)
    if type(copy) is SwiGLU:
        return partial(_swiglu, gate_up=without_module(copy.gate_up), down=without_module(copy.down))
    return copy


def _swiglu(x: Tensor, gate_up: Function, down: Function) -> Tensor:
    gate, up = gate_up(x).chunk(2, dim=-1)
    return down(F.silu(gate) * up)


class Routing:
    """Tokens grouped by expert, and back. Where all tokens are of one expert, `only`, both are the identity."""

    def __init__(self, expert_id: Tensor, num_experts: int) -> None:
        flat = expert_id.reshape(-1)
        self.counts = torch.bincount(flat, minlength=num_experts).tolist() if num_experts > 1 else [flat.numel()]
        self.only = next((expert for expert, count in enumerate(self.counts) if count == flat.numel()), None)
        if self.only is None:
            self.order = torch.argsort(flat, stable=True)
            self.inverse = torch.empty_like(self.order).scatter_(0, self.order, torch.arange(flat.numel(), device=flat.device))

    def group(self, x: Tensor) -> Tensor:
        """(n, ...) in table order → expert order."""
        return x if self.only is not None else x.index_select(0, self.order)

    def ungroup(self, x: Tensor) -> Tensor:
        return x if self.only is not None else x.index_select(0, self.inverse)

    def through(self, copies: Sequence[Function], *rows: Tensor) -> Tensor:
        """One function, of which each expert may have its own copy, applied to tensors with a row for each token in expert order."""
        if len(copies) == 1:
            return copies[0](*rows)
        if self.only is None:
            shares = zip(*(values.split(self.counts) for values in rows), strict=True)
            return torch.cat([copy(*own) for copy, own in zip(copies, shares, strict=True)])
        if not torch.is_grad_enabled():
            return copies[self.only](*rows)
        # while training every expert runs, also on no token: ranks average the gradients of the same weights
        return torch.cat([copy(*(v if expert == self.only else v[:0] for v in rows)) for expert, copy in enumerate(copies)])


@dataclass(frozen=True, slots=True)
class Arrangement:
    """All that a pass needs besides its content: what depends on places, and what each layer computes. Made once for many passes.

    layers: role → function, one that all experts share or one for each. cos, sin: (b, l, 1, head_dim). mask: added to attention
    scores (b, 1, q, k); without one every row sees every column, or with `causal` those up to its own. real: bool (n,) in expert
    order, False for padding.
    """

    layers: list[Layer]
    final_norm: list[Function]
    routing: Routing
    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    causal: bool
    real: Tensor


class Stack(nn.Module):
    """The modules one owner (an expert, or what all experts share) has in each layer."""

    def __init__(self, config: TransformerConfig, roles: tuple[str, ...]) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(nn.ModuleDict(self._layer(roles)) for _ in range(config.depth))
        if "norm" in roles:
            self.final_norm = NORMS[config.norm.kind](config.width, config.norm.eps)
        if "modulation" in roles:
            self.final_modulation = Modulation(config.modulation, config.width, FINAL_PARTS)

    def _layer(self, roles: tuple[str, ...]) -> dict[str, nn.Module]:
        c = self.config
        norm = NORMS[c.norm.kind]
        kv = (c.kv_heads or c.heads) * c.attention_dim
        attention = c.heads * c.attention_dim
        modules: dict[str, nn.Module] = {}
        if "norm" in roles:
            modules["attention_norm"], modules["mlp_norm"] = norm(c.width, c.norm.eps), norm(c.width, c.norm.eps)
        if "qkv" in roles:
            modules["qkv"] = nn.Linear(c.width, attention + 2 * kv, bias=c.bias != "none")
            if c.qk_norm == "layer-per-head":
                for role, heads in (("q_norm", c.heads), ("k_norm", c.kv_heads or c.heads)):
                    modules[role] = HeadNorm(heads, c.attention_dim, c.norm.eps)
            elif c.qk_norm:
                of_heads = norm if c.qk_norm is True else NORMS[c.qk_norm]
                modules["q_norm"], modules["k_norm"] = of_heads(c.attention_dim, c.norm.eps), of_heads(c.attention_dim, c.norm.eps)
        if "out" in roles:
            modules["out"] = nn.Linear(attention, c.width, bias=c.bias == "all")
        if "mlp" in roles:
            bias = c.bias == "all"
            if isinstance(c.mlp, MoEConfig):
                modules["mlp"] = MoE(c.mlp, c.width, c.mlp_width, bias)
            else:
                modules["mlp"] = (SwiGLU if c.mlp.kind == "swiglu" else GeluMLP)(c.width, c.mlp_width, bias)
        if "modulation" in roles:
            modules["modulation"] = Modulation(c.modulation, c.width, BRANCH_PARTS)
        return modules

    def init_weights(self, generator: Generator) -> None:
        """norms: ones · qkv: 1/sqrt(fan in) · out, down: the same over sqrt(2 · depth), so that the residual stream keeps its scale."""
        out_std = 1.0 / math.sqrt(2 * self.config.depth)
        for module in self.modules():
            if isinstance(module, RMSNorm | LayerNorm | HeadNorm | Modulation):
                module.init_weights(generator)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            if "qkv" in layer:
                init_linear(layer["qkv"], generator)
            if "out" in layer:
                init_linear(layer["out"], generator, std=out_std / math.sqrt(self.config.heads * self.config.attention_dim))
            if "mlp" in layer:
                mlp: Any = layer["mlp"]
                mlp.init_weights(generator, out_std)


class Transformer(nn.Module):
    """x (b, l, d) with its layout → hidden (b, l, d), after the final norm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        roles: tuple[str, ...] = tuple(role for role in ROLES if role != "modulation" or config.modulation != "none")
        owned = tuple(role for role in roles if role in config.duplicate or len(config.experts) == 1)
        common = tuple(role for role in roles if role not in owned)
        self.experts = nn.ModuleDict({name: Stack(config, owned) for name in config.experts})
        self.shared = Stack(config, common) if common else None
        self.timestep = TimestepCondition(config.modulation, config.width) if config.modulation != "none" else None
        # for each layer, role → the module all share, or one copy an expert; the stacks above own them
        owners = [stack for stack in [self.shared, *self.experts.values()] if isinstance(stack, Stack)]
        self._layers: list[Layer] = [{} for _ in range(config.depth)]
        for owner in owners:
            for place, layer in enumerate(owner.layers):
                assert isinstance(layer, nn.ModuleDict)
                for role, module in layer.items():
                    self._layers[place].setdefault(role, []).append(module)
        self._final_norm: list[Function] = [owner.final_norm for owner in owners if hasattr(owner, "final_norm")]
        self._final_modulation: list[Function] = [owner.final_modulation for owner in owners if hasattr(owner, "final_modulation")]

    def init_weights(self, generator: Generator) -> None:
        stacks = [stack for stack in self.experts.values() if isinstance(stack, Stack)]
        for stack in stacks:
            stack.init_weights(generator)
        if self.config.expert_init == "copy":
            self.copy_expert(self.config.experts[0])
        if self.shared is not None:
            self.shared.init_weights(generator)
        if self.timestep is not None:
            self.timestep.init_weights(generator)

    def shard_units(self) -> list[list[nn.Module]]:
        """What is put together when it runs, where weights are kept in shards: the modules of one layer, of all experts."""
        return [[copy for copies in layer.values() for copy in copies if isinstance(copy, nn.Module)] for layer in self._layers]

    def idle(self, loads: list[Load] | None = None) -> Tensor:
        """The hidden row (1, 1, d) of one token of padding: what a rank runs that has no token for this network where others have."""
        device = next(self.parameters()).device
        return self(torch.zeros(1, 1, self.config.width, device=device), Layout.padding(1, 1).to(device), loads=loads)

    def copy_expert(self, source: str) -> None:
        """Every other expert starts from the weights of `source` (LMFusion, BAGEL)."""
        weights = self.experts[source].state_dict()
        for name, stack in self.experts.items():
            if name != source:
                stack.load_state_dict(weights)

    def forward(
        self,
        x: Tensor,
        layout: Layout | Arrangement,
        cache: KeyValueCache | None = None,
        loads: list[Load] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """layout: where the tokens stand, or what `arrange` made of that. loads: is given one entry for each mixture of experts.
        noise: the level (b, l) that modulates each token, 0 without."""
        b, length, _ = x.shape
        places = layout if isinstance(layout, Arrangement) else self.arrange(layout, cache, x.dtype)
        routing = places.routing
        grouped = routing.group(x.reshape(b * length, -1))  # (n, d)
        modulations = self._modulations(noise, routing, x)
        for place, layer in enumerate(places.layers):
            of_attention, of_mlp = modulations(layer["modulation"], 2) if modulations else (None, None)
            attend = partial(self._attend, place, layer, shape=(b, length), places=places, cache=cache)
            grouped = grouped + self._branch(layer["attention_norm"], attend, grouped, routing, of_attention)
            feed = partial(self._feed_forward, layer, places=places, loads=loads)
            grouped = grouped + self._branch(layer["mlp_norm"], feed, grouped, routing, of_mlp)
        last = routing.through(places.final_norm, grouped)
        if modulations:
            ((shift, scale),) = modulations(self._final_modulation, 1)
            last = shifted(last, shift, scale)
        return routing.ungroup(last).reshape(b, length, -1)

    def _branch(
        self, norm: list[Function], run: Function, grouped: Tensor, routing: Routing, modulation: tuple[Tensor, ...] | None
    ) -> Tensor:
        """What a branch adds to the residual stream (n, d)."""
        normed = routing.through(norm, grouped)
        if modulation is None:
            return self._drop(run(normed))
        shift, scale, gate = modulation
        return gate * self._drop(run(shifted(normed, shift, scale)))

    def _modulations(self, noise: Tensor | None, routing: Routing, x: Tensor) -> Callable[..., Any] | None:
        """A function (modules, branches) → for each branch its parts, (n, d) each in expert order; None without modulation.

        The condition is embedded once for each distinct level, not for each token.
        """
        if self.timestep is None:
            return None
        levels, which = torch.unique(x.new_zeros(x.shape[:2]) if noise is None else noise, return_inverse=True)
        condition = self.timestep(levels)
        which = routing.group(which.reshape(-1))

        def of(modules: list[Any], branches: int) -> list[tuple[Tensor, ...]]:
            copies: list[Function] = [partial(_picked, module, condition) for module in modules]
            parts = routing.through(copies, which).unbind(1)
            size = len(parts) // branches
            return [parts[start : start + size] for start in range(0, len(parts), size)]

        return of

    # places

    def arrange(self, layout: Layout, cache: KeyValueCache | None, dtype: torch.dtype) -> Arrangement:
        """For passes over `layout` behind the committed columns of `cache`."""
        routing = Routing(layout.expert_id, len(self.config.experts))
        cos, sin = self._rotation(layout.positions, dtype)
        causal = (cache is None or not cache.length) and is_causal(layout)
        keys = layout if cache is None else cache.reserve(layout)
        mask = None if causal else additive(may_attend(layout, keys), dtype)
        return Arrangement(self._layers, self._final_norm, routing, cos, sin, mask, causal, routing.group(is_real(layout)))

    def arrange_columns(self, cache: KeyValueCache, count: int) -> list[Arrangement]:
        """The next `count` reserved columns, one pass each; every pass is kept (`cache.advance`) before the next one runs."""
        start = cache.length
        keys = cache.table.columns(0, start + count)
        layout = keys.columns(start, start + count)
        visible = may_attend(layout, keys)
        hides = bool((~visible).tril(start).any())  # anything at or before a column that it may not see
        mask = additive(visible, cache.keys[0].dtype) if hides else None
        cos, sin = (wave.split(1, dim=1) for wave in self._rotation(layout.positions, cache.keys[0].dtype))
        experts = len(self.config.experts)
        same = Routing(layout.expert_id, experts)
        columns = [layout.columns(place, place + 1) for place in range(count)]
        routings = [same if same.only is not None else Routing(column.expert_id, experts) for column in columns]
        layers = [{role: [without_module(copy) for copy in copies] for role, copies in layer.items()} for layer in self._layers]
        final_norm = [without_module(copy) for copy in self._final_norm]
        return [
            Arrangement(
                layers,
                final_norm,
                routing,
                cos[place],
                sin[place],
                None if mask is None else mask[:, :, place : place + 1, : start + place + 1],
                causal=False,
                real=routing.group(is_real(column)),
            )
            for place, (column, routing) in enumerate(zip(columns, routings, strict=True))
        ]

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin as `rotate` takes them, (b, l, 1, head_dim), for positions (b, l, 3)."""
        half = self.config.attention_dim // 2
        rope = self.config.rope
        rate = rope.theta ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
        if rope.scaling is not None:
            rate = rope.scaling.slower(rate)
        if rope.axes is None:
            angle = positions[..., :1].float() * rate
        else:
            axis = torch.repeat_interleave(torch.arange(3, device=positions.device), torch.tensor(rope.axes, device=positions.device) // 2)
            if rope.rates == "interleaved":  # t, h, w, t, h, w, ..., an axis that has all its rates being left out
                turns = torch.cat([torch.arange(size // 2, device=positions.device) * 3 + place for place, size in enumerate(rope.axes)])
                axis = axis.index_select(0, turns.argsort())
            if rope.rates == "of-its-own":
                rate = torch.cat(
                    [rope.theta ** (-2 * torch.arange(size // 2, device=positions.device) / max(size, 1)) for size in rope.axes]
                )
            angle = positions.float().index_select(2, axis) * rate
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], dim=-1).unsqueeze(2).to(dtype), torch.cat([-sin, sin], dim=-1).unsqueeze(2).to(dtype)

    # layers

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x

    def _feed_forward(self, layer: Layer, normed: Tensor, *, places: Arrangement, loads: list[Load] | None) -> Tensor:
        """normed (n, d) in expert order → the MLP's (n, d) in expert order."""
        if not isinstance(self.config.mlp, MoEConfig):
            return places.routing.through(layer["mlp"], normed)

        def noting(moe: Any, x: Tensor, real: Tensor) -> Tensor:
            out, load = moe(x, real)
            if loads is not None:
                loads.append(load)
            return out

        copies: list[Any] = [partial(noting, moe) for moe in layer["mlp"]]
        return places.routing.through(copies, normed, places.real)

    def _attend(
        self,
        place: int,
        layer: Layer,
        normed: Tensor,
        *,
        shape: tuple[int, int],
        places: Arrangement,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """normed (n, d) in expert order → what attention adds to each token (n, d), in expert order."""
        c = self.config
        kv_heads, dim = c.kv_heads or c.heads, c.attention_dim
        routing = places.routing
        qkv = routing.through(layer["qkv"], normed)
        if c.qk_norm:
            q, k, v = qkv.split([c.heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
            q = routing.through(layer["q_norm"], q.reshape(-1, c.heads, dim))
            k = routing.through(layer["k_norm"], k.reshape(-1, kv_heads, dim))
            qkv = torch.cat([q.flatten(1), k.flatten(1), v], dim=1)
        heads = routing.ungroup(qkv).view(*shape, -1, dim)  # queries, keys, values: (b, l, a + 2 kv, head_dim)
        turning, v = heads.split_with_sizes([c.heads + kv_heads, kv_heads], dim=2)
        q, k = rotate(turning, places.cos, places.sin).split_with_sizes([c.heads, kv_heads], dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (b, a, l, head_dim)
        if cache is not None:
            k, v = cache.extend(place, k, v)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=places.mask, is_causal=places.causal, enable_gqa=kv_heads != c.heads)
        return routing.through(layer["out"], routing.group(attended.transpose(1, 2).reshape(shape[0] * shape[1], -1)))


def _picked(modulation: Modulation, condition: Condition, which: Tensor) -> Tensor:
    """The modulation of each token (n, parts, d), whose level is the `which`-th."""
    return modulation(condition).index_select(0, which)


def is_real(layout: Layout) -> Tensor:
    """Bool (b·l,): False for padding."""
    return layout.sample_id.reshape(-1) >= 0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (..., head_dim): channel i turns with channel i + head_dim / 2, as Llama's.

    cos (..., head_dim) holds each angle's cosine twice, sin its sine with a minus before the first half; then the two halves turn
    in one product each.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
