"""The transformer that every sequence model of mmgen runs on.

Pre-norm blocks, rotary positions on one or three axes, grouped key/value heads, and *hard-routed experts*: each expert owns a
copy of the modules named in `duplicate`, each token passes through the copy its port names, and attention is computed once
over all tokens in their original order. One expert is the dense model; experts by modality are mixture-of-transformers
(arXiv:2411.04996) and LMFusion (arXiv:2412.15188); experts by role are BAGEL (arXiv:2505.14683). Between attentions the tokens
are kept grouped by expert, so each expert multiplies one contiguous block and nothing is computed twice or masked away.

Shape letters: b rows, l row length, q/k query and key length, d width, a heads, n = b·l tokens in expert order.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from stages.parts.config import PartConfig
from stages.parts.layers import NORMS, GeluMLP, LayerNorm, NormKind, RMSNorm, SwiGLU, init_linear
from stages.sequence.masks import additive, is_causal, may_attend
from stages.sequence.segment import Layout

Duplicated = Literal["norm", "qkv", "out", "mlp"]


class RopeConfig(PartConfig):
    """Rotary positions (RoFormer, arXiv:2104.09864). `axes` gives the head's channels to (t, h, w); without it all turn with t."""

    kind: Literal["rope"] = "rope"
    theta: float = 10000.0
    axes: tuple[int, int, int] | None = None


class NormConfig(PartConfig):
    """Which normalisation, and where: before each branch."""

    kind: NormKind = "rms"
    eps: float = 1e-6


class MLPConfig(PartConfig):
    """The feed-forward network of a block."""

    kind: Literal["swiglu", "gelu"] = "swiglu"


class TransformerConfig(PartConfig):
    """Sizes as in the papers: `mlp_ratio` · width is the hidden width of the MLP, `kv_heads` defaults to `heads`.

    experts: names; a port says which one its tokens use. duplicate: the modules each expert owns. expert_init = "copy" starts
    every expert from the first one's weights.
    """

    kind: Literal["transformer"] = "transformer"
    width: int
    depth: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    mlp_ratio: float = 4.0
    mlp: MLPConfig = MLPConfig()
    norm: NormConfig = NormConfig()
    qk_norm: bool = False
    bias: Literal["none", "qkv", "all"] = "none"
    rope: RopeConfig = RopeConfig()
    experts: tuple[str, ...] = ("main",)
    duplicate: tuple[Duplicated, ...] = ("norm", "qkv", "out", "mlp")
    expert_init: Literal["random", "copy"] = "random"
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)

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
    and rounds of masked decoding therefore reuse the prefix and leave no trace.
    """

    def __init__(self, config: TransformerConfig, layout: Layout, capacity: int, dtype: torch.dtype) -> None:
        b = layout.shape[0]
        shape = (b, config.kv_heads or config.heads, capacity, config.attention_dim)
        device = layout.sample_id.device
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.depth)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.depth)]
        self.layout = layout.columns(0, 0)
        self.capacity = capacity

    @property
    def length(self) -> int:
        return self.layout.shape[1]

    def commit(self, layout: Layout) -> None:
        """Keep the columns the last forward pass wrote for `layout`."""
        self.layout = self.layout.append(layout)

    def extend(self, place: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new columns; returns that layer's keys and values up to and including them."""
        start, stop = self.length, self.length + key.shape[2]
        if stop > self.capacity:
            raise ValueError(f"the key/value cache holds {self.capacity} columns, {stop} are needed")
        self.keys[place][:, :, start:stop] = key
        self.values[place][:, :, start:stop] = value
        return self.keys[place][:, :, :stop], self.values[place][:, :, :stop]


class Routing:
    """Tokens grouped by expert, and back. With one expert both are the identity."""

    def __init__(self, expert_id: Tensor, num_experts: int) -> None:
        self.grouped = num_experts > 1
        flat = expert_id.reshape(-1)
        self.counts = [flat.numel()]
        if self.grouped:
            self.order = torch.argsort(flat, stable=True)
            self.inverse = torch.empty_like(self.order).scatter_(0, self.order, torch.arange(flat.numel(), device=flat.device))
            self.counts = torch.bincount(flat, minlength=num_experts).tolist()

    def group(self, x: Tensor) -> Tensor:
        """(n, ...) in table order → expert order."""
        return x.index_select(0, self.order) if self.grouped else x

    def ungroup(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.inverse) if self.grouped else x


class Stack(nn.Module):
    """The modules one owner (an expert, or what all experts share) has in each layer."""

    def __init__(self, config: TransformerConfig, roles: tuple[str, ...]) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(nn.ModuleDict(self._layer(roles)) for _ in range(config.depth))
        if "norm" in roles:
            self.final_norm = NORMS[config.norm.kind](config.width, config.norm.eps)

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
            if c.qk_norm:
                modules["q_norm"], modules["k_norm"] = norm(c.attention_dim, c.norm.eps), norm(c.attention_dim, c.norm.eps)
        if "out" in roles:
            modules["out"] = nn.Linear(attention, c.width, bias=c.bias == "all")
        if "mlp" in roles:
            modules["mlp"] = (SwiGLU if c.mlp.kind == "swiglu" else GeluMLP)(c.width, c.mlp_width, c.bias == "all")
        return modules

    def init_weights(self, generator: Generator) -> None:
        """norms: ones · qkv: 1/sqrt(fan in) · out, down: the same over sqrt(2 · depth), so that the residual stream keeps its scale."""
        out_std = 1.0 / math.sqrt(2 * self.config.depth)
        for module in self.modules():
            if isinstance(module, RMSNorm | LayerNorm):
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
        roles: tuple[str, ...] = ("norm", "qkv", "out", "mlp")
        owned = tuple(role for role in roles if role in config.duplicate or len(config.experts) == 1)
        common = tuple(role for role in roles if role not in owned)
        self.experts = nn.ModuleDict({name: Stack(config, owned) for name in config.experts})
        self.shared = Stack(config, common) if common else None
        self._owned = owned

    def init_weights(self, generator: Generator) -> None:
        stacks = [stack for stack in self.experts.values() if isinstance(stack, Stack)]
        for stack in stacks:
            stack.init_weights(generator)
        if self.config.expert_init == "copy":
            self.copy_expert(self.config.experts[0])
        if self.shared is not None:
            self.shared.init_weights(generator)

    def copy_expert(self, source: str) -> None:
        """Every other expert starts from the weights of `source` (LMFusion, BAGEL)."""
        weights = self.experts[source].state_dict()
        for name, stack in self.experts.items():
            if name != source:
                stack.load_state_dict(weights)

    def forward(self, x: Tensor, layout: Layout, cache: KeyValueCache | None = None) -> Tensor:
        b, length, _ = x.shape
        routing = Routing(layout.expert_id, len(self.config.experts))
        cos, sin = self._rotation(layout.positions, x.dtype)
        causal = cache is None and is_causal(layout)
        keys = layout if cache is None else cache.layout.append(layout)
        mask = None if causal else additive(may_attend(layout, keys), x.dtype)
        grouped = routing.group(x.reshape(b * length, -1))  # (n, d)
        for place in range(self.config.depth):
            normed = self._through(place, "attention_norm", grouped, routing)
            attended = self._attend(place, normed, routing, (b, length), (cos, sin), mask, causal, cache)
            grouped = grouped + self._drop(self._through(place, "out", attended, routing))
            normed = self._through(place, "mlp_norm", grouped, routing)
            grouped = grouped + self._drop(self._through(place, "mlp", normed, routing))
        return routing.ungroup(self._each("final_norm", grouped, routing)).reshape(b, length, -1)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x

    def _attend(
        self,
        place: int,
        normed: Tensor,
        routing: Routing,
        shape: tuple[int, int],
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        causal: bool,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """normed (n, d) in expert order → attended (n, a·head_dim) in expert order."""
        c = self.config
        kv_heads, dim = c.kv_heads or c.heads, c.attention_dim
        qkv = self._through(place, "qkv", normed, routing)
        q, k, v = qkv.split([c.heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
        if c.qk_norm:
            q = self._through(place, "q_norm", q.reshape(-1, c.heads, dim), routing)
            k = self._through(place, "k_norm", k.reshape(-1, kv_heads, dim), routing)
        q, k, v = (routing.ungroup(part.reshape(-1, heads, dim)) for part, heads in ((q, c.heads), (k, kv_heads), (v, kv_heads)))
        q, k, v = (part.reshape(*shape, -1, dim).transpose(1, 2) for part in (q, k, v))  # (b, a, l, head_dim)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.extend(place, k, v)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=kv_heads != c.heads)
        return routing.group(attended.transpose(1, 2).reshape(shape[0] * shape[1], -1))

    def _through(self, place: int, name: str, x: Tensor, routing: Routing) -> Tensor:
        """One module of one layer, each expert on its own tokens."""
        if self.shared is not None:
            layer = self.shared.layers[place]
            assert isinstance(layer, nn.ModuleDict)
            if name in layer:
                return layer[name](x)
        stacks = [stack for stack in self.experts.values() if isinstance(stack, Stack)]
        if len(stacks) == 1:
            return stacks[0].layers[place][name](x)  # type: ignore[index]
        chunks = zip(stacks, x.split(routing.counts), strict=True)
        return torch.cat([stack.layers[place][name](chunk) for stack, chunk in chunks if len(chunk)])  # type: ignore[index]

    def _each(self, name: str, x: Tensor, routing: Routing) -> Tensor:
        if self.shared is not None and hasattr(self.shared, name):
            return getattr(self.shared, name)(x)
        chunks = zip(self.experts.values(), x.split(routing.counts), strict=True)
        return torch.cat([getattr(stack, name)(chunk) for stack, chunk in chunks if len(chunk)])

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (b, 1, l, head_dim / 2) for positions (b, l, 3)."""
        half = self.config.attention_dim // 2
        rope = self.config.rope
        rate = rope.theta ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
        if rope.axes is None:
            angle = positions[..., :1].float() * rate
        else:
            axis = torch.repeat_interleave(torch.arange(3, device=positions.device), torch.tensor(rope.axes, device=positions.device) // 2)
            angle = positions.float().index_select(2, axis) * rate
        return angle.cos().unsqueeze(1).to(dtype), angle.sin().unsqueeze(1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (b, a, l, head_dim): channel i turns with channel i + head_dim / 2, as Llama's."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
