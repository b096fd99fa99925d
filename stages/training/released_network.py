"""A released language model as the start of a network: what the recipe must say, the expert that is filled, and the words that are its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stages.errors import DataError, UsageError
from stages.model import Model, backbone_of, covers
from stages.parts.backbones import Transformer
from stages.parts.backbones import published as language
from stages.parts.tokenizers import TextTokenizer
from stages.parts.tokenizers.released import table_beside
from stages.sequence.segment import Content

if TYPE_CHECKING:
    from stages.training.released import Released, Start


def fill_network(model: Model, start: Start, released: Released, text: Mapping[str, TextTokenizer]) -> str:
    """A released language model into one expert of a network and what its experts share, with the words that are the model's own."""
    family, _, rest = start.address.partition(".")
    name, _, part = rest.partition(".")
    config = model.recipe.backbones.get(name) if family == "backbones" else None
    expert = part.removeprefix("experts.") if part else config.experts[0] if config else ""
    if config is None or expert not in config.experts:
        networks = [f"backbones.{name}" for name in model.recipe.backbones]
        experts = [f"{address}.experts.{e}" for address in networks for e in model.recipe.backbones[address[10:]].experts]
        raise UsageError(
            f"--init {start.address}: released language models start networks or experts of them, and there is no such one",
            hint=f"there is {', '.join([*networks, *experts])}",
        )
    network = model.backbones[name]
    assert isinstance(network, Transformer)
    told, sets = differences(model, name, released.tensors, released.config, start.spec)
    refuse(start, f"backbones.{name}", told, sets)
    found = {f"backbones.{name}.{key}": value for key, value in language.translate(network, expert, released.tensors, start.spec).items()}
    found = {key: value for key, value in found.items() if covers(start.address, key)}
    words: dict[str, Tensor] = {}
    notes: list[str] = []
    embedding, head = language.vocabulary_of(released.tensors, released.config)
    for port in text_ports(model, name) if not part or expert == config.experts[0] else []:
        tables, note = own_words(model, port, released, (embedding, head), text.get(model.recipe.ports[port].tokenizer))
        words |= tables
        notes.append(note)
    model.load_state_dict({**found, **words}, strict=False)  # `translate` was strict
    return "; ".join([f"{start.address} from {start.spec} (layout {released.layout})", *notes])


def differences(
    model: Model, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str
) -> tuple[list[str], list[str]]:
    """What of a network and its words is not that of a released language model: in words, and as the `--set` that changes it."""
    network = model.recipe.backbones[name]
    unlike = language.differing(network, language.settings_of(tensors, config, where))
    embedding, head = language.vocabulary_of(tensors, config)
    tied = [
        owner
        for owner in sorted({model.slices[port].owner for port in text_ports(model, name)})
        if getattr(model.recipe.ports[owner].head, "tied", False) and head is not embedding
    ]
    told = [f"{key} {language.shown(there)}, here {language.shown(here)}" for key, (here, there) in unlike.items()]
    told += [f"a head of its own, here ports.{owner}.head is the embedding" for owner in tied]
    sets = [language.assignment(f"backbones.{name}", key, there) for key, (_, there) in unlike.items()]
    return told, sets + [language.assignment(f"ports.{owner}", "head.tied", False) for owner in tied]


def refuse(start: Start, what: str, told: list[str], sets: list[str]) -> None:
    """UsageError with every difference and every `--set`, where there is one."""
    if told:
        raise UsageError(
            f"--init {start.address}={start.spec}: not the network of {what} in this recipe: {'; '.join(told)}",
            hint=f"make it that network: {' '.join(sets)}",
        )


def text_ports(model: Model, network: str) -> list[str]:
    """The ports by which words enter a network."""
    ports = model.recipe.ports.items()
    return [
        name
        for name, port in ports
        if port.content == Content.TOKEN_IDS and port.enters == "sequence" and backbone_of(model.recipe, port) == network
    ]


def own_words(
    model: Model, port: str, released: Released, tables: tuple[Tensor, Tensor], tokenizer: TextTokenizer | None
) -> tuple[dict[str, Tensor], str]:
    """Embedding and head of a port with the release's rows for the ids that mean the same in both, and what was done, in words.

    Ids mean the same where the tokenizer has every entry of the one beside the weights; without one beside them, where both have as
    many. Special tokens that the recipe added start from the rows that a release keeps behind its vocabulary, if it does, or anew.
    """
    piece, rows = model.slices[port], tables[0].shape[0]
    file = table_beside(Path(released.source))
    if file.is_file() and tokenizer is not None:
        same = tokenizer.extends(file)
    else:
        same = piece.size == rows
    if not same:
        return {}, f"ports.{port} starts anew: its {piece.size:,} entries are not the {rows:,} of the release"
    count, state = min(piece.size, rows), model.state_dict()
    filled: dict[str, Tensor] = {}
    for module, table in zip(("connector", "head"), tables, strict=True):
        name = f"ports.{piece.owner}.{module}.weight"
        if name in state:
            if table.shape[1] != state[name].shape[1]:
                raise DataError(f"{released.source}: its words are {table.shape[1]} wide, {name} is {state[name].shape[1]}")
            whole = state[name].clone()
            whole[piece.start : piece.start + count] = table[:count]
            filled[name] = whole
    return filled, f"ports.{port} with {count:,} of its {piece.size:,} rows"
