"""Tokenizers travel: with the shards they wrote and inside the checkpoints trained on them. This file finds them again.

A recipe names what it needs (`tokenizers.bpe`, `autoencoders.vq`); `find_tokenizers` says which checkpoint folder that is, and
`Travelling` holds them loaded. The recipe is then rewritten with what they really are (vocabulary, codebook, channels), because a
text tokenizer may have found fewer merges than it was allowed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from stages.errors import UsageError
from stages.parts.autoencoders import Autoencoder, DiscreteAutoencoder
from stages.parts.quantizers import MultiScaleVQ
from stages.parts.tokenizers import TextTokenizer, load_tokenizer
from stages.parts.views.square import to_tensor
from stages.recipe import Recipe
from stages.training.checkpoint import fingerprint, load_autoencoder, open_checkpoint


@dataclass
class Travelling:
    """The tokenizers of one recipe: address → folder, text tokenizers loaded, autoencoders on first use."""

    folders: dict[str, Path]
    text: dict[str, TextTokenizer]
    device: str = "cpu"
    _autoencoders: dict[str, Autoencoder] = field(default_factory=dict)

    def autoencoder(self, name: str) -> Autoencoder:
        if name not in self._autoencoders:
            self._autoencoders[name] = load_autoencoder(self.folders[f"autoencoders.{name}"], self.device)
        return self._autoencoders[name]

    def quantizers(self, recipe: Recipe) -> dict[str, MultiScaleVQ]:
        """The quantizers that a model of this recipe reads codes with, frozen; the networks around them are let go."""
        found: dict[str, MultiScaleVQ] = {}
        for name in {port.autoencoder for port in recipe.ports.values() if port.by_scale}:
            autoencoder = load_autoencoder(self.folders[f"autoencoders.{name}"], self.device)
            assert isinstance(autoencoder, DiscreteAutoencoder) and isinstance(autoencoder.quantizer, MultiScaleVQ)  # the recipe's checks
            found[name] = autoencoder.quantizer.eval().requires_grad_(False)
        return found

    def fingerprints(self) -> dict[str, str]:
        return {address: fingerprint(folder) for address, folder in self.folders.items()}


def find_tokenizers(recipe: Recipe, *sources: Mapping[str, Path] | Iterable[Path]) -> dict[str, Path]:
    """Recipe address → checkpoint folder, looked for in each source in turn: `--tokenizer`, checkpoints given to --init, the shards.

    Within a source the folder that is called like the part wins, else the only one of the right kind. UsageError if none fits.
    """
    found: dict[str, Path] = {}
    wanted: list[tuple[str, str, str | None]] = [("tokenizers", name, None) for name in recipe.tokenizers]
    wanted += [("autoencoders", name, config.store) for name, config in recipe.autoencoders.items()]
    for family, name, store in wanted:
        seen: list[str] = []
        for source in sources:
            folders = list(source.values()) if isinstance(source, Mapping) else list(source)
            fitting = [folder for folder in folders if _kind_of(folder) == (family, store)]
            seen += [folder.name for folder in folders]
            called = [folder for folder in fitting if folder.name.rsplit("-", 1)[0] == name]
            chosen = called or fitting
            if len({fingerprint(folder) for folder in chosen}) > 1:
                raise UsageError(
                    f"{family}.{name}: several tokenizers fit: {', '.join(f.name for f in chosen)}", hint="name one with --tokenizer DIR"
                )
            if chosen:
                found[f"{family}.{name}"] = chosen[0]
                break
        if f"{family}.{name}" not in found:
            what = "a text tokenizer" if family == "tokenizers" else f"an image tokenizer that writes {store}"
            had = f"; these came along: {', '.join(seen)}" if seen else ""
            raise UsageError(
                f"recipe '{recipe.name}' needs {what} ({family}.{name}), and none came with the shards{had}",
                hint="train one with `mmgen pretrain-tokenizer`, then `mmgen tokenize SHARDS --tokenizer DIR`, or pass --tokenizer DIR here",
            )
    return found


def _kind_of(folder: Path) -> tuple[str, str | None]:
    if (folder / "tokenizer.json").is_file():
        return "tokenizers", None
    autoencoders = open_checkpoint(folder).recipe.autoencoders
    return ("autoencoders", next(iter(autoencoders.values())).store) if autoencoders else ("none", None)


def load_travelling(recipe: Recipe, folders: dict[str, Path], device: str = "cpu") -> tuple[Recipe, Travelling]:
    """Load text tokenizers, and the recipe with the tables of what was found."""
    text = {name: load_tokenizer(folders[f"tokenizers.{name}"]) for name in recipe.tokenizers}
    recipe, tables = with_vocabularies(recipe, text), {}
    for name in recipe.autoencoders:
        source = open_checkpoint(folders[f"autoencoders.{name}"]).recipe.source["autoencoders"]
        tables[f"autoencoders.{name}"] = next(iter(source.values()))
    return recipe.with_parts(tables), Travelling(folders, text, device)


def with_vocabularies(recipe: Recipe, text: Mapping[str, TextTokenizer]) -> Recipe:
    """The recipe with the text tokenizers as they are."""
    return recipe.with_parts(
        {
            f"tokenizers.{name}": {"kind": own.config.kind, "vocab_size": own.vocab_size, "special": list(own.config.special)}
            for name, own in text.items()
        }
    )


@torch.no_grad()
def encode_picture(recipe: Recipe, travelling: Travelling, autoencoder: str, image: np.ndarray) -> np.ndarray:
    """One uint8 picture (H, W, 3) → the codes or latents a port reads, for pictures that did not come from tokenized shards."""
    part = travelling.autoencoder(autoencoder)
    view = next((port.view for port in recipe.ports.values() if port.autoencoder == autoencoder and port.view is not None), None)
    picture = to_tensor(view.apply(image) if view is not None else image).unsqueeze(0)
    content = part.encode_codes(picture) if part.codebook_size is not None else part.encode(picture)
    return content[0].cpu().numpy()
