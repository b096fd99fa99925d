"""Latents drawn by masked autoregression and features written one after another: over a cache, what full passes say; trained, what was
learned. The latents' port is tried bare (a linear connector) and as a masked autoencoder around the network."""

import copy
from collections.abc import Sequence as Listing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_decoding import ONE_PASS, hidden_after, written_text
from worlds import CAPTIONS, lively, make_world, mixed_recipe, planner_of, recipe_from, sample_of, text_tokenizer

from stages.data.sample import Sample
from stages.data.shards import open_shards
from stages.decoding import Prompt, Session
from stages.errors import RecipeError
from stages.model import Model, build_model
from stages.options import RunOptions
from stages.parts.layers import patchify
from stages.parts.samplers import AutoregressiveConfig, Guide, MaskedDenoiseSamplerConfig
from stages.parts.samplers.noise import sample_generator, sample_normals, sample_uniforms
from stages.recipe import Recipe, SegmentSpec
from stages.sample import sample
from stages.sequence.pack import pack
from stages.sequence.plan import Planner
from stages.sequence.segment import Role, Segment, Sequence
from stages.train_unified import train_unified

GRID, SEED = (2, 3), 3
MASKED = ['ports.latents.timestep="none"', 'sample.latents={sampler="masked-denoise"}']
MASKED += ['ports.latents.objective={kind="masked-denoise", schedule="linear", predict="velocity", mask_ratio="linear"}']
BARE = lively(mixed_recipe(*MASKED, 'ports.latents.head={kind="diffusion-mlp", width=16, depth=2}'))
AROUND = lively(
    mixed_recipe(
        *MASKED,
        'ports.latents.mask="causal"',
        'ports.latents.head={kind="diffusion-mlp", width=16, depth=2, decoder={width=24, depth=1, heads=2}}',
        'ports.latents.connector={kind="masked-encoder", width=24, depth=1, heads=2}',
    )
)
BOTH = pytest.mark.parametrize("model", [BARE, AROUND], ids=["bare", "around"])
LATENTS = SegmentSpec(port="latents", field="image", role=Role.TARGET)
TEXT = SegmentSpec(port="text", text="{comment}<eot>", role=Role.TARGET)


def contexts(model: Model, numbers: Listing[int] = (0, 1, 4), drop: Listing[str] = ()) -> list[list[Segment]]:
    planner = planner_of(model.recipe)
    return [planner.prompt(sample_of(number), "paint", drop=drop)[0] for number in numbers]


def open_session(model: Model, passes: list[list[list[Segment]]], guide: Guide = ONE_PASS, keys: Listing[str] = "xyz") -> Session:
    prompts = [Prompt(key, "paint/0", own) for key, own in zip(keys, passes, strict=False)]
    return Session(model, planner_of(model.recipe), prompts, guide, 60, SEED)


def full_pass(model: Model, context: list[Segment], latents: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """What the head is told of each latent (n, w), from one pass over everything."""
    picture = planner_of(model.recipe).block(LATENTS, latents, GRID)
    batch = pack([Sequence(key="a", task="t", segments=(*context, *picture))])
    batch.ports["latents"] = rows = replace(batch.ports["latents"], values=latents, hidden=hidden)
    return model.conditions("latents", rows, model.hidden(batch)[0].index_select(0, rows.rows))


def first_numbers(key: str, n: int = 6, channels: int = 5) -> tuple[torch.Tensor, torch.Generator]:
    """The order of one sample, and its generator, which goes on with the noise of the first round."""
    numbers = sample_generator(SEED, key, "paint/0", 1)
    return sample_uniforms([numbers], (n,))[0].argsort(), numbers


@torch.no_grad()
@BOTH
def test_rounds_over_the_cached_prefix_repeat_full_passes(model: Model) -> None:
    """Two rounds, two Euler steps of the head each: everything written out with full passes and the same numbers."""
    given = contexts(model)
    config = MaskedDenoiseSamplerConfig(num_steps=2, head_steps=2, eta=0.0)
    drawn = open_session(model, [[own] for own in given]).write_picture(LATENTS, config, GRID, [True] * 3, commit=False)
    assert drawn.shape == (3, 5, *GRID)
    for context, own, key in zip(given, drawn, "xyz", strict=True):
        order, numbers = first_numbers(key)
        latents, hidden = torch.zeros(6, 5), torch.ones(6, dtype=torch.bool)
        for remaining, left in ((4, 6), (0, 4)):  # floor(6 · cos(π/4)) stay hidden
            chosen = order[remaining:left]
            z = full_pass(model, context, latents, hidden)[chosen]
            x = sample_normals([numbers], (left - remaining, 5))[0]
            for t in (1.0, 0.5):
                x = x - model.ports["latents"].head(x, torch.full((len(x),), t), z) / 2  # type: ignore[operator]
            latents[chosen], hidden[chosen] = x, False
        torch.testing.assert_close(patchify(own, 1), latents, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_guidance_combines_the_head_s_predictions_of_two_passes(model: Model, schedule: str) -> None:
    config = MaskedDenoiseSamplerConfig(num_steps=1, head_steps=1, eta=0.0, guidance_scale=2.5, guidance_schedule=schedule)
    passes = [list(own) for own in zip(contexts(model), contexts(model, drop=["caption"]), strict=True)]
    session = open_session(model, passes, config.guide({"caption"}))
    drawn = session.write_picture(LATENTS, config, GRID, [True] * 3, commit=False)
    hidden, head = torch.ones(6, dtype=torch.bool), model.ports["latents"].head
    for (cond, uncond), own, key in zip(passes, drawn, "xyz", strict=True):
        order, numbers = first_numbers(key)
        noise = torch.zeros(6, 5)
        noise[order] = sample_normals([numbers], (6, 5))[0]
        told = [full_pass(model, context, torch.zeros(6, 5), hidden) for context in (cond, uncond)]
        with_text, without = (head(noise, torch.ones(6), z) for z in told)  # type: ignore[operator]
        torch.testing.assert_close(patchify(own, 1), noise - (without + 2.5 * (with_text - without)), atol=1e-4, rtol=1e-3)


@torch.no_grad()
@BOTH
def test_samples_do_not_depend_on_their_batch_and_text_goes_on_after_the_clean_picture(model: Model) -> None:
    given = contexts(model)
    config = MaskedDenoiseSamplerConfig(num_steps=3, head_steps=3)
    session = open_session(model, [[own] for own in given])
    drawn = session.write_picture(LATENTS, config, GRID, [True, False, True], commit=True)
    alone = open_session(model, [[given[2]]], keys="z").write_picture(LATENTS, config, GRID, [True], commit=False)
    torch.testing.assert_close(drawn[2], alone[0], atol=1e-4, rtol=1e-3)
    ids, _ = session.write_text(TEXT, AutoregressiveConfig(max_tokens=3), stop=[])
    planner = planner_of(model.recipe)
    for row, (context, on) in enumerate(zip(given, [True, False, True], strict=True)):
        picture = planner.block(LATENTS, patchify(drawn[row], 1), GRID) if on else []
        expected = hidden_after([*context, *picture, written_text(ids[row])], model)[-1]
        torch.testing.assert_close(session.last[row], expected, atol=2e-5, rtol=1e-4)


@BOTH
def test_a_loss_does_not_see_what_it_judges(model: Model) -> None:
    """What the head is told of any latent is the same whatever the hidden latents were; visible ones matter."""
    planner = planner_of(model.recipe)
    told = []
    for seed in (0, 1):
        entry = sample_of(0)
        batch = pack([planner.plan(entry, "paint", None)])
        prepared = model.corrupt(batch, torch.Generator().manual_seed(5)).ports["latents"]
        assert prepared.hidden is not None
        changed = torch.where(prepared.hidden[:, None], torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)), prepared.goal)
        batch.ports["latents"] = replace(batch.ports["latents"], values=changed)
        noisy = model.corrupt(batch, torch.Generator().manual_seed(5))
        rows = noisy.ports["latents"]
        told.append(model.conditions("latents", rows, model.hidden(noisy)[0].index_select(0, rows.rows)).detach())
    assert torch.equal(told[0], told[1])


@torch.no_grad()
def test_without_the_network_s_rows_it_is_a_masked_autoencoder_alone() -> None:
    """Harmon's residual: what the network says is added to what the encoder said. Cut that projection, and no prompt matters any more."""
    model, cut = copy.deepcopy(AROUND), copy.deepcopy(AROUND)
    decoder: Any = cut.ports["latents"].head.decoder  # type: ignore[union-attr]
    decoder.into.weight.zero_()
    decoder.into.bias.zero_()
    entry = sample_of(0)
    latents, hidden = patchify(torch.from_numpy(entry.fields["image.latents"]), 1), torch.tensor([True, False, True, True, False, True])
    shown = latents.masked_fill(hidden[:, None], 0.0)
    first, second = contexts(model)[:2]
    one, other = (full_pass(model, context, shown, hidden) for context in (first, second))
    assert float((one - other).abs().max()) > 0.01
    _, memory = cut.ports["latents"].connector(shown, [GRID], hidden)  # type: ignore[operator]
    alone = decoder.blocks(decoder.inner(memory) + decoder.blocks.places([GRID]), [GRID])
    for context in (first, second):
        torch.testing.assert_close(full_pass(cut, context, shown, hidden), alone, atol=1e-5, rtol=1e-4)


@BOTH
def test_every_weight_of_the_port_learns(model: Model) -> None:
    planner = planner_of(model.recipe)
    batch = pack([planner.plan(sample_of(number), "paint", None) for number in range(3)])
    losses = model.losses(batch, torch.Generator().manual_seed(0))
    model.zero_grad()
    losses["latents"].mean.backward()
    assert 0 < losses["latents"].count <= 18
    for name, parameter in model.ports["latents"].named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (['ports.latents.head={kind="linear"}'], "'linear' does not fit the objective 'masked-denoise'"),
        (['sample.latents={sampler="ddim"}'], "'ddim' does not fit the objective 'masked-denoise'"),
        (['ports.latents.timestep="add"'], "enters its head alone"),
        (['ports.latents.objective.predict="noise"'], "predicted noise says nothing"),
        (['ports.latents.head.decoder={width=16, depth=1, heads=2}', 'ports.latents.connector={kind="masked-encoder", width=24, depth=1, heads=2}'], "24 wide"),
        (['ports.codes.head={kind="diffusion-mlp", width=8}', 'ports.codes.vocabulary="own"'], "'diffusion-mlp' does not fit"),
        (['ports.latents.connector={kind="masked-encoder", width=24, depth=1, heads=5}'], "heads must divide the width 24"),
    ],
)  # fmt: skip
def test_parts_that_do_not_go_together(sets: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        mixed_recipe(*MASKED, 'ports.latents.head={kind="diffusion-mlp", width=16, depth=2}', *sets)


# features

FEATURES = """
size = "tiny"
[paper]
arxiv = "0000.00000"
[tokenizers.bpe]
kind = "byte-bpe"
vocab_size = 300
special = ["<t2i>", "<mmu>", "<soi>", "<eoi>", "<sot>", "<eot>"]
[encoders.eye]
kind = "siglip-vit"
width = 12
depth = 1
heads = 2
patch_size = 8
[backbones.lm]
kind = "transformer"
width = 32
depth = 2
heads = 4
[ports.text]
content = "token-ids"
tokenizer = "bpe"
connector = { kind = "embedding" }
head = { kind = "linear" }
objective = { kind = "next-token" }
[ports.image]
content = "features"
encoder = "eye"
view = { kind = "pad", size = 16 }
connector = { kind = "linear" }
head = { kind = "linear" }
objective = { kind = "next-feature" }
markers = { before = "<soi>", after = "<eoi>" }
[tasks.draw]
segments = [
  { port = "text", text = "<bos>" },
  { port = "text", text = "{caption}", cond_dropout_prob = 0.1 },
  { port = "image", field = "image", role = "target" },
]
[[phases]]
name = "joint"
stage = "train-unified"
tasks = { draw = 1.0 }
steps = 3
batch_size = 3
lr = 1e-3
[sample.image]
sampler = "autoregressive"
"""
IMAGE = SegmentSpec(port="image", field="image", role=Role.TARGET)


def features_recipe(*sets: str) -> Recipe:
    return recipe_from(FEATURES, sets=[*sets, f"tokenizers.bpe.vocab_size={text_tokenizer().vocab_size}"])


def seen(number: int) -> Sample:
    picture = np.random.default_rng(number).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    return Sample(f"{number:04d}", {"caption": CAPTIONS[number], "image": picture})


def planner_for(model: Model) -> Planner:
    return Planner(model.recipe, {"bpe": text_tokenizer()}, dict(model.encoders.items()))


def written_features(model: Model, numbers: Listing[int], guide: Guide = ONE_PASS, commit: bool = False) -> tuple[torch.Tensor, Session]:
    planner = planner_for(model)
    drops = [sorted(drop) for drop in guide.drops]
    passes = [[planner.prompt(seen(number), "draw", drop=drop)[0] for drop in drops] for number in numbers]
    session = Session(model, planner, [Prompt(f"{n}", "draw/0", own) for n, own in zip(numbers, passes, strict=True)], guide, 30, SEED)
    with torch.no_grad():
        return session.write_picture(IMAGE, AutoregressiveConfig(), (4,), [True] * len(numbers), commit=commit), session


@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_features_fed_back_over_the_cache_are_those_of_a_full_pass(scale: float) -> None:
    model = lively(features_recipe())
    guide = AutoregressiveConfig(guidance_scale=scale).guide({"caption"})
    features, session = written_features(model, [0, 1, 4], guide, commit=True)
    assert features.shape == (3, 4, 12)
    planner = planner_for(model)
    for row, number in enumerate([0, 1, 4]):
        told = []
        for drop in guide.drops:
            context = planner.prompt(seen(number), "draw", drop=sorted(drop))[0]
            block = planner.block(IMAGE, features[row], (4,))
            with torch.no_grad():
                hidden = hidden_after([*context, *block], model)
                before = sum(map(len, context))  # the row of <soi>
                told.append(model.predict("image", hidden[before : before + 4]))
            if not drop:
                torch.testing.assert_close(session.last[row], hidden[-1], atol=2e-5, rtol=1e-4)
        expected = told[0] if scale == 1.0 else told[1] + scale * (told[0] - told[1])
        torch.testing.assert_close(features[row], expected, atol=1e-4, rtol=1e-3)


def test_features_it_was_overfitted_to_are_regressed_back() -> None:
    """Teacher-forced in training, fed its own predictions afterwards; the encoder is only asked, never trained."""
    model = build_model(features_recipe(), 0)
    numbers = [0, 1, 2]
    planner = planner_for(model)
    batch = pack([planner.plan(seen(number), "draw", None) for number in numbers])
    learning = [parameter for name, parameter in model.named_parameters() if not name.startswith("encoders")]
    optimizer = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=120)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        losses = model.losses(batch, generator)
        optimizer.zero_grad()
        losses["image"].mean.backward()
        optimizer.step()
        rate.step()
    assert losses["image"].count == 12
    assert all(parameter.grad is None for parameter in model.encoders.parameters())
    pictures = torch.stack([planner.picture("image", seen(number).fields["image"]) for number in numbers])
    truth = model.encoders["eye"](pictures).tokens
    features, _ = written_features(model.eval(), numbers)
    apart = min(float((truth[i] - truth[j]).square().mean()) for i in range(3) for j in range(i))
    assert float((features - truth).square().mean(dim=(1, 2)).max()) < 0.02 * apart


def test_a_run_writes_features_into_its_samples(tmp_path: Path) -> None:
    recipe = features_recipe()
    world = make_world(tmp_path / "world", recipe, [seen(number) for number in range(4)])
    options = RunOptions(quiet=True, dtype="fp32", seed=1)
    run = train_unified(recipe, str(world.shards), tmp_path / "run", options)
    written = list(open_shards(str(sample(run, str(world.shards), tmp_path / "samples", options))))
    assert len(written) == 4
    for entry in written:
        assert entry.fields["sample.image.eye-features"].shape == (4, 12)
        assert np.isfinite(entry.fields["sample.image.eye-features"]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('ports.image.mask="full"', "must not see those to come"),
        ('ports.image.head={kind="diffusion-mlp", width=8}', "'diffusion-mlp' does not fit the objective 'next-feature'"),
        ('ports.text.objective={kind="next-feature"}', "tokens an encoder makes of a picture"),
        ("sample.image.temperature=0.5", "nothing is drawn"),
        ('sample.image={sampler="masked"}', "'masked' does not fit the objective 'next-feature'"),
    ],
)
def test_features_that_cannot_be_written_in_order(change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        features_recipe(change)
