"""Tiny worlds for tests, made on the fly: a text tokenizer, recipes, models, segment lists, and shards that hold codes and latents.

Shapes are small and all different, grids are not square, and every picture is made of its own sample's numbers.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Generator, Tensor

from stages.data.sample import Sample
from stages.data.shards import ShardWriter
from stages.model import Model, build_model
from stages.parts.tokenizers import ByteBPEConfig, TextTokenizer
from stages.recipe import Recipe, load_recipe
from stages.sequence.plan import Planner
from stages.sequence.segment import Layout, MaskKind, PositionKind, Role, Segment
from stages.training.checkpoint import fingerprint, read_weights, save_checkpoint
from stages.travelling import load_travelling

SPECIAL = ("<t2i>", "<mmu>", "<soi>", "<eoi>", "<sot>", "<eot>")
CAPTIONS = [
    "a red circle left of a blue square",
    "two green triangles",
    "a yellow star above a red circle",
    "nothing but a small blue square",
    "three stars, all of them green",
    "a red square below two circles",
    "one large yellow triangle",
    "a blue star right of a green circle",
]


@cache
def text_tokenizer(special: tuple[str, ...] = SPECIAL) -> TextTokenizer:
    return ByteBPEConfig(vocab_size=300, special=special).train(CAPTIONS)


def state_tensors(folder: Path, part: str) -> dict[str, Tensor]:
    """What a training state of one rank holds of the model, an optimizer or the average."""
    (file,) = folder.glob("*.safetensors")
    return {name.removeprefix(f"{part}."): value for name, value in read_weights(file).items() if name.startswith(f"{part}.")}


def recipe_from(text: str, *, size: str | None = None, sets: Sequence[str] = ()) -> Recipe:
    """A recipe from its TOML; texts without [sizes] start with `size = "tiny"`, as resolved recipes do."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tests" / "test.toml"  # the folder's name becomes the family, which is part of a run's identity
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, size=size, sets=list(sets))


# A recipe with everything: text and codes in one vocabulary, latents denoised, two experts, three rotary axes, grouped heads.
MIXED = """
size = "tiny"
[paper]
arxiv = "0000.00000"
[tokenizers.bpe]
kind = "byte-bpe"
vocab_size = 300
special = ["<t2i>", "<mmu>", "<soi>", "<eoi>", "<sot>", "<eot>"]
[autoencoders.vq]
kind = "cnn"
downsample = 4
multipliers = [1, 1, 1]
channels = 8
latent_channels = 4
quantizer = { kind = "vq", codebook_size = 11, codebook_dim = 4 }
[autoencoders.vae]
kind = "kl-cnn"
downsample = 4
multipliers = [1, 1, 1]
channels = 8
latent_channels = 5
[backbones.lm]
kind = "transformer"
width = 48
depth = 3
heads = 6
kv_heads = 2
mlp_ratio = 1.5
experts = ["words", "pictures"]
rope = { kind = "rope", axes = [2, 2, 4] }
[ports.text]
content = "token-ids"
tokenizer = "bpe"
vocabulary = "all"
expert = "words"
connector = { kind = "embedding" }
head = { kind = "linear" }
objective = { kind = "next-token" }
[ports.codes]
content = "codes"
autoencoder = "vq"
vocabulary = "all"
mask = "full"
positions = "grid"
grid_embedding = "sincos-2d"
expert = "pictures"
objective = { kind = "masked-token" }
markers = { before = "<soi>", after = "<eoi>" }
[ports.latents]
content = "latents"
autoencoder = "vae"
mask = "full"
positions = "shared"
expert = "pictures"
timestep = "add"
grid_embedding = "sincos-2d"
connector = { kind = "linear" }
head = { kind = "linear" }
objective = { kind = "denoise" }
markers = { before = "<soi>", after = "<eoi>", inside = false, supervised = true }
[tasks.draw]
segments = [
  { port = "text", text = "<t2i><sot>{caption}<eot>", cond_dropout_prob = 0.1 },
  { port = "codes", field = "image", role = "target" },
]
[tasks.paint]
segments = [
  { port = "text", text = "<bos>" },
  { port = "text", text = "{caption}", role = "target", cond_dropout_prob = 0.1 },
  { port = "latents", field = "image", role = "target" },
  { port = "text", text = "{comment}<eot>", role = "target", optional = true },
]
[tasks.answer]
segments = [
  { port = "text", text = "<mmu>", mask = "full" },
  { port = "codes", field = "image", merge = true },
  { each = "qa", segments = [
    { port = "text", text = "<sot>{question}" },
    { port = "text", text = "{answer}<eot>", role = "target" },
  ] },
]
[[phases]]
name = "joint"
stage = "train-unified"
tasks = { draw = 1.0, answer = 1.0, paint = 1.0 }
steps = 10
batch_size = 3
lr = 1e-3
[sample.codes]
sampler = "masked"
num_steps = 3
[sample.latents]
sampler = "euler"
num_steps = 3
[sample.text]
sampler = "autoregressive"
temperature = 0.0
max_tokens = 9
"""


def mixed_recipe(*sets: str) -> Recipe:
    """MIXED, its text vocabulary being that of `text_tokenizer()`."""
    return recipe_from(MIXED, sets=[*sets, f"tokenizers.bpe.vocab_size={text_tokenizer().vocab_size}"])


def planner_of(recipe: Recipe) -> Planner:
    return Planner(recipe, {name: text_tokenizer() for name in recipe.tokenizers})


def lively(recipe: Recipe, seed: int = 0) -> Model:
    """A model in evaluation mode whose every weight is random, also those that start at zero or one, so that nothing cancels."""
    model = build_model(recipe, seed)
    generator = Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def sample_of(number: int, *, grid: tuple[int, int] = (2, 3), **fields: object) -> Sample:
    """Sample `number`: codes of MIXED's `vq` and latents of its `vae`, a caption, two questions."""
    rng = np.random.default_rng(number)
    return Sample(
        f"{number:04d}",
        {
            "caption": CAPTIONS[number % len(CAPTIONS)],
            "qa": [{"question": "how many?", "answer": str(number)}, {"question": "of what?", "answer": CAPTIONS[number % 5][2:9]}],
            "image.codes": rng.integers(0, 11, grid).astype(np.int32),
            "image.latents": rng.standard_normal((5, *grid)).astype(np.float32),
            **fields,
        },
    )


# segments without a planner


def text(
    length: int, *, mask: MaskKind = MaskKind.CAUSAL, merge: bool = False, role: Role = Role.CONTEXT, start: int = 10, **keys: object
) -> Segment:
    """A text segment of MIXED with ids start, start + 1, …"""
    payload = torch.arange(start, start + length)
    return Segment(port="text", payload=payload, grid=(length,), mask=mask, merge=merge, role=role, **keys)  # type: ignore[arg-type]


GRIDS = [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2)]


@st.composite
def segment_lists(draw: st.DrawFn, max_segments: int = 5) -> list[Segment]:
    """Any list of segments MIXED can read: every port, mask, merge, position kind, expert and role."""
    segments: list[Segment] = []
    for place in range(draw(st.integers(1, max_segments))):
        port = draw(st.sampled_from(["text", "codes", "latents"]))
        merge = place > 0 and draw(st.booleans())
        mask = segments[-1].mask if merge else draw(st.sampled_from(list(MaskKind)))
        grid = (draw(st.integers(1, 4)),) if port == "text" else draw(st.sampled_from(GRIDS))
        generator = Generator().manual_seed(draw(st.integers(0, 999)))
        length = int(np.prod(grid))
        payload = torch.randn(length, 5, generator=generator) if port == "latents" else torch.randint(0, 11, (length,), generator=generator)
        segments.append(
            Segment(
                port=port,
                payload=payload,
                grid=grid,
                role=draw(st.sampled_from(list(Role))),
                mask=mask,
                merge=merge,
                positions=draw(st.sampled_from(list(PositionKind))),
                expert=draw(st.integers(0, 1)),
            )
        )
    return segments


def own_rows(values: Tensor, layout: Layout, number: int) -> Tensor:
    """The rows of (b, l, …) that belong to packed sample `number`, in the sample's own order."""
    picked = (layout.sample_id == number).nonzero()
    order = layout.index[picked[:, 0], picked[:, 1]].argsort()
    return values[picked[order, 0], picked[order, 1]]


# shards as `tokenize` leaves them, without training anything


@dataclass(frozen=True)
class World:
    """A folder of tokenized shards, and the checkpoints of the tokenizers that travel with them."""

    shards: Path
    samples: list[Sample]
    tokenizers: dict[str, Path]

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe with what these tokenizers really are."""
        folders = {address: folder for address, folder in self.tokenizers.items() if address.split(".")[1] in _parts(recipe)}
        return load_travelling(recipe, folders)[0]


def _parts(recipe: Recipe) -> set[str]:
    return {*recipe.tokenizers, *recipe.autoencoders}


def make_world(
    folder: Path, recipe: Recipe, samples: Sequence[Sample], *, extra: Mapping[str, Mapping[str, np.ndarray]] | None = None
) -> World:
    """Write `samples` as shards with checkpoints of the recipe's text tokenizer and (untrained) autoencoders beside them."""
    tokenizers: dict[str, Path] = {}
    writes: dict[str, str] = {}
    for name, config in recipe.tokenizers.items():
        special = tuple(config.special)
        tokenizer = ByteBPEConfig(vocab_size=300, special=special).train(CAPTIONS)
        tokenizers[f"tokenizers.{name}"] = folder / "tokenizers" / name
        tokenizer.save(folder / "tokenizers" / name)
    for name, autoencoder_config in recipe.autoencoders.items():
        scratch = recipe_from('size = "tiny"\n[paper]\narxiv = "0"\n', sets=[])
        scratch = scratch.with_parts({f"autoencoders.{name}": recipe.source["autoencoders"][name]})
        torch.manual_seed(7)
        autoencoder = autoencoder_config.build()
        path = folder / "tokenizers" / name
        save_checkpoint(path, scratch, {f"autoencoders.{name}.{key}": value for key, value in autoencoder.state_dict().items()})
        tokenizers[f"autoencoders.{name}"] = path
        writes[f"image.{autoencoder_config.store}"] = fingerprint(path)
    travelling = {f"{address.split('.')[1]}-{fingerprint(path)[:8]}": path for address, path in tokenizers.items()}
    present = {name: wrote for name, wrote in writes.items() if name in samples[0].fields}
    with ShardWriter(folder / "shards", split="train", tokenizers=travelling, field_tokenizers=present, samples_per_shard=5) as writer:
        for sample in samples:
            writer.write(sample)
    return World(folder / "shards", list(samples), tokenizers)
