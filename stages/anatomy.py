"""What a recipe is made of: its parts by address, how large each is, and which of them a phase trains.

Everything is counted on the meta device, so the paper's size costs no memory. `mmgen recipes` lists these counts, `--dry-run` prints them
and drawings mark with them what is frozen.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from stages.model import count_parameters, covers, meta_model, on_meta
from stages.parts.backbones import BackboneConfig, MoEConfig
from stages.parts.config import PartConfig
from stages.recipe import Phase, Port, Recipe

NOTABLE = {  # which numbers of a part's config are worth a word, and the word
    "vocab_size": "vocabulary",
    "width": "width",
    "depth": "depth",
    "heads": "heads",
    "kv_heads": "kv heads",
    "patch_size": "patch",
    "channels": "channels",
    "downsample": "downsample",
    "latent_channels": "latent channels",
    "codebook_size": "codes",
    "codebook_dim": "code width",
    "queries": "queries",
    "max_length": "tokens at most",
    "dim": "out",
}


@dataclass(frozen=True)
class Part:
    """One part of a recipe.

    parameters: 0 for what has no weights, such as a text tokenizer. trained: phase → how many of them learn in it; a phase whose
    run does not hold the part (a backbone while its tokenizer is pretrained) is not in the table.
    """

    address: str
    kind: str
    sizes: str
    parameters: int
    trained: Mapping[str, int]


def weights_of(recipe: Recipe) -> dict[str, int]:
    """Every weight a run of this recipe could hold, by address → number of elements; the model's and its autoencoders'."""
    sizes = {name: parameter.numel() for name, parameter in meta_model(recipe).named_parameters()}
    for name, config in recipe.autoencoders.items():
        sizes |= {
            f"autoencoders.{name}.{key}": value.numel()
            for key, value in on_meta(config.build, address=f"autoencoders.{name}").named_parameters()
        }
    return sizes


def model_size(recipe: Recipe) -> int:
    """The count a paper prints: encoders, backbones and ports, without the tokenizers that only prepare data; for a recipe that is
    nothing but a tokenizer, the autoencoder without its discriminator."""
    if recipe.encoders or recipe.backbones:
        return sum(parameter.numel() for parameter in meta_model(recipe).parameters())
    return sum(count_parameters(on_meta(config.build)) for config in recipe.autoencoders.values())


def active_size(recipe: Recipe) -> int:
    """How many of the model's weights compute one token: of hard-routed experts one (they are equally large), of learned ones `top_k`."""
    active = Fraction(0)
    for address, parameter in meta_model(recipe).named_parameters():
        family, name, *steps = address.split(".")
        share = Fraction(1)
        if family == "backbones":
            network = recipe.backbones[name]
            if steps[0] == "experts":
                share /= len(network.experts)
            if isinstance(network.mlp, MoEConfig) and "mlp.experts." in address:
                share *= Fraction(network.mlp.top_k, network.mlp.experts)
        active += share * parameter.numel()
    return round(active)


def holds(phase: Phase, address: str) -> bool:
    """Whether the run of a phase has these weights in memory: pretraining a tokenizer has the autoencoder and its objective, every other
    stage all that is not an autoencoder."""
    return address.startswith(("autoencoders.", "objectives.")) if phase.stage == "pretrain-tokenizer" else not is_data_side(address)


def is_data_side(address: str) -> bool:
    """Autoencoders and text tokenizers write the shards; past `pretrain-tokenizer` they do not learn any more."""
    return address.startswith(("autoencoders.", "tokenizers."))


def learns(phase: Phase, address: str) -> bool:
    """Whether a weight moves in this phase; the rule of `stages.model.set_trainable`, weight by weight."""
    wanted = any(covers(a, address) for a in phase.trainable) and not any(covers(a, address) for a in phase.frozen)
    return wanted and holds(phase, address)


def parts_of(recipe: Recipe, weights: Mapping[str, int] | None = None) -> list[Part]:
    """Every part, in the order data passes them: tokenizers, autoencoders, encoders, backbones (one entry an expert), ports, objectives."""
    weights = weights_of(recipe) if weights is None else weights
    parts = []
    for address, kind, sizes in _entries(recipe):
        own = {name: count for name, count in weights.items() if covers(address, name)}
        seen = [phase for phase in recipe.phases if is_data_side(address) or any(holds(phase, name) for name in own)]
        trained = {phase.name: sum(count for name, count in own.items() if learns(phase, name)) for phase in seen}
        parts.append(Part(address, kind, sizes, sum(own.values()), trained if own else {}))
    return parts


def _entries(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """(address, kind, sizes) of each part."""
    for family in ("tokenizers", "autoencoders", "encoders"):
        for name, config in getattr(recipe, family).items():
            yield f"{family}.{name}", config.kind, sizes_of(config)
    for name, network in recipe.backbones.items():
        sizes = ", ".join([sizes_of(network), *learned_experts(network)])
        if len(network.experts) == 1:
            yield f"backbones.{name}", network.kind, sizes
            continue
        for expert in network.experts:
            yield f"backbones.{name}.experts.{expert}", network.kind, sizes
        if set(network.duplicate) != {"norm", "qkv", "out", "mlp"}:
            yield f"backbones.{name}.shared", network.kind, "what all experts share"
    for name, port in recipe.ports.items():
        yield f"ports.{name}", str(port.content), describe_port(recipe, name, port)
    for name, objective in recipe.objectives.items():
        yield f"objectives.{name}", objective.kind, ""


def learned_experts(network: BackboneConfig) -> list[str]:
    """ "2 of 8 MLPs a token", and "1 shared"; nothing for a dense MLP."""
    mlp = network.mlp
    if not isinstance(mlp, MoEConfig):
        return []
    return [f"{mlp.top_k} of {mlp.experts} MLPs a token", *([f"{mlp.shared} shared"] if mlp.shared else [])]


def sizes_of(config: PartConfig) -> str:
    """The telling numbers of a part: "width 2048, depth 24, heads 32"."""
    return ", ".join(f"{word} {value:,}" for word, value in _numbers(config))


def _numbers(config: PartConfig) -> Iterator[tuple[str, int]]:
    inner: Any = getattr(config, "quantizer", None)
    tables = [config, inner] if isinstance(inner, PartConfig) else [config]
    for key, word in NOTABLE.items():
        for table in tables:
            value = table.__dict__.get(key)
            if isinstance(value, int) and not (key == "patch_size" and value == 1):
                yield word, value
                break


def describe_port(recipe: Recipe, name: str, port: Port) -> str:
    """How a port's content comes in and goes out: "bpe → embedding, linear head, next-token"."""
    source = " + ".join(part for part in (port.tokenizer, port.encoder, port.autoencoder) if part)
    shared = [other for other, entry in recipe.ports.items() if port.vocabulary and entry.vocabulary == port.vocabulary]
    words = [source + (f" → {port.connector.kind}" if port.connector is not None else "")]
    if shared and shared[0] != name:
        words.append(f"embedding and head of {shared[0]}")
    if port.head is not None:
        words.append(f"{port.head.kind} head")
    if port.objective is not None:
        words.append(port.objective.kind)
    return ", ".join(word for word in words if word)


def count_words(value: float) -> str:
    """1448214528 → "1.45 B"."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:,.0f} {letter}" if value >= 100 * size else f"{value / size:.3g} {letter}"
    return f"{value:.0f}"
