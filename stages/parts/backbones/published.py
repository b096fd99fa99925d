"""Language models that others released, as starts for our transformer: which weight is which, and what a recipe must say for them.

One layout, which Llama, Mistral, Qwen2, Qwen2.5 and Qwen3 share (and what is built like them, such as SmolLM2, Emu3 and, but for its norms
of queries and keys, Chameleon): `embed_tokens`, `layers.N.self_attn.q_proj` …,
`norm`, all below one prefix (`model.`, or a longer one inside a larger model), and `lm_head`, absent where it is the embedding. Widths,
biases and norms of queries and keys show in the weights; heads, eps and rotary positions only in config.json. Other families use the
same names for another computation (Gemma adds one to its norms, Granite multiplies), so those that are read are listed by model_type.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor, cat

from stages.documents import Document, Int, Real, Size, check
from stages.errors import DataError, UsageError
from stages.parts.backbones.transformer import RopeScalingConfig, Transformer, TransformerConfig
from stages.parts.config import PartConfig

LAYOUT = "llama"
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "chameleon", "emu3_text_model")
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"  # the embedding's place tells the prefix
LEFT_OUT = ("rotary_emb.inv_freq",)  # a constant that old files carry
BESIDE = ("vqmodel.",)  # stands within Chameleon's prefix, and is no part of its language model
HEAD_EPS = 1e-5  # of norms of queries and keys that are each head's own, whatever config.json says of the others

NORM = {"final_norm": ("norm",)}
LAYER = {  # ours → theirs; several are stacked in this order
    "attention_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
    "out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}

SCALING = {  # of rotary positions: kind → our keys, theirs
    "linear": {"factor": "factor"},
    "llama3": {
        **{key: key for key in ("factor", "low_freq_factor", "high_freq_factor")},
        "original_length": "original_max_position_embeddings",
    },
}

# what must agree, by key of the recipe: how it is read from a config. In this order, a default may follow from what stands before it
SETTINGS: dict[str, Callable[[TransformerConfig], Any]] = {
    "width": lambda c: c.width,
    "depth": lambda c: c.depth,
    "heads": lambda c: c.heads,
    "kv_heads": lambda c: c.kv_heads or c.heads,
    "head_dim": lambda c: c.attention_dim,
    "mlp_ratio": lambda c: c.mlp_ratio,
    "mlp.kind": lambda c: c.mlp.kind,
    "norm.kind": lambda c: c.norm.kind,
    "norm.eps": lambda c: c.norm.eps,
    "qk_norm": lambda c: c.qk_norm,
    "bias": lambda c: c.bias,
    "rope.theta": lambda c: c.rope.theta,
    "rope.scaling": lambda c: c.rope.scaling,
}


class LanguageFacts(Document):
    """What is read of the config.json of a language model."""

    model_type: str | None = None
    hidden_act: str | None = None
    sliding_window: Int | None = None
    num_attention_heads: Size | None = None
    num_hidden_layers: Size | None = None
    num_key_value_heads: Size | None = None
    rms_norm_eps: Real | None = None
    rope_theta: Real | None = None
    partial_rotary_factor: Real | None = None
    original_max_position_embeddings: Int | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None


class RopeFacts(Document):
    """What is read of its sections on rotary positions."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Real | None = None
    factor: Real | None = None
    low_freq_factor: Real | None = None
    high_freq_factor: Real | None = None
    original_max_position_embeddings: Int | None = None
    partial_rotary_factor: Real | None = None


def select(names: Iterable[str], where: str, inside: str = "") -> dict[str, str]:
    """Of all names in a file those of the one language model, each under itself; what stands around it is not read.

    inside: the path in a larger model that was asked for. DataError if there is no language model, or a choice.
    """
    names = list(names)
    found = sorted({name.removesuffix(EMBEDDING) for name in names if name == EMBEDDING or name.endswith("." + EMBEDDING)})
    if inside:
        found = [prefix for prefix in found if prefix.startswith(inside.rstrip(".") + ".")]
    if len(found) != 1:
        what = (
            f"holds {len(found)} language models"
            if found
            else f"no weight is called …{EMBEDDING}, so this is no language model in a layout that is known"
        )
        hint = (
            f"choose with #PATH, one of: {', '.join(found)}"
            if found
            else f"known is that of {', '.join(MODEL_TYPES)}; here the names begin {', '.join(sorted(names)[:4])}"
        )
        raise DataError(f"{where}: {what}", hint=hint)
    parent = found[0].removesuffix("model.") if found[0].endswith("model.") else found[0]
    heads = {parent + HEAD, HEAD} & set(names)
    beside = tuple(found[0] + part for part in BESIDE)
    kept = [name for name in names if name.startswith(found[0]) and not name.endswith(LEFT_OUT) and not name.startswith(beside)]
    return {name: name for name in [*kept, *heads]}


def prefix_of(tensors: Iterable[str]) -> str:
    """What stands before the names of a language model that `select` found."""
    return next(name.removesuffix(EMBEDDING) for name in tensors if name == EMBEDDING or name.endswith("." + EMBEDDING))


def vocabulary_of(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Embedding and head (rows, width); the same one where the release ties them."""
    embedding = tensors[prefix_of(tensors) + EMBEDDING]
    head = next((tensor for name, tensor in tensors.items() if name == HEAD or name.endswith("." + HEAD)), embedding)
    return embedding, embedding if facts_of(config).get("tie_word_embeddings", config.get("tie_word_embeddings")) else head


# --- what the recipe must say -----------------------------------------------------------------------------------------------------


def settings_of(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys of a [backbones.NAME] table that this release is, in the order of SETTINGS. UsageError for what the transformer cannot do."""
    if not config:
        raise DataError(
            f"{where}: there is no config.json beside the weights, and they do not show the number of heads, eps and rotary positions"
        )
    facts, prefix = facts_of(config), prefix_of(tensors)
    check(facts, f"{where}: config.json", LanguageFacts)
    kind = facts.get("model_type")
    if kind not in MODEL_TYPES:
        raise UsageError(
            f"{where}: config.json says model_type {kind!r}; of language models {', '.join(MODEL_TYPES)} are read",
            hint="another family may compute something else with the same names",
        )
    if facts.get("hidden_act", "silu") != "silu":
        raise UsageError(f"{where}: config.json says hidden_act {facts['hidden_act']!r}; only silu (SwiGLU) is read")
    if facts.get("swin_norm"):
        raise UsageError(f"{where}: norms after each branch (swin_norm), which the transformer here cannot")
    window = facts.get("sliding_window")
    if window and facts.get("use_sliding_window", kind == "mistral"):
        raise UsageError(f"{where}: attends through a sliding window of {window} tokens, which the transformer here cannot")
    absent = [key for key in ("num_attention_heads", "num_hidden_layers") if key not in facts]
    if absent:
        raise DataError(f"{where}: config.json does not say {', '.join(absent)}")

    def shape(part: str) -> tuple[int, ...]:
        name = f"{prefix}layers.0.{part}.weight"
        if name not in tensors:
            raise DataError(f"{where}: {name} is missing")
        return matrix(name)

    def matrix(name: str) -> tuple[int, ...]:
        found = tuple(tensors[name].shape)
        if len(found) != 2 or 0 in found:
            raise DataError(f"{where}: {name} has the shape {found}, expected a matrix")
        return found

    heads, width = int(facts["num_attention_heads"]), matrix(prefix + EMBEDDING)[1]
    head_dim, left = divmod(shape("self_attn.q_proj")[0], heads)
    if left or not head_dim:
        raise DataError(f"{where}: {shape('self_attn.q_proj')[0]} rows of queries do not divide into num_attention_heads = {heads}")
    rope = facts.get("rope_parameters") or {"rope_theta": facts.get("rope_theta", 10000.0), **(facts.get("rope_scaling") or {})}
    rope = {key: value for key, value in rope.items() if value is not None}
    check(rope, f"{where}: config.json: rotary positions", RopeFacts)
    return {
        "width": width,
        "depth": int(facts["num_hidden_layers"]),
        "heads": heads,
        "kv_heads": shape("self_attn.k_proj")[0] // head_dim,
        "head_dim": head_dim,
        "mlp_ratio": _ratio(shape("mlp.gate_proj")[0], width),
        "mlp.kind": "swiglu",
        "norm.kind": "rms",
        "norm.eps": float(facts.get("rms_norm_eps", 1e-6)),
        "qk_norm": _qk_norm(tensors, f"{prefix}layers.0.", facts, where),
        "bias": _bias(tensors, f"{prefix}layers.0.", where),
        "rope.theta": float(rope.get("rope_theta", facts.get("rope_theta", 10000.0))),
        "rope.scaling": _scaling(rope, facts, where),
    }


def facts_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of the language model: all of it, or the section of a larger model; null says nothing."""
    inner = config.get("text_config")
    return {key: value for key, value in (inner if inner and isinstance(inner, Mapping) else config).items() if value is not None}


def _ratio(hidden: int, width: int) -> float:
    """The shortest number that, times the width and rounded, is the hidden width of the MLP."""
    ratios = (round(hidden / width, digits) for digits in range(17))
    return next((ratio for ratio in ratios if round(width * ratio) == hidden), hidden / width)


def _bias(tensors: Mapping[str, Tensor], layer: str, where: str) -> str:
    q, out, up = (f"{layer}{part}.bias" in tensors for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"))
    known = {(False, False, False): "none", (True, False, False): "qkv", (True, True, True): "all"}
    if (q, out, up) not in known:
        raise UsageError(
            f"{where}: biases on queries {q}, on the output of attention {out}, in the MLP {up}: the transformer here has all, those of qkv, or none"
        )
    return known[q, out, up]


def _qk_norm(tensors: Mapping[str, Tensor], layer: str, facts: Mapping[str, Any], where: str) -> bool | str:
    norm = tensors.get(f"{layer}self_attn.q_norm.weight")
    if norm is None or norm.dim() == 1:
        return norm is not None
    if facts.get("rms_norm_eps", HEAD_EPS) != HEAD_EPS:
        raise UsageError(
            f"{where}: eps {facts['rms_norm_eps']:g} in its norms and {HEAD_EPS:g} in those of queries and keys: here it is one"
        )
    return "layer-per-head"


def _scaling(rope: Mapping[str, Any], facts: Mapping[str, Any], where: str) -> RopeScalingConfig | None:
    kind: Any = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", facts.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UsageError(f"{where}: rotates a part of each head only, which the transformer here cannot")
    if kind == "default":
        return None
    if kind not in SCALING:
        raise UsageError(f"{where}: config.json scales its rotary positions by {kind!r}; {', '.join(SCALING)} and none are read")
    said = {"original_max_position_embeddings": facts.get("original_max_position_embeddings"), **rope}
    keys = SCALING[kind]
    absent = [theirs for theirs in keys.values() if said.get(theirs) is None]
    if absent:
        raise DataError(f"{where}: config.json scales its rotary positions by {kind!r} and does not say {', '.join(absent)}")
    try:
        return RopeScalingConfig(kind=kind, **{ours: said[theirs] for ours, theirs in keys.items()})
    except ValidationError as error:
        raise DataError(f"{where}: config.json: rotary positions scaled by {kind!r}: {error.errors()[0]['msg']}") from None


def differing(config: TransformerConfig, settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key → (what the recipe has, what the release is), for the fewest keys that make the recipe's network the release's."""
    found: dict[str, tuple[Any, Any]] = {}
    adapted = config
    for key, value in settings.items():
        same = round(adapted.width * value) == adapted.mlp_width if key == "mlp_ratio" else SETTINGS[key](adapted) == value
        if not same:
            found[key] = (SETTINGS[key](config), value)
            adapted = _with(adapted, key, value)
    return found


def _with(config: TransformerConfig, key: str, value: Any) -> TransformerConfig:
    table, _, inner = key.partition(".")
    if inner:
        value = getattr(config, table).model_copy(update={inner: value})
    return config.model_copy(update={table: value})


def shown(value: Any) -> str:
    """A setting in a sentence."""
    if isinstance(value, PartConfig):
        return f"by {value.kind}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def assignment(address: str, key: str, value: Any) -> str:
    """`--set ADDRESS.KEY=VALUE` as it is typed in a shell."""
    if isinstance(value, PartConfig):
        inner = ", ".join(f"{name} = {_toml(entry)}" for name, entry in value.model_dump().items())
        return f"--set '{address}.{key}={{ {inner} }}'"
    return f"--set {address}.{key}={value if isinstance(value, str) else _toml(value)}"  # a bare word is a string


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value).lower()


# --- weights ----------------------------------------------------------------------------------------------------------------------


def translate(network: Transformer, expert: str, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Released weights under the network's names: of one expert, and of what all experts share.

    DataError lists what is missing, left over or of another shape, in the release's own names.
    """
    prefix = prefix_of(tensors)
    found: dict[str, Tensor] = {}
    missing: list[str] = []
    reshaped: list[str] = []
    used: set[str] = set()
    for name, own in network.state_dict().items():
        owner = next((owner for owner in (f"experts.{expert}.", "shared.") if name.startswith(owner)), None)
        if owner is None:
            continue
        theirs = [prefix + part for part in _theirs(name.removeprefix(owner))]
        used.update(theirs)
        missing += [part for part in theirs if part not in tensors]
        if any(part not in tensors for part in theirs):
            continue
        value = cat([tensors[part] for part in theirs]) if len(theirs) > 1 else tensors[theirs[0]]
        if value.shape != own.shape:
            shapes = ", ".join(f"{part} {tuple(tensors[part].shape)}" for part in theirs)
            reshaped.append(f"{shapes}, expected {tuple(own.shape)}" + (" together" if len(theirs) > 1 else ""))
        found[name] = value
    unexpected = sorted(name for name in tensors if name not in used and name != prefix + EMBEDDING and not name.endswith(HEAD))
    lists = [("missing", missing), ("unexpected", unexpected), ("reshaped", reshaped)]
    if any(names for _, names in lists):
        told = "; ".join(f"{title}: {', '.join(names[:6])}{' …' if len(names) > 6 else ''}" for title, names in lists if names)
        raise DataError(
            f"{where}: {len(missing)} weights missing, {len(unexpected)} unexpected, {len(reshaped)} reshaped (layout {LAYOUT}); {told}"
        )
    return found


def _theirs(name: str) -> tuple[str, ...]:
    """`layers.3.qkv.bias` → the release's names for it, without prefix."""
    path, _, leaf = name.rpartition(".")
    if path in NORM:
        return tuple(f"{part}.{leaf}" for part in NORM[path])
    _, number, role = path.split(".", 2)
    return tuple(f"layers.{number}.{part}.{leaf}" for part in LAYER[role])
