"""Several networks in one recipe: what one makes of its rows, another reads."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator, Tensor
from worlds import lively, make_world, planner_of, recipe_from, sample_of, text_tokenizer

from stages.data.shards import open_shards
from stages.decoding import Prompt, Session
from stages.errors import RecipeError
from stages.flops import FlopCounter
from stages.model import Model, build_model, meta_model
from stages.options import RunOptions
from stages.parts.samplers import EulerConfig, Guide
from stages.recipe import Recipe
from stages.sample import sample
from stages.sequence.masks import may_attend
from stages.sequence.pack import pack
from stages.sequence.segment import Batch, Layout
from stages.train_unified import train_unified
from stages.training.checkpoint import load_model

# A language model, learned queries, a connector, a denoiser; `join` decides whether the plan belongs to the picture's block.
TWO = """
size = "tiny"
[paper]
arxiv = "0000.00000"
[tokenizers.bpe]
kind = "byte-bpe"
vocab_size = 300
special = ["<t2i>", "<mmu>", "<soi>", "<eoi>", "<sot>", "<eot>"]
[autoencoders.vae]
kind = "kl-cnn"
downsample = 4
multipliers = [1, 1, 1]
channels = 8
latent_channels = 5
[backbones.lm]
kind = "transformer"
width = 32
depth = 2
heads = 4
mlp_ratio = 1.5
[backbones.denoiser]
kind = "transformer"
width = 24
depth = 2
heads = 2
mlp_ratio = 1.5
modulation = "adaln-zero"
experts = ["plan", "picture"]
[ports.text]
backbone = "lm"
content = "token-ids"
tokenizer = "bpe"
connector = { kind = "embedding" }
head = { kind = "linear" }
objective = { kind = "next-token" }
[ports.queries]
backbone = "lm"
content = "queries"
count = 3
markers = { before = "<soi>" }
[ports.plan]
backbone = "denoiser"
content = "hidden"
of = ["text", "queries"]
skip_rows = 1
expert = "plan"
mask = "full"
connector = { kind = "transformer", depth = 1, heads = 2, projection = "mlp", out_rms = 2.0 }
[ports.draw]
backbone = "denoiser"
content = "latents"
autoencoder = "vae"
expert = "picture"
mask = "full"
positions = "grid"
timestep = "modulation"
connector = { kind = "linear" }
head = { kind = "linear" }
objective = { kind = "denoise" }
[tasks.draw]
segments = [
  { port = "text", text = "<bos>" },
  { port = "text", text = "{caption}", cond_dropout_prob = 0.1 },
  { port = "queries" },
  { port = "plan" },
  { port = "draw", field = "image", role = "target", merge = JOIN },
]
[tasks.edit]
segments = [
  { port = "text", text = "{caption}" },
  { port = "plan" },
  { port = "draw", field = "source", merge = true, cond_dropout_prob = 0.1 },
  { port = "draw", field = "image", role = "target", merge = true },
]
[tasks.text]
segments = [{ port = "text", text = "<bos>" }, { port = "text", text = "{caption}<eot>", role = "target" }]
[[phases]]
name = "language"
stage = "train-unified"
tasks = { text = 1.0 }
trainable = ["backbones.lm", "ports.text"]
steps = 3
batch_size = 4
lr = 1e-2
[[phases]]
name = "draw"
stage = "train-unified"
tasks = { draw = 1.0 }
trainable = ["ports.queries", "ports.plan", "ports.draw", "backbones.denoiser"]
steps = 3
batch_size = 4
lr = 1e-2
weight_decay = 0.1
[sample.draw]
sampler = "euler"
num_steps = 2
guidance_scale = 2.0
[sample.text]
sampler = "autoregressive"
temperature = 0.0
max_tokens = 6
"""


def recipe_of(joined: bool = False, *sets: str) -> Recipe:
    text = TWO.replace("JOIN", str(joined).lower())
    return recipe_from(text, sets=[*sets, f"tokenizers.bpe.vocab_size={text_tokenizer().vocab_size}"])


MODELS = {joined: lively(recipe_of(joined)) for joined in (False, True)}


def batch_of(model: Model, numbers: list[int], row_length: int | None = None) -> Batch:
    planner = planner_of(model.recipe)
    return pack([planner.plan(sample_of(n), "draw", None) for n in numbers], row_length)


def denoised(model: Model, batch: Batch, t: float) -> dict[int, Tensor]:
    """The prediction for every sample's picture, shown as it is with noise level t: {sample: (tokens, channels)}."""
    rows = batch.ports["draw"]
    rows.timestep = torch.full((len(rows.rows),), t)
    with torch.no_grad():
        language = model.hidden(batch, network="lm").flatten(0, 1)
        hidden = model.hidden(batch, network="denoiser", others={"lm": language}).flatten(0, 1)
        out = model.predict("draw", hidden.index_select(0, rows.rows))
    owner = rows.sample.index_select(0, rows.segment)
    return {int(n): out[owner == n] for n in owner.unique()}


def test_each_network_has_a_table_of_its_own_and_reads_the_rows_before_it() -> None:
    model = MODELS[False]
    sequences = [planner_of(model.recipe).plan(sample_of(n), "draw", None) for n in (0, 1, 2)]
    batch = pack(sequences)
    assert list(batch.layouts) == ["lm", "denoiser"]
    assert batch.num_tokens == sum(map(len, sequences))
    plan, text, queries = (batch.ports[name] for name in ("plan", "text", "queries"))
    assert plan.source is not None
    markers = {3}  # <soi> is of the text port: it stands before the queries and is read like any word
    for n in range(3):
        mine = plan.source[plan.sample.index_select(0, plan.segment) == n]
        words = text.rows[text.sample.index_select(0, text.segment) == n]
        asked = queries.rows[queries.sample.index_select(0, queries.segment) == n]
        assert mine.tolist() == [*words.tolist()[1:], *asked.tolist()]  # skip_rows leaves <bos> out
        assert len(asked) in markers
    assert torch.equal(queries.values, torch.arange(3).repeat(3))


@pytest.mark.parametrize("joined", [False, True])
def test_a_picture_does_not_depend_on_what_its_sample_is_packed_with(joined: bool) -> None:
    model = MODELS[joined]
    together = denoised(model, batch_of(model, [0, 1, 4], row_length=90), 0.4)
    for place, number in enumerate((0, 1, 4)):
        alone = denoised(model, batch_of(model, [number]), 0.4)[0]
        torch.testing.assert_close(together[place], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_a_prompt_reaches_the_picture_only_through_the_rows_that_are_read() -> None:
    model = MODELS[False]
    whole = denoised(model, batch_of(model, [0]), 0.4)[0]
    batch = batch_of(model, [0])
    batch.ports["text"].values = batch.ports["text"].values.flip(0)
    assert not torch.allclose(denoised(model, batch, 0.4)[0], whole, atol=1e-3)
    batch = batch_of(model, [0])
    assert batch.ports["plan"].source is not None
    with torch.no_grad():  # the same rows given by hand: the first network need not run
        language = model.hidden(batch_of(model, [0]), network="lm").flatten(0, 1)
        given = torch.zeros_like(language).index_copy(0, batch.ports["plan"].source, language.index_select(0, batch.ports["plan"].source))
        batch.ports["draw"].timestep = torch.full((6,), 0.4)
        hidden = model.hidden(batch, network="denoiser", others={"lm": given}).flatten(0, 1)
        torch.testing.assert_close(model.predict("draw", hidden.index_select(0, batch.ports["draw"].rows)), whole)


def test_queries_are_causal_and_the_connector_mixes_them() -> None:
    model = MODELS[False]
    batch = batch_of(model, [0])
    rows = batch.ports["queries"].rows
    with torch.no_grad():
        before = model.hidden(batch, network="lm").flatten(0, 1).index_select(0, rows)
        plan = model.ports["plan"].connector(before, [(3,)])  # type: ignore[operator,union-attr]
        batch.ports["queries"].values = torch.tensor([0, 1, 0])  # another last query
        after = model.hidden(batch, network="lm").flatten(0, 1).index_select(0, rows)
        mixed = model.ports["plan"].connector(after, [(3,)])  # type: ignore[operator,union-attr]
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2], after[2])
    assert float((plan[0] - mixed[0]).abs().max()) > 1e-3


def test_gradients_reach_queries_and_connector_and_stop_at_what_is_frozen() -> None:
    model = lively(recipe_of())
    model.requires_grad_(True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("ports.queries", "ports.plan", "ports.draw", "backbones.denoiser")))
    losses = model.losses(batch_of(model, [0, 1]), Generator().manual_seed(0))
    assert {name for name, loss in losses.items() if loss.count} == {"draw"}
    losses["draw"].mean.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None and bool(parameter.grad.any())}
    assert reached <= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"ports.queries.connector.weight", "ports.plan.connector.norm.weight", "ports.draw.connector.layers.0.weight"} <= reached
    layers = [f"backbones.denoiser.experts.picture.layers.{n}.{part}.weight" for n in (0, 1) for part in ("qkv", "modulation.linear")]
    assert {*layers, "backbones.denoiser.experts.plan.layers.0.qkv.weight"} <= reached


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("t", [0.0, 0.7])
def test_denoising_over_the_cache_is_what_training_computes(joined: bool, t: float) -> None:
    model = MODELS[joined]
    planner = planner_of(model.recipe)
    numbers = [0, 1, 4]
    samples = [sample_of(n) for n in numbers]
    expected = denoised(model, batch_of(model, numbers), t)
    drops = (frozenset(), frozenset({"caption"}))
    guide = Guide(kind="nested", drops=drops, terms=((1, 2.0),), interval=(0.0, 1.0), renorm="none")
    prompts = []
    for entry in samples:
        passes = [planner.prompt(entry, "draw", drop=drop)[0] for drop in drops]
        rest = planner.prompt(entry, "draw")[1]
        prompts.append(Prompt(entry.key, "draw/0", passes, planner.joined(rest[0])))
    session = Session(model, planner, prompts, guide, 40, 0)
    seen: list[Tensor] = []
    run = session._run_block

    def spying(name: str, batch: Batch, places: object, values: Tensor, level: float | None) -> Tensor:
        clean = torch.cat([torch.from_numpy(entry.fields["image.latents"]).flatten(1).T for entry in samples] * 2)
        seen.append(run(name, batch, places, clean, t))  # type: ignore[arg-type]
        return seen[-1]

    session._run_block = spying  # type: ignore[method-assign]
    with torch.no_grad():
        session.write_picture(rest[0], EulerConfig(num_steps=1), (2, 3), [True] * 3, commit=False)
    conditional = seen[0].reshape(2, 3, 6, 5)
    for place in range(3):
        torch.testing.assert_close(conditional[0, place], expected[place], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(conditional[1, place], expected[place], atol=1e-3)


def test_text_is_the_same_before_and_after_the_denoiser_learned(tmp_path: Path) -> None:
    recipe = recipe_of()
    samples = [sample_of(n) for n in range(4)]
    world = make_world(tmp_path / "world", recipe, samples)
    options = RunOptions(quiet=True, dtype="fp32")
    run = train_unified(recipe, str(world.shards), tmp_path / "run", options)
    short = recipe_of(False, "phases.draw.steps=0")
    first = train_unified(short, str(world.shards), tmp_path / "first", options)
    (_, after), (_, before) = load_model(run), load_model(first)
    for name, value in before.state_dict().items():
        learned = not torch.equal(value, after.state_dict()[name])
        assert learned <= name.startswith(("ports.queries", "ports.plan", "ports.draw", "backbones.denoiser")), name
    assert not torch.equal(before.ports["queries"].connector.weight, after.ports["queries"].connector.weight)  # type: ignore[operator,union-attr]
    drawn = sample(run, str(world.shards), tmp_path / "drawn", replace(options, limit=2), tasks=["draw"])
    assert [entry.fields["sample.image"].shape for entry in open_shards(str(drawn))] == [(8, 12, 3)] * 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ('ports.plan.of="draw"', "it must read a network that stands before backbones.denoiser"),
        ('ports.plan.of=["text", "draw"]', "are not rows of one network"),
        ('ports.plan.of="words"', "there is no 'words'"),
        ("ports.queries.count=0", 'content "queries" needs a number of them'),
        ('ports.queries.connector={kind="linear"}', "queries are learned at the network's own width"),
        ('backbones.denoiser.modulation="none"', "its network has no modulation"),
        ('tasks.text.segments=[{port="plan"}, {port="text", text="{caption}", role="target"}]', "which must stand before it"),
        ('tasks.text.segments=[{port="queries", text="a"}, {port="text", text="{caption}", role="target"}]', "is made of no field"),
    ],
)
def test_what_cannot_be_is_said(change: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe_of(False, change)


def test_with_zero_modulation_every_layer_starts_as_the_identity() -> None:
    model = build_model(recipe_of(), seed=0).eval()
    network = model.network("denoiser")
    batch = batch_of(model, [0])
    x = torch.randn(*batch.layouts["denoiser"].shape, 24, generator=Generator().manual_seed(0))
    with torch.no_grad():
        plain = network.experts["plan"].final_norm(x)  # type: ignore[operator,union-attr]
        torch.testing.assert_close(network(x, batch.layouts["denoiser"], noise=torch.full(x.shape[:2], 0.3)), plain)


def test_noise_levels_are_those_of_the_block() -> None:
    for joined, of_plan in ((False, 0.0), (True, 0.6)):
        model = MODELS[joined]
        batch = batch_of(model, [0, 1])
        batch.ports["draw"].timestep = torch.full((12,), 0.6)
        noise = model.noise(batch, "denoiser")
        assert noise is not None
        flat = noise.flatten()
        assert flat.index_select(0, batch.ports["draw"].rows).tolist() == pytest.approx([0.6] * 12)
        assert set(np.round(flat.index_select(0, batch.ports["plan"].rows).tolist(), 3)) == {of_plan}
        assert model.noise(batch, "lm") is None


def test_operations_are_counted_in_each_network_by_its_own_tokens() -> None:
    recipe = MODELS[False].recipe
    model = meta_model(recipe)
    batch = batch_of(MODELS[False], [0, 1, 4])
    counts = FlopCounter(model, recipe.phases[1]).of(batch)
    for name, width, depth in (("lm", 32, 2), ("denoiser", 24, 2)):
        layout = batch.layouts[name]
        assert counts[f"backbones.{name}.attention"] == 3 * 4 * depth * width * int((may_attend(layout, layout) & real(layout)).sum())
    frozen = 2 * 2 * (4 * 32 * 32 + 3 * 32 * 48) * 2  # forward and the gradient of what comes in, of two layers
    assert counts["backbones.lm"] == frozen * int((batch.layouts["lm"].sample_id >= 0).sum())


def real(layout: Layout) -> Tensor:
    return (layout.sample_id >= 0)[:, :, None]


@pytest.mark.parametrize("t", [0.0, 0.7])
def test_a_given_picture_in_the_block_stays_clean_while_the_other_is_denoised(t: float) -> None:
    """What is given and what is written are of one port and see each other: rows of both are told apart in every step."""
    model = MODELS[True]
    planner = planner_of(model.recipe)
    samples = [sample_of(n, **{"source.latents": sample_of(n + 10).fields["image.latents"]}) for n in (0, 1, 4)]
    batch = pack([planner.plan(entry, "edit", None) for entry in samples])
    rows = batch.ports["draw"]
    assert len(rows.rows) == 36 and int(rows.target.sum()) == 18
    rows.timestep = torch.where(rows.target, t, 0.0)
    with torch.no_grad():
        language = model.hidden(batch, network="lm").flatten(0, 1)
        hidden = model.hidden(batch, network="denoiser", others={"lm": language}).flatten(0, 1)
        out = model.predict("draw", hidden.index_select(0, rows.rows))[rows.target]
    owner = rows.sample.index_select(0, rows.segment)[rows.target]
    drops = (frozenset(), frozenset({"source"}))
    guide = Guide(kind="nested", drops=drops, terms=((1, 2.0),), interval=(0.0, 1.0), renorm="none")
    rest = planner.prompt(samples[0], "edit")[1]
    prompts = [
        Prompt(entry.key, "edit/0", [planner.prompt(entry, "edit", drop=drop)[0] for drop in drops], planner.joined(rest[0]))
        for entry in samples
    ]
    session = Session(model, planner, prompts, guide, 60, 0)
    run, seen = session._run_block, []

    def spying(name: str, batch: Batch, places: object, values: Tensor, level: float | None) -> Tensor:
        clean = torch.cat([torch.from_numpy(entry.fields["image.latents"]).flatten(1).T for entry in samples] * 2)
        seen.append(run(name, batch, places, clean, t))  # type: ignore[arg-type]
        return seen[-1]

    session._run_block = spying  # type: ignore[method-assign]
    with torch.no_grad():
        session.write_picture(rest[0], EulerConfig(num_steps=1), (2, 3), [True] * 3, commit=False)
    found = seen[0].reshape(2, 3, 6, 5)
    for place in range(3):
        torch.testing.assert_close(found[0, place], out[owner == place], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(found[1, place], out[owner == place], atol=1e-3)
