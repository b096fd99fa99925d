"""Overfit a few samples, then ask for them back: the only test that sees whether the sampler agrees with the trainer.

Every recipe that has something to give back, at its tiny size. Unified ones, by glob: eight samples with fabricated codes or latents, then `sample` must return the captions and
answers letter by letter and the pictures: codes exactly, latents up to a small error. A flipped sign, a reversed t, a marker outside its
block or a row read one place too late all train well and fail here.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from worlds import CAPTIONS, World, make_world

from stages.align import align
from stages.data.sample import Sample
from stages.data.shards import ShardWriter, open_shards
from stages.metrics.psnr import psnr
from stages.options import RunOptions
from stages.parts.autoencoders import DiscreteConfig, ViT1DConfig
from stages.parts.quantizers import MultiScaleConfig
from stages.parts.views.square import to_pixels, to_tensor
from stages.pretrain_tokenizer import pretrain_tokenizer
from stages.recipe import RECIPES, Phase, Recipe, Task, load_recipe
from stages.sample import sample
from stages.sequence.pack import pack
from stages.sequence.plan import Planner
from stages.sequence.segment import Role
from stages.tools.calls import Call, Reference, write_plan
from stages.train_unified import train_unified
from stages.training.checkpoint import load_autoencoder, load_model
from stages.travelling import load_travelling

UNIFIED = sorted(path.stem for path in (RECIPES / "unified").glob("*.toml"))
QUICK = "show-o"  # the one that stays in the fast set
GRID = (2, 3)  # of a picture's tokens
QUESTIONS = ["how many?", "of what colour?"]


def content_of(recipe: Recipe, number: int, field: str = "image") -> dict[str, np.ndarray]:
    """Codes or latents of picture `number`, for each autoencoder of the recipe, as those of a field."""
    rng = np.random.default_rng(number)
    fields: dict[str, np.ndarray] = {}
    for port in recipe.ports.values():
        if port.autoencoder:
            config = recipe.autoencoders[port.autoencoder]
            h, w = GRID[0] * port.patch_size, GRID[1] * port.patch_size
            if isinstance(config, DiscreteConfig):
                shape = (config.num_latents,) if isinstance(config, ViT1DConfig) else (h, w)  # in an order, or a grid
                if isinstance(config.quantizer, MultiScaleConfig):  # codes in a row are those of a square
                    shape = config.quantizer.code_shape(config.quantizer.sides[-1], config.quantizer.sides[-1])
                fields[f"{field}.{config.store}"] = rng.integers(0, config.quantizer.size, shape).astype(np.int32)
            else:
                fields[f"{field}.{config.store}"] = rng.standard_normal((config.latent_channels, h, w)).astype(np.float32)
    return fields


def painted(number: int) -> np.ndarray:
    """A picture of coloured blocks (32, 32, 3); no two numbers give the same."""
    rng = np.random.default_rng(number)
    return np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)


def calls_of(recipe: Recipe, number: int, caption: str) -> dict[str, object]:
    """A request and the calls that answer it, for a recipe that writes calls; one that sees is told nothing else."""
    if not last_written(recipe) & {"plan", "call"}:
        return {}
    calls = [Call("draw", {"caption": caption}), Call("edit", {"image": Reference("step-1"), "instruction": f"make it {number}"})]
    steps = [{"history": "no file", "call": str(calls[0])}, {"history": f"{number}_draw.png", "call": "done"}]
    return {
        "request": "what is this?" if recipe.encoders else f"draw {caption}, make it {number}",
        "plan": write_plan(calls),
        "steps": steps,
    }


def samples_for(recipe: Recipe) -> list[Sample]:
    return [
        Sample(
            f"{number:04d}",
            {
                "caption": caption,
                "qa": [{"question": QUESTIONS[0], "answer": str(number)}, {"question": QUESTIONS[1], "answer": caption.split()[-1]}],
                "image": painted(number),  # most tasks read its codes or latents, which are of their own
                **content_of(recipe, number),
                **calls_of(recipe, number, caption),
            },
        )
        for number, caption in enumerate(CAPTIONS)
    ]


def with_edits(recipe: Recipe, samples: Sequence[Sample]) -> list[Sample]:
    """The same samples for a recipe that edits: each one's picture becomes that of the next."""
    edited = []
    for number, entry in enumerate(samples):
        following = (number + 1) % len(CAPTIONS)
        told = {"instruction": f"now {CAPTIONS[following]}", "source": painted(number), "result": painted(following)}
        told |= content_of(recipe, number, "source") | content_of(recipe, following, "result")
        edited.append(replace(entry, fields=entry.fields | told))
    return edited if "result" in last_written(recipe) else list(samples)


def pictures_of(world: World, recipe: Recipe) -> list[np.ndarray]:
    """What a perfect model would draw: the samples' own codes or latents, decoded."""
    port = next(port for port in recipe.ports.values() if port.autoencoder)
    config = recipe.autoencoders[port.autoencoder]
    autoencoder = load_autoencoder(world.tokenizers[f"autoencoders.{port.autoencoder}"])
    content = torch.from_numpy(np.stack([entry.fields[f"image.{config.store}"] for entry in world.samples]))
    with torch.no_grad():
        decoded = autoencoder.decode_codes(content.long()) if config.codebook_size is not None else autoencoder.decode(content)
    return [to_pixels(picture) for picture in decoded]


def shortened(recipe: Recipe, steps: int | None = None, **keys: object) -> list[str]:
    """--set for a train-unified run with these settings. Of a recipe with one network only its first phase runs; where there are several,
    each phase teaches another part. Without `steps`, as many as it takes to overfit."""
    phases = recipe.phases_for("train-unified")
    sets: list[str] = []
    for number, phase in enumerate(phases):
        own = dict(keys)
        if "batch_tokens" in own and phase.batch_size is not None:  # a recipe whose batches are counted in samples
            own["batch_size"] = 2 * len(CAPTIONS)
            del own["batch_tokens"]
        if number and len(recipe.backbones) < 2:
            own = {"steps": 0}
        else:
            own["steps"] = steps or overfitting_steps(recipe, phase)
        sets += [f"phases.{phase.name}.{key}={json.dumps(value)}" for key, value in own.items()]
    return sets


def overfitting_steps(recipe: Recipe, phase: Phase) -> int:
    """A token takes few steps to learn by heart, a direction at every noise level many."""
    objectives = {recipe.ports[segment.port].objective for task in phase.tasks for segment in recipe.tasks[task].flat()}
    if any(objective is not None and objective.kind == "denoise" for objective in objectives):
        return 2000 if len(recipe.backbones) < 2 else 800
    return 300


def last_written(recipe: Recipe) -> set[str]:
    """The fields that the recipe's tasks are asked for."""
    return {field for task in recipe.tasks.values() for field in last_field(task)}


def last_field(task: Task) -> set[str]:
    """The field that a task is asked for, if any."""
    targets = [segment.fields for segment in task.flat() if segment.role == Role.TARGET and segment.fields]
    return {targets[-1][-1]} if targets else set()


def mistakes(written: list[str], truth: list[str]) -> list[tuple[str, str]]:
    return [(own, expected) for own, expected in zip(written, truth, strict=True) if own != expected]


@pytest.mark.rung("learns")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow) for name in UNIFIED])
def test_a_system_gives_back_what_it_was_overfitted_to(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, size="tiny")
    drawn = next((port for port in recipe.ports.values() if port.autoencoder), None)
    continuous = drawn is not None and recipe.autoencoders[drawn.autoencoder].codebook_size is None
    sets = shortened(recipe, batch_tokens=512, lr_schedule="cosine")
    recipe = load_recipe(name, size="tiny", sets=sets)
    world = make_world(tmp_path / "world", recipe, with_edits(recipe, samples_for(recipe)))
    options = RunOptions(quiet=True, dtype="fp32", seed=1)
    run = train_unified(recipe, str(world.shards), tmp_path / "run", options)
    written = list(open_shards(str(sample(run, str(world.shards), tmp_path / "samples", options))))

    assert [entry.key for entry in written] == [entry.key for entry in world.samples]
    told = last_written(recipe)  # some systems only draw
    assert told <= {"caption", "answer", "image", "result", "plan", "call"}
    if "caption" in told:
        assert not mistakes([entry.fields["sample.caption"] for entry in written], CAPTIONS)
    if "answer" in told:
        answers = [record["answer"] for entry in written for record in entry.fields["sample.qa"]]
        truths = [record["answer"] for entry in world.samples for record in entry.fields["qa"]]
        assert not mistakes(answers, truths)
    if "plan" in told:
        assert not mistakes([entry.fields["sample.plan"] for entry in written], [entry.fields["plan"] for entry in world.samples])
    if "call" in told:
        records = [record for entry in written for record in entry.fields["sample.steps"]]
        assert not mistakes([r["call"] for r in records], [r["call"] for entry in world.samples for r in entry.fields["steps"]])
    if drawn is None:  # a controller: others draw
        assert told <= {"plan", "call", "answer", "caption"}
        return
    assert "image" in told

    truth = pictures_of(world, recipe)
    pictures = [entry.fields["sample.image"] for entry in written]
    apart = min(psnr(a, b) for i, a in enumerate(truth) for b in truth[:i])
    if continuous:
        scores = [psnr(own, expected) for own, expected in zip(pictures, truth, strict=True)]
        assert min(scores) > apart + 6, (scores, apart)
        if "result" in told:
            edited = [entry.fields["sample.result"] for entry in written]
            scores = [psnr(own, expected) for own, expected in zip(edited, truth[1:] + truth[:1], strict=True)]
            assert min(scores) > apart + 6, (scores, apart)
    else:
        assert apart < 40  # pictures of different codes do look different
        assert all(np.array_equal(own, expected) for own, expected in zip(pictures, truth, strict=True))


TOKENIZERS = sorted(path.stem for path in (RECIPES / "tokenizers").glob("*.toml"))
OF_PICTURES = [name for name in TOKENIZERS if load_recipe(name, size="tiny").autoencoders]


@pytest.mark.slow
@pytest.mark.rung("learns")
@pytest.mark.parametrize("recipe", OF_PICTURES)
def test_a_tokenizer_gives_back_the_pictures_it_was_overfitted_to(recipe: str, tmp_path: Path) -> None:
    pictures = [painted(number) for number in range(8)]
    with ShardWriter(tmp_path / "pictures", split="train") as writer:
        for number, picture in enumerate(pictures):
            writer.write(Sample(f"{number:04d}", {"image": picture}))
    loaded = load_recipe(recipe, size="tiny", sets=["phases.train.steps=600", "phases.train.batch_size=8"])
    options = RunOptions(quiet=True, dtype="fp32", seed=1)
    folder = pretrain_tokenizer(loaded, str(tmp_path / "pictures"), tmp_path / "run", options)
    autoencoder = load_autoencoder(folder)
    images = torch.stack([to_tensor(picture) for picture in pictures])
    with torch.no_grad():
        quantized = autoencoder.codebook_size is not None
        rebuilt = (
            autoencoder.decode_codes(autoencoder.encode_codes(images)) if quantized else autoencoder.decode(autoencoder.encode(images))
        )
    scores = [psnr(to_pixels(own), picture) for own, picture in zip(rebuilt, pictures, strict=True)]
    apart = min(psnr(a, b) for i, a in enumerate(pictures) for b in pictures[:i])
    assert min(scores) > apart + 10, (scores, apart)


@pytest.mark.slow
@pytest.mark.rung("learns", "clip")
def test_towers_find_the_pairs_they_were_overfitted_to(tmp_path: Path) -> None:
    recipe = load_recipe("clip", size="tiny", sets=["phases.contrast.steps=60", "phases.contrast.batch_size=8"])
    pairs = [Sample(f"{number:04d}", {"image": painted(number), "caption": caption}) for number, caption in enumerate(CAPTIONS)]
    world = make_world(tmp_path / "world", recipe, pairs)
    folder = align(recipe, str(world.shards), tmp_path / "run", RunOptions(quiet=True, dtype="fp32", seed=1))
    checkpoint, model = load_model(folder)
    trained, travelling = load_travelling(checkpoint.recipe, checkpoint.tokenizers)
    planner = Planner(trained, travelling.text, dict(model.encoders.items()))
    batch = pack([planner.plan(entry, "pair", Random(0)) for entry in world.samples])
    with torch.no_grad():
        images, texts = (model.pooled(port, batch.ports[port]) for port in ("image", "text"))
    similarity = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    assert similarity.argmax(0).tolist() == similarity.argmax(1).tolist() == list(range(len(CAPTIONS)))
