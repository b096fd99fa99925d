"""A checkpoint is a folder that is a Hub model repository: weights, config, resolved recipe, model card, and the tokenizers.

    model.safetensors  config.json  recipe.toml  README.md  tokenizers/<name>-<fingerprint>/…

`sample` and `eval` need the folder and nothing else. A text tokenizer's checkpoint has tokenizer.json in place of weights.
Training state is apart, in state/step-00001000/ (`stages/training/state.py`), and never read by anything but a resume.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from stages.documents import read_object, read_object_if_any, refuse_pointer
from stages.errors import DataError, RecipeError, UsageError
from stages.escape import file_name, markdown, visible
from stages.files import copy_tokenizer, inside, make_folder, write_atomic
from stages.model import Model, build_model, count_parameters, covers, meta_model, on_meta
from stages.parts.autoencoders import Autoencoder, AutoencoderConfig
from stages.parts.config import MAX_PIXELS, shown
from stages.parts.tokenizers import TextTokenizer, load_tokenizer
from stages.recipe import Recipe, Stage, load_recipe
from stages.records import CheckpointConfig, Record, Status

WEIGHTS = "model.safetensors"


def save_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors so that equal weights give equal bytes: sorted names, one metadata key, whole or not at all."""
    ready = {name: tensors[name].detach().to("cpu").contiguous() for name in sorted(tensors)}
    write_atomic(path, save(ready, metadata={"format": "pt"}))


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. DataError if it is damaged, or no file of the folder itself.

    The library judges the header before anything else; the tensors are mapped and not read before they are used.
    """
    inside(path.parent, path.name)
    refuse_pointer(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: cannot be read as safetensors ({error})") from None


def read_shapes(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file without their values, on the meta device: only the header is read. DataError if it is damaged."""
    inside(path.parent, path.name)
    refuse_pointer(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: cannot be read as safetensors ({error})") from None


def checkpoint_names(tokenizers: Mapping[str, Path] | None = None) -> list[str]:
    """What `save_checkpoint`, a text tokenizer and the training states give names to, for `Run`."""
    names = [WEIGHTS, "config.json", "recipe.toml", "README.md", "tokenizer.json", "tokenizer_config.json", "state/step-*"]
    return names + [f"tokenizers/{travelling_name(address, folder)}" for address, folder in (tokenizers or {}).items()]


def travelling_name(address: str, folder: Path) -> str:
    """What the copy of a tokenizer's checkpoint is called."""
    return f"{file_name(address.split('.')[-1])}-{fingerprint(folder)[:8]}"


def save_checkpoint(
    out: Path,
    recipe: Recipe,
    tensors: Mapping[str, Tensor],
    *,
    tokenizers: Mapping[str, Path] | None = None,
    card: str = "",
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write weights, config, recipe and model card into `out`, and copies of the tokenizers the model was trained with.

    tokenizers: recipe address ("tokenizers.bpe", "autoencoders.vq") → folder of its checkpoint.
    """
    make_folder(out)
    travelling: dict[str, str] = {}
    for address, folder in (tokenizers or {}).items():
        name = travelling_name(address, folder)
        travelling[address] = name
        if not (out / "tokenizers" / name).is_dir():
            copy_tokenizer(folder, out / "tokenizers" / name)
    if tensors:
        save_weights(out / WEIGHTS, tensors)
    config = {
        "model_type": "mmgen",
        "architectures": [recipe.name],
        "mmgen_version": version("mmgen-cli"),
        "size": recipe.size,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "tokenizers": travelling,
        **(facts or {}),
    }
    write_atomic(out / "config.json", json.dumps(config, indent=2) + "\n")
    write_atomic(out / "recipe.toml", recipe.to_toml())
    write_atomic(out / "README.md", card or model_card(recipe, config, out.resolve().name))


def model_card(recipe: Recipe, config: Mapping[str, Any], path: str) -> str:
    """The README.md of a checkpoint: what it is, what it differs in, how to use it."""
    paper = recipe.paper
    differs = "\n".join(f"- {markdown(line)}" for line in paper.differs) or "- nothing that is known"
    source = f"[arXiv:{markdown(paper.arxiv)}](https://arxiv.org/abs/{quote(visible(paper.arxiv))})"
    source += f", *{markdown(paper.title)}*" if paper.title else ""
    facts = "\n".join(
        f"| {markdown(name)} | {markdown(str(value))} |" for name, value in config.items() if isinstance(value, (int, float, str))
    )
    path = shlex.quote(visible(path))
    use = (
        f"mmgen eval {path} SHARDS --out runs/eval"
        if recipe.autoencoders and not recipe.backbones
        else f'mmgen sample {path} --prompt "…" --out runs/samples'
    )
    if recipe.tokenizers and not recipe.ports:
        use = f"mmgen tokenize SHARDS --tokenizer {path} --out data/tokens"
    return (
        f"---\nlibrary_name: mmgen\ntags:\n- mmgen\n---\n\n# {markdown(recipe.name)} ({recipe.size})\n\n"
        f"After {source}.\n\n```sh\n{use}\n```\n\n| | |\n|---|---|\n{facts}\n\n"
        f"Differs from the paper:\n\n{differs}\n\nThe resolved recipe is `recipe.toml`, the command and the data are in `run.json`, the curves in `metrics.jsonl`.\n"
    )


def checkpoint_input(path: str, folder: Path, role: str = "model") -> dict[str, Any]:
    """A checkpoint as an input of a run: what it computes, and the run that made it."""
    provenance = read_object_if_any(folder / "run.json", Record)
    kept = {
        key: provenance[key] for key in ("stage", "command", "seed", "inputs", "started", "finished", "git_commit") if key in provenance
    }
    name = open_checkpoint(folder).recipe.name
    return {"role": role, "path": path, "recipe": name, "fingerprint": fingerprint(folder), "provenance": kept}


def fingerprint(folder: Path) -> str:
    """sha256 of what a checkpoint computes: its sorted tensors and the recipe's sections, never of its files."""
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder).fingerprint
    if not (folder / WEIGHTS).is_file():
        raise UsageError(f"{folder}: not a checkpoint, there is no {WEIGHTS}")
    digest = hashlib.sha256()
    for name, tensor in sorted(read_weights(folder / WEIGHTS).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    recipe = load_recipe(folder)
    sections = {key: recipe.source.get(key) for key in ("autoencoders", "encoders", "backbones", "ports") if recipe.source.get(key)}
    digest.update(json.dumps(sections, sort_keys=True).encode())
    return digest.hexdigest()


def check_same(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """DataError that lists the tensors of a module that are missing, unexpected or of another shape, if there are any."""
    own = module.state_dict()
    missing = sorted(set(own) - set(tensors))
    unexpected = sorted(set(tensors) - set(own))
    reshaped = sorted(
        f"{name} {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
        for name in set(own) & set(tensors)
        if own[name].shape != tensors[name].shape
    )
    for title, names in (("missing", missing), ("unexpected", unexpected), ("reshaped", reshaped)):
        if names:
            raise DataError(
                f"{where}: {len(missing)} weights missing, {len(unexpected)} unexpected, {len(reshaped)} reshaped; {title}: "
                + ", ".join(names[:6])
                + (" …" if len(names) > 6 else "")
            )


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """DataError that names the first tensors that hold NaN or infinity, if any do. One pass: a sum has no finite value where they are."""
    bad = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
        and not tensor.is_meta
        and not tensor.sum(dtype=torch.float32).isfinite()
        and not tensor.isfinite().all()
    ]
    if bad:
        raise DataError(
            f"{where}: {len(bad)} of {len(tensors)} weights are not finite: {', '.join(bad[:6])}" + (" …" if len(bad) > 6 else ""),
            hint="the training that wrote them has failed; take an earlier checkpoint",
        )


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load every tensor; missing, unexpected and reshaped ones, and numbers that are not finite, are an error that lists them."""
    check_same(module, tensors, where)
    module.load_state_dict(dict(tensors))
    check_finite(module.state_dict(), where)  # as they are computed with: a file may hold float64 that overflows


def described(build: Callable[[int], nn.Module], held: Mapping[str, Tensor], where: Path) -> nn.Module:
    """What a recipe describes, on the meta device, to be compared with what the weights beside it hold before any memory is taken.

    `build` is told how many tensors it may make. DataError where they are far more than the file has.
    """
    try:
        return build(2 * len(held) + 64)  # a part may make a tensor that it then replaces
    except RecipeError as error:
        raise DataError(f"{where}: holds {len(held)} tensors, and recipe.toml beside it describes others: {error.message}") from None


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with its recipe, and where its tokenizers lie by recipe address."""

    folder: Path
    recipe: Recipe
    config: dict[str, Any]
    tokenizers: dict[str, Path]


def is_unfinished(folder: Path) -> bool:
    """Whether a training stage has begun here and not yet written its checkpoint."""
    if (folder / "config.json").exists():
        return False
    return read_object_if_any(folder / "status.json", Status).get("stage") in get_args(Stage)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's recipe and config, without weights. UsageError if it is not one, DataError where it names what is not its own."""
    for name in ("config.json", "recipe.toml"):
        if not (folder / name).is_file():
            if is_unfinished(folder):
                raise UsageError(
                    f"{folder}: a training run that has not finished", hint="give the command that began it again: it goes on from there"
                )
            what = "no such folder" if not folder.is_dir() else f"not a checkpoint, there is no {name}"
            raise UsageError(f"{folder}: {what}", hint="a checkpoint is what pretrain-tokenizer, align and train-unified write to --out")
    config = read_object(folder / "config.json", CheckpointConfig)
    return Checkpoint(folder, load_recipe(folder), config, _tokenizers_of(folder, config))


def _tokenizers_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Path]:
    """Where the tokenizers lie that config.json names: below the checkpoint, nowhere else."""
    found = {}
    for address, name in config.get("tokenizers", {}).items():
        try:
            found[address] = inside(folder, "tokenizers", name) or folder / "tokenizers" / name
        except DataError as error:
            raise DataError(f"{folder / 'config.json'}: tokenizers.{address}: {error.message}", hint=error.hint) from None
    return found


def load_model(folder: Path, device: str = "cpu", *, untrained: bool = False, seed: int = 0) -> tuple[Checkpoint, Model]:
    """The model of a checkpoint, in evaluation mode; `untrained` leaves the fresh weights, as a control."""
    checkpoint = open_checkpoint(folder)
    weights = folder / WEIGHTS
    held = read_shapes(weights) if weights.is_file() else {}
    expected = described(lambda most: meta_model(checkpoint.recipe, most), held, weights)
    if not expected.state_dict():
        raise UsageError(f"{folder}: a tokenizer ({checkpoint.recipe.name}), expected a model", hint="align and train-unified write models")
    check_same(expected, held, str(weights))
    model = build_model(checkpoint.recipe, seed)
    if not untrained:
        load_strict(model, read_weights(weights), str(weights))
    return checkpoint, model.to(device).eval()


def load_autoencoder(folder: Path, device: str = "cpu") -> Autoencoder:
    """The autoencoder of a pretrain-tokenizer checkpoint, in evaluation mode."""
    recipe = open_checkpoint(folder).recipe
    if len(recipe.autoencoders) != 1:
        raise UsageError(f"{folder}: expected the checkpoint of one autoencoder, its recipe has {len(recipe.autoencoders)}")
    name, config = next(iter(recipe.autoencoders.items()))
    prefix, weights = f"autoencoders.{name}.", folder / WEIGHTS
    held = without_prefix(read_shapes(weights), prefix)
    check_same(described(lambda most: on_meta(config.build, most, f"autoencoders.{name}"), held, weights), held, str(weights))
    autoencoder = config.build()
    load_strict(autoencoder, without_prefix(read_weights(weights), prefix), str(weights))
    return autoencoder.to(device).eval()


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one part, by their names within it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def load_any_tokenizer(folder: Path, device: str = "cpu") -> TextTokenizer | Autoencoder:
    """Whatever `tokenize` can run: a text tokenizer or an autoencoder."""
    return load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else load_autoencoder(folder, device)


def init_part(model: nn.Module, address: str, folder: Path) -> list[str]:
    """Start one part of a model from a checkpoint; returns the addresses that were filled.

    `folder` may end in `#address` of the source part; without it the same address is tried, then the parts of the same family. A
    network of several experts starts its first one from a dense source. With a network come the source's ports of the same name
    (embedding, head) where their shapes fit.
    """
    text, _, source_address = str(folder).partition("#")
    path = Path(text)
    weights = read_weights(open_checkpoint(path).folder / WEIGHTS)
    own = {name: value for name, value in model.state_dict().items() if covers(address, name)}
    if not own:
        tops = sorted({".".join(name.split(".")[:2]) for name in model.state_dict()})
        raise UsageError(f"--init {address}: the recipe has no such part", hint="parts with weights: " + ", ".join(tops))
    family = address.split(".")[0]
    candidates = (
        [source_address]
        if source_address
        else [address, *sorted({".".join(n.split(".")[:2]) for n in weights if n.startswith(family + ".")} - {address})]
    )
    network = model.recipe.backbones.get(address.removeprefix("backbones.")) if isinstance(model, Model) and family == "backbones" else None
    problem = ""
    for candidate in candidates:
        found = {address + name.removeprefix(candidate): value for name, value in weights.items() if covers(candidate, name)}
        if not found:
            continue
        if network is not None:
            found = first_expert_only(found, address, network.experts)
            own = {name: value for name, value in own.items() if name in found or not is_other_expert(name, address, network.experts)}
        wrong = sorted(name for name in set(own) ^ set(found)) + sorted(n for n in set(own) & set(found) if own[n].shape != found[n].shape)
        if wrong:
            here, there = (str(list(side[wrong[0]].shape)) if wrong[0] in side else "absent" for side in (own, found))
            problem = problem or (
                f"{candidate} does not fit: {len(wrong)} weights differ in name or shape, first {wrong[0]}: {there} there, {here} here"
            )
            continue
        filled = dict(found)
        if family == "backbones":
            ports = {name: value for name, value in weights.items() if name.startswith("ports.")}
            current = model.state_dict()
            filled |= {name: value for name, value in ports.items() if name in current and current[name].shape == value.shape}
        model.load_state_dict(filled, strict=False)  # strict by hand above: every name of the part was matched
        return sorted({".".join(name.split(".")[:2]) for name in filled})
    raise UsageError(
        f"--init {address}={path}: "
        + (problem or f"the checkpoint has no {family}; it holds: " + ", ".join(sorted({".".join(n.split(".")[:2]) for n in weights})))
    )


def first_expert_only(found: dict[str, Tensor], address: str, experts: tuple[str, ...]) -> dict[str, Tensor]:
    """A dense network's weights under the name of the first expert of a network that has several."""
    dense = f"{address}.experts.main."
    if len(experts) == 1 or not any(name.startswith(dense) for name in found):
        return found
    return {name.replace(dense, f"{address}.experts.{experts[0]}.", 1): value for name, value in found.items()}


def is_other_expert(name: str, address: str, experts: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{address}.experts.{expert}.") for expert in experts[1:])


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """What is in a checkpoint: recipe, parts with their parameter counts, tokenizers; for `mmgen inspect`."""
    checkpoint = open_checkpoint(folder)
    parts: dict[str, int] = {}
    if (folder / WEIGHTS).is_file():
        for name, tensor in read_weights(folder / WEIGHTS).items():
            part = ".".join(name.split(".")[:2])
            parts[part] = parts.get(part, 0) + tensor.numel()
    described: dict[str, Any] = {
        "kind": "checkpoint",
        "recipe": checkpoint.recipe.name,
        "size": checkpoint.recipe.size,
        "parameters": sum(parts.values()),
        "parts": parts,
        "fingerprint": fingerprint(folder),
        "tokenizers": {address: path.name for address, path in checkpoint.tokenizers.items()},
        "config": checkpoint.config,
    }
    for name, config in checkpoint.recipe.autoencoders.items():
        if f"autoencoders.{name}" in parts:
            described["tokenizer"] = describe_autoencoder(config, checkpoint.config.get("picture_size"))
    if (folder / "tokenizer.json").is_file():
        described["tokenizer"] = {"vocab_size": load_tokenizer(folder).vocab_size}
    return described


def sides_in(value: Any, where: str, axes: Sequence[int], most: int) -> tuple[int, ...]:
    """The sides of a picture that config.json gives, in pixels or tokens: as many as one of `axes`. DataError for anything else, and for
    more than `most` pixels or tokens in all."""
    whole = isinstance(value, list) and len(value) in axes and all(type(side) is int and side >= 1 for side in value)
    if not whole or math.prod(value) > most:
        wanted = " or ".join(map(str, axes))
        raise DataError(f"{where}: expected a list of {wanted} whole numbers, at most {most:,} together, found {shown(value)}")
    return tuple(value)


def describe_autoencoder(config: AutoencoderConfig, picture_size: Any) -> dict[str, Any]:
    """What an image tokenizer makes of a picture, with numbers for pictures of the size (H, W) it was trained on where that is known.

    `bits_per_pixel`: each code is worth log2 of the vocabulary. Latents are real numbers, counted as `floats_per_pixel`.
    """
    described: dict[str, Any] = {
        "downsample": config.downsample,
        "latent_channels": config.latent_channels,
        "codebook_size": config.codebook_size,
    }
    if picture_size is None:
        return described
    height, width = sides_in(picture_size, "config.json: picture_size", (2,), MAX_PIXELS**2)
    grid = config.grid(height, width)
    described |= {"picture_size": [height, width], "grid": list(grid)}
    if config.codebook_size is None:
        return described | {"floats_per_pixel": round(config.latent_channels * math.prod(grid) / (height * width), 6)}
    shape = config.code_shape(height, width)
    bits = math.prod(shape) * math.log2(config.codebook_size)
    return described | {"code_shape": list(shape), "codes": math.prod(shape), "bits_per_pixel": round(bits / (height * width), 6)}


def count_addresses(model: nn.Module) -> dict[str, int]:
    """Parameters by part: address (two steps) → count."""
    counts: dict[str, int] = {}
    for family, table in model.named_children():
        for name, part in table.named_children():
            counts[f"{family}.{name}"] = count_parameters(part)
    return {address: count for address, count in counts.items() if count}
