"""A whole unified model that others released, as the start of a recipe's: `--init model=SOURCE`.

Read is what transformers saves of Chameleon, Emu3 and Janus: the language model, the rows of its vocabulary (where pictures are written in
the same vocabulary, config.json says which rows are their codes), and Janus's tower, aligners and image head. Every weight of the recipe
has to be there in its shape and every weight that is there has to be used, but for the picture tokenizer, which is a stage of its own
here (`mmgen pretrain-tokenizer --init autoencoders.vq=SOURCE`; Emu3's compresses time too and has no counterpart).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.documents import Document, Int, Real, Size, check
from stages.errors import DataError, UsageError
from stages.model import Model, Slice
from stages.parts.backbones import Transformer
from stages.parts.backbones import published as language
from stages.parts.encoders.siglip import SiglipVitConfig
from stages.parts.tokenizers import TextTokenizer
from stages.parts.tokenizers.picture_entries import code_of
from stages.sequence.segment import Content
from stages.training.released_network import differences, refuse, text_ports

if TYPE_CHECKING:
    from stages.training.released import Released, Start

ADDRESS = "model"
LEFT_OUT = ("model.vqmodel.", "vqmodel.")  # the picture tokenizer
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu-tanh", "quick_gelu": "quick-gelu"}

_ALIGNER = ("fc1", *(f"hidden_layers.{n}" for n in range(8)))  # the layers of Janus's MLPs


@dataclass(frozen=True)
class Layout:
    """tower: what stands before a vision tower's weights. places: modules of ours → theirs, outside of network, tower and words;
    {features} and {codes} are the recipe's ports of these contents."""

    tower: str = ""
    places: Mapping[str, str] = field(default_factory=dict)


LAYOUTS = {
    "chameleon": Layout(),
    "emu3": Layout(),
    "janus": Layout(
        tower="model.vision_model.",
        places={
            **{f"{{features}}.connector.layers.{n}": f"model.aligner.{part}" for n, part in enumerate(_ALIGNER)},
            "{codes}.connector.table": "model.generation_embeddings",
            **{f"{{codes}}.connector.aligner.layers.{n}": f"model.generation_aligner.{part}" for n, part in enumerate(_ALIGNER)},
            "{codes}.head.inner": "model.generation_head.proj_out",
            "{codes}.head.outer": "model.generation_head.vision_head",
        },
    ),
}


class WholeFacts(Document):
    """What is read of the config.json of a whole model, beside its language model and its tower."""

    vocabulary_map: dict[str, Int] | None = None


class TowerFacts(Document):
    """What is read of the section `vision_config`."""

    hidden_size: Size | None = None
    num_hidden_layers: Size | None = None
    num_attention_heads: Size | None = None
    patch_size: Size | None = None
    hidden_act: str | None = None
    use_qk_norm: bool | None = None
    mlp_ratio: Real | None = None
    layer_norm_eps: Real | None = None


def select(names: Iterable[str], where: str, inside: str = "") -> dict[str, str]:
    """Of all names in a file those that a network is started from, each under itself. DataError for a path inside: it is the whole."""
    if inside:
        raise DataError(f"{where}#{inside}: --init {ADDRESS}= takes a whole model", hint="name a part of the recipe to start it alone")
    return {name: name for name in names if not name.startswith(LEFT_OUT)}


def layout_of(released: Released) -> Layout:
    kind = str(released.config.get("model_type"))
    if kind not in LAYOUTS:
        raise UsageError(
            f"{released.source}: config.json says model_type {kind!r}; of whole models {', '.join(LAYOUTS)} are read",
            hint="a part of it may be read by itself, such as --init backbones.lm=…",
        )
    return LAYOUTS[kind]


def language_of(released: Released) -> dict[str, Tensor]:
    return {name: released.tensors[name] for name in language.select(released.tensors, released.source)}


def what_is_read(released: Released) -> Any:
    """All of config.json that the network depends on."""
    layout = layout_of(released)
    facts = language.settings_of(language_of(released), released.config, released.source)
    tower = tower_settings(released.config, released.source) if layout.tower else {}
    return facts, language.facts_of(released.config).get("tie_word_embeddings"), tower, code_rows(released.config)


def code_rows(config: Mapping[str, Any]) -> list[int]:
    """Row of the vocabulary for each code, in the order of the codes; none where pictures have a table of their own."""
    check(config, "config.json", WholeFacts)
    found = {code_of(name): row for name, row in (config.get("vocabulary_map") or {}).items()}
    found.pop(None, None)
    return [found[code] for code in sorted(found)]  # type: ignore[type-var]


def fill_model(model: Model, start: Start, released: Released, text: Mapping[str, TextTokenizer]) -> str:
    """Every weight of a model from a released one; returns what was done, in words.

    UsageError where the recipe's network is not that of the release, with what makes it that; DataError lists weights of either side
    that have no place in the other, by both names.
    """
    layout = layout_of(released)
    name, network = next(iter(model.recipe.backbones.items()))
    words = language_of(released)
    told, sets = differences(model, name, words, released.config, start.spec)
    ports = ports_of(model, layout)
    if layout.tower:
        encoder = model.recipe.ports[ports["features"]].encoder
        unlike = tower_differences(model.recipe.encoders[encoder], tower_settings(released.config, start.spec))
        told += [f"encoders.{encoder}.{key} {there}, here {here}" for key, (here, there) in unlike.items()]
        sets += [language.assignment(f"encoders.{encoder}", key, there) for key, (_, there) in unlike.items()]
    refuse(start, f"'{model.recipe.name}'", told, sets)

    backbone = model.backbones[name]
    assert isinstance(backbone, Transformer)
    translated = language.translate(backbone, network.experts[0], words, start.spec)
    found = {f"backbones.{name}.{key}": value for key, value in translated.items()}
    used = set(words)
    if layout.tower:
        theirs = {key: value for key, value in released.tensors.items() if key.startswith(layout.tower)}
        tower: Any = model.encoders[encoder]
        try:
            found |= {f"encoders.{encoder}.{key}": value for key, value in tower.import_weights(theirs).items()}
        except ValueError as error:
            raise DataError(f"{start.spec}: encoders.{encoder} from {layout.tower}…: {error}") from None
        used |= set(theirs)
    tables, notes = vocabulary(model, name, released, words, text)
    found |= tables

    missing: list[str] = []
    copied = tuple(f"backbones.{name}.experts.{expert}." for expert in network.experts[1:]) if network.expert_init == "copy" else ()
    places = {f"ports.{ours.format(**ports)}.": f"{theirs}." for ours, theirs in layout.places.items()}
    state = model.state_dict()
    for ours in state:
        place = next((place for place in places if ours.startswith(place)), None)
        if place is not None and places[place] + ours.removeprefix(place) in released.tensors:
            found[ours] = released.tensors[places[place] + ours.removeprefix(place)]
            used.add(places[place] + ours.removeprefix(place))
        elif place is not None:
            missing.append(f"{places[place] + ours.removeprefix(place)} (here {ours})")
        elif ours not in found and not ours.startswith(copied):
            missing.append(f"{ours}, which such a release does not have")
    unexpected = sorted(released.tensors.keys() - used)
    reshaped = [
        f"{ours} {tuple(state[ours].shape)}, there {tuple(value.shape)}"
        for ours, value in found.items()
        if value.shape != state[ours].shape
    ]
    lists = [("missing", missing), ("unexpected", unexpected), ("reshaped", reshaped)]
    if missing or unexpected or reshaped:
        told = [f"{title}: {', '.join(names[:6])}{' …' if len(names) > 6 else ''}" for title, names in lists if names]
        counts = ", ".join(f"{len(names)} {title}" for title, names in lists)
        raise DataError(f"{start.spec}: weights {counts} for recipe '{model.recipe.name}' (layout {released.layout}); {'; '.join(told)}")
    model.load_state_dict({**state, **found})
    return "; ".join([f"all weights from {start.spec} (layout {released.layout})", *notes])


def ports_of(model: Model, layout: Layout) -> dict[str, str]:
    """The recipe's port of each content that the layout has weights for. UsageError where it is not one."""
    found: dict[str, str] = {}
    for role in ("features", "codes") if layout.places else ():
        names = [name for name, port in model.recipe.ports.items() if port.content == Content(role) and port.enters == "sequence"]
        if len(names) != 1:
            told = ", ".join(names) or "none"
            raise UsageError(f"--init {ADDRESS}: the release has one port of content '{role}', recipe '{model.recipe.name}' has {told}")
        found[role] = names[0]
    return found


# --- the vocabulary -----------------------------------------------------------------------------------------------------------------


def vocabulary(
    model: Model, network: str, released: Released, words: Mapping[str, Tensor], text: Mapping[str, TextTokenizer]
) -> tuple[dict[str, Tensor], list[str]]:
    """Embedding and head with the release's rows: those of codes for the port of codes, the others in their order for words.

    UsageError where the text tokenizer is another one, or there are more codes or fewer.
    """
    tables = dict(zip(("connector", "head"), language.vocabulary_of(words, released.config), strict=True))
    codes = code_rows(released.config)
    rows = tables["connector"].shape[0]
    others = sorted(set(range(rows)) - set(codes))
    if outside := [row for row in codes if not 0 <= row < rows]:
        raise DataError(f"{released.source}: vocabulary_map in config.json names row {outside[0]} of a vocabulary of {rows:,}")
    state, filled, notes = model.state_dict(), dict[str, Tensor](), []
    for port in text_ports(model, network):
        piece = model.slices[port]
        require_same_words(model, port, released, piece, len(others), text.get(model.recipe.ports[port].tokenizer))
        count = min(piece.size, len(others))
        copy_rows(state, filled, piece, tables, others[:count])
        notes.append(f"ports.{port} with {count:,} of its {piece.size:,} rows")
    for port, piece in model.slices.items() if codes else ():
        if model.recipe.ports[port].content == Content.CODES:
            if piece.size != len(codes):
                raise UsageError(f"{released.source}: has {len(codes):,} codes in its vocabulary, ports.{port} has {piece.size:,}")
            copy_rows(state, filled, piece, tables, codes)
    return filled, notes


def require_same_words(model: Model, port: str, released: Released, piece: Slice, rows: int, tokenizer: TextTokenizer | None) -> None:
    file = Path(released.source) / "tokenizer.json"
    if tokenizer.extends(file) if file.is_file() and tokenizer is not None else piece.size == rows:
        return
    raise UsageError(
        f"--init {ADDRESS}: the {piece.size:,} words of ports.{port} are not the {rows:,} of {released.source}",
        hint=f"mmgen pretrain-tokenizer DATA --recipe text-bpe --init tokenizers.bpe={released.source} --out WORDS, then --tokenizer WORDS here",
    )


def copy_rows(state: Mapping[str, Tensor], filled: dict[str, Tensor], piece: Slice, tables: Mapping[str, Tensor], rows: list[int]) -> None:
    """The given rows of a release to the beginning of a port's slice, in the embedding and, where it is not the embedding, in the head."""
    for module, table in tables.items():
        name = f"ports.{piece.owner}.{module}.weight"
        if name in state:
            whole = filled.setdefault(name, state[name].clone())
            if whole.shape[1:] == table.shape[1:]:
                whole[piece.start : piece.start + len(rows)] = table.index_select(0, torch.tensor(rows, device=table.device))


# --- the tower ----------------------------------------------------------------------------------------------------------------------


def tower_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys of an [encoders.NAME] table that the release's vision tower is."""
    facts = config.get("vision_config") or {}
    check(facts, f"{where}: config.json: vision_config", TowerFacts)
    facts = {key: value for key, value in facts.items() if value is not None}
    absent = [key for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size") if key not in facts]
    activation = ACTIVATIONS.get(facts.get("hidden_act", "gelu"))
    if absent:
        raise DataError(f"{where}: vision_config in config.json does not say {', '.join(absent)}")
    if facts.get("use_qk_norm") or activation is None:
        raise UsageError(f"{where}: a tower with {'norms of queries and keys' if activation else facts['hidden_act']} is not read")
    return {
        "width": facts["hidden_size"],
        "depth": facts["num_hidden_layers"],
        "heads": facts["num_attention_heads"],
        "patch_size": facts["patch_size"],
        "mlp_ratio": facts.get("mlp_ratio", 4.0),
        "activation": activation,
        "eps": facts.get("layer_norm_eps", 1e-6),
    }


def tower_differences(config: Any, settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    if not isinstance(config, SiglipVitConfig):
        return {"kind": (config.kind, "siglip-vit")}
    return {key: (getattr(config, key), value) for key, value in settings.items() if getattr(config, key) != value}
