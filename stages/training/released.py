"""A part that somebody else released, as the start of a run: `--init ADDRESS=SOURCE`.

SOURCE is a file (.safetensors, or .pt, .pth, .ckpt, .bin, of which nothing but tensors is read), a folder with config.json and
*.safetensors, in several pieces too, for a language model also a .gguf, or the same on the Hub; `#PATH` picks the part inside a larger model. Which layout it is in shows
in its names: of autoencoders see `stages/parts/autoencoders/published.py`, of language models `stages/parts/backbones/published.py`, of whole models
(`--init model=SOURCE`) `stages/training/released_model.py`.

    mmgen pretrain-tokenizer data --recipe kl-autoencoder --size paper --set phases.train.steps=0 --out runs/sd-vae \\
        --init autoencoders.vae=hf://stabilityai/sd-vae-ft-mse
    mmgen pretrain-tokenizer data --recipe text-bpe --init tokenizers.bpe=hf://HuggingFaceTB/SmolLM2-135M --out runs/words
    mmgen train-unified tokens --recipe lmfusion --init backbones.lm=hf://HuggingFaceTB/SmolLM2-135M --out runs/lmfusion --set …

An autoencoder that is trained for no steps stays as released: held-out pictures are measured, and the checkpoint is one like any other.
A language model fills the first expert of a network, or the one that is named, and the rows of the vocabulary that are its own.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stages.documents import Document, Int, Real, read_object, read_object_if_any, refuse_pointer
from stages.errors import DataError, MmgenError, UsageError
from stages.files import inside
from stages.hub import resolve
from stages.model import Model, covers
from stages.parts.autoencoders import Autoencoder
from stages.parts.autoencoders.kl_cnn import KLCNNConfig
from stages.parts.autoencoders.published import DIFFUSERS, LEFT_OUT, OUR_OWN, layout_of, prefix_of, translate
from stages.parts.backbones import published as language
from stages.parts.backbones.gguf_file import read_gguf
from stages.parts.tokenizers import ReleasedTokenizerConfig, TextTokenizer
from stages.recipe import Recipe
from stages.training import released_model as whole
from stages.training.checkpoint import check_finite, checkpoint_input, init_part, is_unfinished
from stages.training.pickled import Stored, fetch, read_beside_objects
from stages.training.released_network import fill_network

FAMILIES = ("autoencoders", "backbones", whole.ADDRESS)  # of parts whose released weights are read
INSIDE = ("ema", "model", "state_dict")  # where a .pt keeps its weights, the averaged ones before the others
USUAL = ("diffusion_pytorch_model", "model")  # of several files in one folder
NEVER_SCALED = 0.18215  # what AutoencoderKL of diffusers takes where a config.json, as those of 2022, does not say it
LONG_RUN = 100.0  # latents that each released code counts as having won, so that none of them is taken for dead and moved


class WeightIndex(Document):
    """*.safetensors.index.json: the piece each weight is in."""

    weight_map: dict[str, str]


class AutoencoderFacts(Document):
    """What is read of the config.json of an autoencoder."""

    scaling_factor: Real | None = None
    shift_factor: Real | None = None
    norm_num_groups: Int | None = None


@dataclass(frozen=True)
class Released:
    """Weights of one part, and what the config.json beside them says. Names of an autoencoder are without their prefix."""

    source: str
    family: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]

    @property
    def layout(self) -> str:
        if self.family == whole.ADDRESS:
            return str(self.config.get("model_type"))
        return language.LAYOUT if self.family == "backbones" else layout_of(self.tensors, self.source).name

    @property
    def scale_and_shift(self) -> tuple[float, float] | None:
        """(mean - shift) · scale, where the release says it: config.json of diffusers' AutoencoderKL."""
        if self.family != "autoencoders" or self.config.get("_class_name") != "AutoencoderKL" or self.layout != DIFFUSERS.name:
            return None
        return float(self.config.get("scaling_factor") or NEVER_SCALED), float(self.config.get("shift_factor") or 0.0)

    def fingerprint(self) -> str:
        """sha256 of the tensors and of what is read of the config, never of the files."""
        read: Any = self.scale_and_shift
        if self.family == whole.ADDRESS:
            read = whole.what_is_read(self)
        elif self.family == "backbones":
            tied = "tie_word_embeddings"
            read = (language.settings_of(self.tensors, self.config, self.source), language.facts_of(self.config).get(tied))
        digest = hashlib.sha256(repr(read).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Start:
    """Where one part of the recipe starts: a checkpoint of ours (None), or what was released."""

    address: str
    spec: str
    path: Path
    inside: str
    released: Released | None

    @property
    def filled(self) -> str:
        """The address it fills, "*" for all."""
        return "*" if self.address == whole.ADDRESS else self.address

    def as_input(self) -> dict[str, Any]:
        role = f"init {self.address}"
        if self.released is None:
            return checkpoint_input(self.spec, self.path, role)
        return {"role": role, "path": self.spec, "layout": self.released.layout, "fingerprint": self.released.fingerprint()}


def open_starts(init: Mapping[str, str], *, shapes_only: bool = False) -> list[Start]:
    """Every source of --init, released weights read. init: address → folder, file or hf://…, each with `#PATH` or without.

    shapes_only: of safetensors and torch files no weight is read, tensors are on the meta device.
    """
    starts = []
    for address, spec in init.items():
        text, _, inside = spec.partition("#")
        path = resolve(text)
        family = address.split(".")[0]
        ours = family not in FAMILIES or (path / "recipe.toml").is_file() or is_unfinished(path)
        starts.append(Start(address, spec, path, inside, None if ours else read_released(path, inside, family, shapes_only=shapes_only)))
    return starts


def adopt_tokenizer(recipe: Recipe, init: Mapping[str, str]) -> tuple[TextTokenizer, dict[str, Any]]:
    """The vocabulary that another model was released with, and it as an input of the run. init: `tokenizers.NAME` → folder or hf://…

    It gets the special tokens of the recipe's own tokenizer of that name, behind its entries where it has them not.
    """
    (address, spec), *more = init.items()
    name = address.removeprefix("tokenizers.")
    if more or address == name or name not in recipe.tokenizers:
        raise UsageError(
            f"--init {', '.join(init)}: recipe '{recipe.name}' has no autoencoder; its text tokenizer may start from a release",
            hint=f"--init tokenizers.{next(iter(recipe.tokenizers), 'NAME')}=hf://ORG/NAME",
        )
    own = recipe.tokenizers[name]
    names = getattr(own, "names", {})
    config = ReleasedTokenizerConfig(vocab_size=own.vocab_size, special=own.special, fields=own.fields, names=names)
    tokenizer = config.adopt(resolve(spec, only="*.json"))
    return tokenizer, {"role": f"init {address}", "path": spec, "fingerprint": tokenizer.fingerprint}


def with_released_scale(recipe: Recipe, starts: Iterable[Start]) -> Recipe:
    """The recipe with shift and scale of continuous latents as the release defines them, unless it says them itself."""
    for start in starts:
        name = start.address.split(".")[1] if start.address.startswith("autoencoders.") else ""
        config = recipe.autoencoders.get(name)
        found = start.released.scale_and_shift if start.released else None
        if found and isinstance(config, KLCNNConfig) and config.latent_scale is None:
            table = {**recipe.source["autoencoders"][name], "latent_scale": found[0], "latent_shift": found[1]}
            recipe = recipe.with_parts({f"autoencoders.{name}": table})
    return recipe


def fill(learner: nn.Module, start: Start, text: Mapping[str, TextTokenizer] | None = None) -> str:
    """Put one start into the weights of `learner`, whose names are addresses; returns what was done, in words.

    text: the recipe's text tokenizers, which say whether a language model's vocabulary is theirs. DataError where what was put there is
    not finite.
    """
    done = _fill(learner, start, text)
    check_finite({name: tensor for name, tensor in learner.state_dict().items() if covers(start.filled, name)}, start.spec)
    return done


def _fill(learner: nn.Module, start: Start, text: Mapping[str, TextTokenizer] | None) -> str:
    if start.released is None:
        source = f"{start.path}#{start.inside}" if start.inside else str(start.path)
        return f"{', '.join(init_part(learner, start.address, Path(source)))} from {start.spec}"
    if isinstance(learner, Model):
        filling = whole.fill_model if start.address == whole.ADDRESS else fill_network
        return filling(learner, start, start.released, text or {})
    family, _, rest = start.address.partition(".")
    name, _, part = rest.partition(".")
    if family != "autoencoders" or not any(covers(start.address, weight) for weight in learner.state_dict()):
        parts = sorted({".".join(weight.split(".")[:2]) for weight in learner.state_dict() if weight.startswith("autoencoders.")})
        raise UsageError(
            f"--init {start.address}: released weights are read for autoencoders, and there is no such part",
            hint=f"there is {', '.join(parts)}",
        )
    autoencoder = learner.get_submodule(f"{family}.{name}")
    assert isinstance(autoencoder, Autoencoder)
    found = translate(autoencoder, start.released.tensors, start.spec, part)
    same_groups(autoencoder, start.released)
    autoencoder.load_state_dict(found, strict=False)  # `translate` was strict
    if any(weight.startswith("quantizer.") for weight in found):
        start_counting(autoencoder)
    return f"{start.address} from {start.spec} (layout {start.released.layout})"


def same_groups(autoencoder: nn.Module, released: Released) -> None:
    """The one number that no weight shows: into how many groups the norms part the channels."""
    theirs = released.config.get("norm_num_groups")
    ours = {module.num_groups for module in autoencoder.modules() if isinstance(module, nn.GroupNorm)}
    if theirs is not None and ours != {theirs}:
        raise DataError(f"{released.source}: config.json says norm_num_groups = {theirs}, the norms of this recipe have {sorted(ours)}")


@torch.no_grad()
def start_counting(autoencoder: nn.Module) -> None:
    """A codebook's running numbers as if all its codes had been used alike: no release has them."""
    weights = autoencoder.state_dict()
    for name in OUR_OWN:
        if name.endswith(".counts") and name in weights:
            weights[name].fill_(LONG_RUN)
        elif name.endswith(".sums") and name in weights:
            weights[name].copy_(LONG_RUN * weights[name.replace(".sums", ".codebook")])


# --- files ------------------------------------------------------------------------------------------------------------------------


Select = Callable[[Iterable[str], str, str], dict[str, str]]  # names, where, #PATH → name that is kept: name in the file


def read_released(path: Path, inside: str = "", family: str = "autoencoders", *, shapes_only: bool = False) -> Released:
    """The autoencoder, language model or whole model in a file or folder. UsageError if there is nothing to read, DataError if it is damaged or no such part."""
    select: Select = {"backbones": language.select, whole.ADDRESS: whole.select}.get(family, names_below)
    if not path.exists():
        raise UsageError(
            f"{path}: no such file or folder", hint="--init takes a checkpoint, a file of weights, a folder of them, or hf://ORG/NAME"
        )
    folder = path if path.is_dir() else path.parent
    files = weight_files(path) if path.is_dir() else [path]
    for file in files:
        refuse_pointer(file)
    if path.suffix == ".gguf" and family == "backbones":
        tensors, facts = read_gguf(path)
        return Released(str(path), family, tensors, facts)
    if all(file.suffix == ".safetensors" for file in files):
        tensors = read_safetensors(files, inside, select, shapes_only=shapes_only)
    else:
        everything = read_torch(path, "meta" if shapes_only else "cpu")
        tensors = {name: everything[full] for name, full in select(everything, str(path), inside).items()}
    facts = read_object_if_any(folder / "config.json", AutoencoderFacts if family == "autoencoders" else Document)
    return Released(str(path), family, tensors, facts)


def weight_files(folder: Path) -> list[Path]:
    """The pieces of the one model in a folder. What its index lists are names of files beside it, nothing else."""
    found = {path.name: path for path in sorted(folder.glob("*.safetensors")) if inside(folder, path.name)}
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    stems = [*(index.name.removesuffix(".safetensors.index.json") for index in indexes), *USUAL]
    for stem in stems:
        if f"{stem}.safetensors" in found:
            return [found[f"{stem}.safetensors"]]
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            names = sorted(set(read_object(index, WeightIndex)["weight_map"].values()))
            absent = [name for name in names if name not in found]
            if absent:
                raise DataError(f"{index}: lists {', '.join(absent)}, not in the folder")
            return [found[name] for name in names]
    if len(found) == 1:
        return list(found.values())
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".pt", ".pth", ".ckpt", ".bin"))
    raise UsageError(
        f"{folder}: expected the weights of one model (*.safetensors), found {', '.join(found) or 'none'}",
        hint=f"name the file, such as {folder / next(iter([*found, *others]))}" if found or others else "",
    )


def names_below(names: Iterable[str], where: str, inside: str) -> dict[str, str]:
    """Of all names those of the one autoencoder: without their prefix → as they are. What only its training needed is left out."""
    names = list(names)
    prefix = prefix_of(names, where, inside)
    short = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    return {name: full for name, full in short.items() if not name.startswith(LEFT_OUT)}


def read_safetensors(files: list[Path], inside: str, select: Select, *, shapes_only: bool = False) -> dict[str, Tensor]:
    """The part's tensors out of one file or several; a larger model around it is not read."""
    where = str(files[0] if len(files) == 1 else files[0].parent)
    try:
        opened = [safe_open(path, framework="pt") for path in files]
        holder = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (not a dict)
        chosen = select(holder, where, inside)
        if shapes_only:
            return {name: torch.empty(holder[full].get_slice(full).get_shape(), device="meta") for name, full in chosen.items()}
        return {name: holder[full].get_tensor(full) for name, full in chosen.items()}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{where}: cannot be read as safetensors ({error})") from None


def read_torch(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote. Nothing in it is run, whatever else it holds (see `stages.training.pickled`)."""
    try:
        found: Any = torch.load(path, map_location=device, weights_only=True)
    except UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if is_zipfile(path):
            found = read_beside_objects(path)
        elif asked is None:
            raise DataError(f"{path}: cannot be read as weights, it is damaged or no file of torch.save") from None
        else:
            raise UsageError(
                f"{path}: holds Python objects beside its tensors ({asked[1]}), in the format of torch before 1.6, which is not read",
                hint="save its tensors alone, with a newer torch",
            ) from None
    except MmgenError:  # the run was asked to stop while it read
        raise
    except Exception as error:  # bytes of strangers: whatever torch runs into
        raise DataError(
            f"{path}: cannot be read as weights ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from None
    for key in INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise DataError(f"{path}: expected a table of tensors, found {type(found).__name__}")
    described = {str(name): value for name, value in found.items() if isinstance(value, Stored)}
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)} | (
        fetch(path, described, device) if described else {}
    )
