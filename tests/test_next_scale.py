"""Pictures drawn scale by scale: training shows what sampling shows, nobody sees ahead, and it is a part like any other.

HYBRID is a system that no paper has: a see port of SigLIP features and a draw port of multi-scale codes, experts by role, text answers
and next-scale drawing in one transformer. It is written here as anybody would write it, in TOML.
"""

from collections.abc import Sequence as Listing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from worlds import CAPTIONS, World, lively, make_world, planner_of, recipe_from, text_tokenizer

from stages.data.sample import Sample
from stages.data.shards import open_shards
from stages.decoding import Prompt, Session
from stages.errors import DataError, RecipeError, UsageError
from stages.model import Model
from stages.options import RunOptions
from stages.parts.connectors.scales import accumulated_maps, resized
from stages.parts.quantizers import MultiScaleConfig, MultiScaleVQ
from stages.parts.samplers import AutoregressiveConfig, Guide, NextScaleSamplerConfig
from stages.parts.views.square import to_pixels
from stages.recipe import Recipe, SegmentSpec, load_recipe
from stages.sample import sample
from stages.sequence.masks import may_attend
from stages.sequence.pack import lay_out, pack
from stages.sequence.plan import Planner, split_scales
from stages.sequence.segment import MaskKind, Role, Segment, Sequence
from stages.train_unified import train_unified
from stages.training.checkpoint import load_autoencoder, read_weights

HYBRID = """
size = "tiny"
[paper]
arxiv = "0000.00000"
[tokenizers.bpe]
kind = "byte-bpe"
vocab_size = 300
special = ["<t2i>", "<mmu>", "<soi>", "<eoi>", "<sot>", "<eot>"]
[encoders.siglip]
kind = "siglip-vit"
width = 32
depth = 2
heads = 4
patch_size = 8
[autoencoders.vq]
kind = "cnn"
downsample = 4
multipliers = [1, 1, 1]
channels = 8
latent_channels = 4
quantizer = { kind = "multi-scale", codebook_size = 13, codebook_dim = 5, sides = [1, 2, 3, 4], phis = 2, decay = 0, revive = 0 }
[backbones.lm]
kind = "transformer"
width = 48
depth = 3
heads = 4
mlp_ratio = 2.0
experts = ["understand", "generate"]
[ports.text]
content = "token-ids"
tokenizer = "bpe"
expert = "understand"
connector = { kind = "embedding" }
head = { kind = "linear" }
objective = { kind = "next-token" }
null_condition = "empty"
[ports.see]
content = "features"
encoder = "siglip"
view = { kind = "square", size = 16 }
expert = "understand"
mask = "full"
connector = { kind = "mlp", depth = 2 }
[ports.draw]
content = "codes"
autoencoder = "vq"
expert = "generate"
mask = "full"
positions = "grid"
connector = { kind = "embedding-scales" }
head = { kind = "linear" }
objective = { kind = "next-scale" }
markers = { before = "<soi>", after = "<eoi>", inside = false }
[tasks.draw]
segments = [
  { port = "text", text = "<t2i>{caption}<eot>", cond_dropout_prob = 0.1 },
  { port = "draw", field = "image", role = "target" },
]
[tasks.answer]
segments = [
  { port = "text", text = "<mmu>" },
  { port = "see", field = "image" },
  { each = "qa", segments = [
    { port = "text", text = "<sot>{question}", mask = "isolated-causal" },
    { port = "text", text = "{answer}<eot>", role = "target", mask = "isolated-causal", merge = true },
  ] },
]
[tasks.tell]
segments = [
  { port = "see", field = "image" },
  { port = "draw", field = "image" },
  { port = "text", text = "<sot>" },
  { port = "text", text = "{caption}<eot>", role = "target" },
]
[[phases]]
name = "joint"
stage = "train-unified"
tasks = { draw = 1.0, answer = 1.0, tell = 0.5 }
steps = 6
batch_size = 4
lr = 3e-3
[sample.draw]
sampler = "next-scale"
temperature = 0.7
guidance_scale = 1.5
guidance_schedule = "linear"
[sample.text]
sampler = "autoregressive"
temperature = 0.0
max_tokens = 24
"""
SIDES = (1, 2, 3, 4)
N = sum(side * side for side in SIDES)
DRAW = SegmentSpec(port="draw", field="image", role=Role.TARGET)
COMMENT = SegmentSpec(port="text", text="{comment}<eot>", role=Role.TARGET)
ONE_PASS = Guide(kind="nested", drops=(frozenset(),), terms=(), interval=(0.0, 1.0), renorm="none")
GREEDY = NextScaleSamplerConfig(temperature=0.0)


def hybrid(*sets: str) -> Recipe:
    return recipe_from(HYBRID, sets=[*sets, f"tokenizers.bpe.vocab_size={text_tokenizer().vocab_size}"])


def quantizer_of(config: MultiScaleConfig, in_dim: int = 4) -> MultiScaleVQ:
    """One whose codebook and φ are random and not small."""
    torch.manual_seed(5)
    quantizer = config.build(in_dim).eval().requires_grad_(False)
    torch.nn.init.normal_(quantizer.codebook, generator=Generator().manual_seed(6))
    return quantizer


def hybrid_model(recipe: Recipe) -> Model:
    model = lively(recipe)
    model.quantizers = {"vq": quantizer_of(recipe.autoencoders["vq"].quantizer)}  # type: ignore[attr-defined]
    return model


RECIPE = hybrid()
MODEL = hybrid_model(RECIPE)
PLANNER = Planner(RECIPE, {"bpe": text_tokenizer()}, dict(MODEL.encoders.items()))
QUANTIZER = MODEL.quantizers["vq"]


@pytest.fixture(autouse=True)
def _no_gradients(request: pytest.FixtureRequest) -> Any:
    with torch.set_grad_enabled("tmp_path" in request.fixturenames):
        yield


def painted(number: int) -> np.ndarray:
    return np.kron(np.random.default_rng(number).integers(0, 256, (2, 2, 3)), np.ones((8, 8, 1))).astype(np.uint8)


def sample_of(number: int, codes: Tensor | None = None) -> Sample:
    own = torch.randint(13, (N,), generator=Generator().manual_seed(number)) if codes is None else codes
    return Sample(
        f"{number:04d}",
        {
            "caption": CAPTIONS[number],
            "qa": [{"question": "how many?", "answer": str(number)}, {"question": "of what?", "answer": CAPTIONS[number].split()[-1]}],
            "image": painted(number),
            "image.codes": own.numpy().astype(np.int32),
        },
    )


def codes_of(entry: Sample) -> Tensor:
    return torch.from_numpy(entry.fields["image.codes"]).long()


class Forced(NextScaleSamplerConfig):
    """Draws what it is told, and notes the logits it was given."""

    codes: Any
    seen: Any

    def choose(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        start = sum(step.shape[1] for step in self.seen)
        self.seen.append(logits)
        return self.codes[:, start : start + logits.shape[1]]


def open_session(contexts: Listing[Listing[Segment]], model: Model = MODEL, keys: Listing[str] = ("x", "y", "z")) -> Session:
    prompts = [Prompt(key, "draw/0", [list(context)]) for key, context in zip(keys, contexts, strict=False)]
    return Session(model, PLANNER, prompts, ONE_PASS, 120, 3)


def contexts(numbers: Listing[int] = (0, 1, 4)) -> list[list[Segment]]:
    return [PLANNER.prompt(sample_of(number), "draw")[0] for number in numbers]


def read_in_full(segments: Listing[Segment], model: Model = MODEL) -> tuple[Tensor, Tensor]:
    """Hidden rows (l, d) and the draw port's logits (n, v) of one sample in one forward pass."""
    batch = model.corrupt(pack([Sequence(key="a", task="t", segments=tuple(segments))]), Generator())
    hidden = model.hidden(batch)[0]
    read = batch.ports["draw"].read
    assert read is not None
    return hidden, model.predict("draw", hidden.index_select(0, read))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


# the sequence


def test_a_picture_of_var_is_680_codes_in_ten_blocks_and_its_mask_is_the_published_one() -> None:
    """sc(k) <= sc(q) entry by entry, behind a prompt that everybody sees and that sees no picture."""
    recipe = load_recipe("var", size="paper")
    planner = planner_of(recipe)
    sides = recipe.autoencoders["vq"].quantizer.sides  # type: ignore[attr-defined]
    planned = planner.plan(Sample("a", {"caption": CAPTIONS[0], "image.codes": np.arange(680, dtype=np.int32)}), "draw", None)
    prompt, *scales = planned.segments
    assert [segment.grid for segment in scales] == [(side, side) for side in sides]
    assert [segment.scale for segment in scales] == list(range(10))
    assert torch.cat([segment.payload for segment in scales]).tolist() == list(range(680))
    level = torch.repeat_interleave(torch.arange(10), torch.tensor([side * side for side in sides]))
    expected = torch.ones(len(prompt) + 680, len(prompt) + 680, dtype=torch.bool)
    expected[len(prompt) :, len(prompt) :] = level[None, :] <= level[:, None]
    expected[: len(prompt), len(prompt) :] = False
    layout = lay_out(planned.segments)
    assert torch.equal(may_attend(layout, layout)[0], expected)


def test_scales_of_a_smaller_picture_keep_their_proportions_and_codes_of_no_square_are_refused() -> None:
    config = MultiScaleConfig(sides=(1, 2, 4))
    segment = Segment(port="draw", payload=torch.arange(6), grid=(6,), mask=MaskKind.FULL)
    assert [part.grid for part in split_scales(segment, config)] == [(1, 1), (1, 1), (2, 2)]
    with pytest.raises(DataError, match="7 codes are not those of a square grid"):
        split_scales(replace(segment, payload=torch.arange(7), grid=(7,)), config)


# what is shown


def test_a_scale_is_shown_the_sum_of_those_before_it_and_a_given_one_also_its_own() -> None:
    """The sums are those that decode the codes when all finer ones add nothing; the whole of them is what is decoded."""
    codes = torch.randint(13, (3, N), generator=Generator().manual_seed(1))
    drawn, given = (QUANTIZER.maps(codes, (4, 4), torch.full((3,), value)) for value in (False, True))
    parts = [
        QUANTIZER.part(own, k, (s, s), (4, 4)) for k, (own, s) in enumerate(zip(codes.split([1, 4, 9, 16], dim=1), SIDES, strict=True))
    ]
    first = 0
    for k, side in enumerate(SIDES):
        stop = first + side * side
        so_far = [torch.stack([torch.zeros_like(parts[0]), *parts[:number]]).sum(0) for number in (k, k + 1)]
        for maps, total in zip((drawn, given), so_far, strict=True):
            cells = F.adaptive_avg_pool2d(total, side).permute(0, 2, 3, 1).reshape(3, -1, 5)
            torch.testing.assert_close(maps[:, first:stop], cells, atol=1e-6, rtol=1e-5)
        first = stop
    assert not drawn[:, 0].any()
    assert torch.equal(given[:, 14:].transpose(1, 2).reshape(3, 5, 4, 4), QUANTIZER.lookup_grid(codes, (4, 4)))
    assert torch.equal(QUANTIZER.maps(codes, (4, 4), torch.tensor([True, False, True])), torch.stack([given[0], drawn[1], given[2]]))


def test_pictures_of_several_sizes_in_one_batch_are_each_shown_their_own_map() -> None:
    config: Any = RECIPE.autoencoders["vq"].quantizer  # type: ignore[attr-defined]
    numbers = [(4, 4), (8, 8), (4, 4)]
    pictures = [torch.randint(13, config.code_shape(*grid), generator=Generator().manual_seed(i)) for i, grid in enumerate(numbers)]
    segments = [
        PLANNER.block(replace_role(DRAW, role), own, own.shape)
        for own, role in zip(pictures, ("target", "context", "context"), strict=True)
    ]
    rows = pack([Sequence(key=str(i), task="t", segments=tuple(own)) for i, own in enumerate(segments)]).ports["draw"]
    order = rows.sample.tolist()
    expected = {
        i: QUANTIZER.maps(own[None], grid, torch.tensor([i > 0]))[0] for i, (own, grid) in enumerate(zip(pictures, numbers, strict=True))
    }
    found = accumulated_maps(QUANTIZER, rows)
    torch.testing.assert_close(found, torch.cat([expected[i] for i in dict.fromkeys(order)]))


def replace_role(spec: SegmentSpec, role: str) -> SegmentSpec:
    return spec.model_copy(update={"role": Role(role)})


def test_places_of_another_grid_lie_between_the_learned_ones() -> None:
    places = torch.arange(4.0)[:, None].expand(-1, 3).clone()
    assert resized(places, 2, (2, 2)) is places
    assert resized(places, 2, (1, 1)).tolist() == [[1.5] * 3]
    assert resized(places, 2, (4, 4))[:4, 0].tolist() == [0.0, 0.25, 0.75, 1.0]


def test_the_first_scale_begins_from_the_learned_vector_and_every_token_knows_its_place_and_scale() -> None:
    segments = PLANNER.block(DRAW, codes_of(sample_of(0)), (N,))
    batch = pack([Sequence(key="a", task="t", segments=tuple(segments))])
    rows = batch.ports["draw"]
    connector: Any = MODEL.ports["draw"].connector  # type: ignore[union-attr]
    found = MODEL.embed_rows("draw", rows)
    level = torch.repeat_interleave(torch.arange(4), torch.tensor([1, 4, 9, 16]))
    inputs = torch.cat([connector.start[None], connector.project(accumulated_maps(QUANTIZER, rows)[1:])])
    close(found, inputs + connector.places + connector.levels[level])


# training shows what sampling shows


def force(codes: Tensor, session: Session, *, commit: bool = False) -> list[Tensor]:
    """Write a picture whose codes are known; the logits of each scale."""
    sampler = Forced(codes=codes, seen=[])
    written = session.write_picture(DRAW, sampler, (N,), [True] * len(codes), commit=commit)
    assert torch.equal(written, codes)
    return sampler.seen


def test_sampling_feeds_bit_for_bit_what_training_feeds_when_the_true_codes_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [sample_of(number) for number in (0, 1, 4)]
    connector: Any = MODEL.ports["draw"].connector  # type: ignore[union-attr]
    shown: list[Tensor] = []
    forward = connector.forward
    monkeypatch.setattr(connector, "forward", lambda maps, rows: (shown.append(maps), forward(maps, rows))[1])
    MODEL.embed(pack([PLANNER.plan(entry, "draw", None) for entry in entries]))
    trained = shown.pop().view(3, N, 5)
    force(torch.stack([codes_of(entry) for entry in entries]), open_session(contexts()))
    assert [len(maps) for maps in shown] == [3 * side * side for side in SIDES]
    sampled = torch.cat([maps.view(3, -1, 5) for maps in shown], dim=1)
    order = pack([PLANNER.plan(entry, "draw", None) for entry in entries]).ports["draw"].sample[::4]
    assert torch.equal(trained, sampled.index_select(0, order))


def test_cached_passes_scale_by_scale_equal_one_teacher_forced_pass() -> None:
    codes = torch.stack([codes_of(sample_of(number)) for number in (0, 1, 4)])
    session = open_session(contexts())
    logits = torch.cat(force(codes, session, commit=True), dim=1)
    for row, (context, own) in enumerate(zip(contexts(), codes, strict=True)):
        hidden, expected = read_in_full([*context, *PLANNER.block(DRAW, own, (N,))])
        close(logits[row], expected)
        close(session.last[row], hidden[-1])  # of the marker after the picture


def test_text_goes_on_after_a_picture_and_samples_without_one_go_on_as_if_it_never_was() -> None:
    session = open_session(contexts())
    codes = session.write_picture(DRAW, NextScaleSamplerConfig(), (N,), [True, False, True], commit=True)
    ids, _ = session.write_text(COMMENT, AutoregressiveConfig(max_tokens=5), stop=[])
    for row, (context, own) in enumerate(zip(contexts(), ids, strict=True)):
        picture = PLANNER.block(DRAW, codes[row], (N,)) if row != 1 else []
        written = Segment(port="text", payload=torch.tensor(own), grid=(len(own),), expert=PLANNER.expert_of("text"))
        segments = [*context, *picture, written]
        batch = pack([Sequence(key="a", task="t", segments=tuple(segments))])
        close(session.last[row], MODEL.hidden(batch)[0, -1])


def test_codes_of_a_scale_change_what_finer_scales_predict_and_nothing_else() -> None:
    """M9 of the mask, through the whole model: the logits of a scale do not depend on its own codes."""
    entry = sample_of(2)
    codes = codes_of(entry)
    context = PLANNER.prompt(entry, "draw")[0]
    _, before = read_in_full([*context, *PLANNER.block(DRAW, codes, (N,))])
    starts = [0, 1, 5, 14, N]
    for scale in range(4):
        other = codes.clone()
        other[starts[scale]] = (other[starts[scale]] + 1) % 13
        _, after = read_in_full([*context, *PLANNER.block(DRAW, other, (N,))])
        moved = (after - before).abs().amax(dim=1) > 1e-6
        assert not moved[: starts[scale + 1]].any()
        assert moved[starts[scale + 1] :].all()


def test_the_last_scale_of_a_given_picture_is_read_too() -> None:
    entry = sample_of(3)
    other = codes_of(entry)
    other[-1] = (other[-1] + 1) % 13
    hidden = [MODEL.hidden(pack([PLANNER.plan(own, "tell", None)]))[0, -1] for own in (entry, sample_of(3, other))]
    assert float((hidden[0] - hidden[1]).abs().max()) > 1e-5


# drawing


@pytest.mark.parametrize(("schedule", "strengths"), [("constant", (1, 1, 1, 1)), ("linear", (0, 1 / 3, 2 / 3, 1))])
def test_guidance_grows_over_the_scales_as_published(schedule: str, strengths: tuple[float, ...]) -> None:
    """(1 + t) · cond - t · uncond with t = s · k / (K - 1): the argmax of two full passes, s = 1.5."""
    config = NextScaleSamplerConfig(temperature=0.0, guidance_scale=2.5, guidance_schedule=schedule)
    passes = [[PLANNER.prompt(sample_of(n), "draw", drop=drop)[0] for drop in ((), ("caption",))] for n in (0, 1)]
    guide = config.guide({"caption"})
    session = Session(MODEL, PLANNER, [Prompt(key, "draw/0", own) for key, own in zip("xy", passes, strict=True)], guide, 120, 3)
    codes = session.write_picture(DRAW, config, (N,), [True, True], commit=False)
    level = torch.repeat_interleave(torch.tensor(strengths), torch.tensor([1, 4, 9, 16]))[:, None]
    for contexts_of_sample, own in zip(passes, codes, strict=True):
        cond, uncond = (read_in_full([*context, *PLANNER.block(DRAW, own, (N,))])[1] for context in contexts_of_sample)
        t = 1.5 * level
        assert torch.equal(((1 + t) * cond - t * uncond).argmax(dim=1), own)


def test_a_sample_does_not_depend_on_its_batch_and_another_key_gives_another_picture() -> None:
    def draw(keys: str, numbers: Listing[int]) -> Tensor:
        given = contexts(numbers)
        session = open_session(given, keys=list(keys))
        return session.write_picture(DRAW, NextScaleSamplerConfig(), (N,), [True] * len(given), commit=False)

    together = draw("abc", (0, 1, 4))
    assert torch.equal(draw("b", (1,))[0], together[1])
    assert not torch.equal(draw("c", (1,))[0], together[1])
    assert int(together.max()) < 13


def test_top_k_of_one_is_greedy() -> None:
    greedy, narrow = (
        open_session(contexts()).write_picture(DRAW, config, (N,), [True] * 3, commit=False)
        for config in (GREEDY, NextScaleSamplerConfig(top_k=1))
    )
    assert torch.equal(greedy, narrow)


# the recipe


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ('ports.draw.connector={kind="embedding"}', "next-scale reads sums of scales"),
        ('ports.draw.objective={kind="next-token"}', "'next-token' does not go with"),
        ('autoencoders.vq.quantizer={kind="vq", codebook_size=13, codebook_dim=4}', "needs the codes of scales, found 'vq'"),
        ("ports.draw.mask=causal", "sees itself whole"),
        ("ports.draw.vocabulary=all", "no rows to share"),
        ("ports.draw.grid_embedding=sincos-2d", "knows its places already"),
        ("ports.draw.markers.inside=true", "markers stand outside"),
        ('sample.draw={sampler="autoregressive"}', "does not fit the objective 'next-scale'"),
        (
            'tasks.tell.segments=[{port="see", field="image"}, {port="draw", field="image", merge=true}, {port="text", text="{caption}", role="target"}]',
            "blocks of their own",
        ),
    ],
)
def test_what_scales_do_not_go_with_is_said(change: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        hybrid(change)


def test_the_quantizer_is_no_part_of_the_model_and_its_lack_is_said() -> None:
    assert not any("codebook" in name or "phi" in name for name in MODEL.state_dict())
    bare = lively(RECIPE)
    assert bare.state_dict().keys() == MODEL.state_dict().keys()
    with pytest.raises(RecipeError, match=r"not given the quantizer of autoencoders\.vq"):
        bare.embed(pack([PLANNER.plan(sample_of(0), "draw", None)]))


# the whole way


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "world", hybrid(), [sample_of(number) for number in range(8)])


OPTIONS = RunOptions(quiet=True, dtype="fp32", seed=1)


def pictures_of(world: World) -> list[np.ndarray]:
    autoencoder = load_autoencoder(world.tokenizers["autoencoders.vq"])
    with torch.no_grad():
        return [to_pixels(picture) for picture in autoencoder.decode_codes(torch.stack([codes_of(entry) for entry in world.samples]))]


def test_the_hybrid_trains_resumes_to_the_same_bits_and_samples_trained_or_not(world: World, tmp_path: Path) -> None:
    recipe = recipe_from(HYBRID)
    straight = train_unified(recipe, str(world.shards), tmp_path / "straight", OPTIONS)
    broken = tmp_path / "broken"
    train_unified(recipe, str(world.shards), broken, replace(OPTIONS, max_steps=3))
    train_unified(recipe, str(world.shards), broken, OPTIONS)
    assert (broken / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    assert not any("autoencoders" in name for name in read_weights(straight / "model.safetensors"))
    asked = replace(OPTIONS, limit=2)
    drawn = [
        list(open_shards(str(sample(straight, str(world.shards), tmp_path / f"samples-{untrained}", asked, untrained=untrained))))
        for untrained in (False, True)
    ]
    for written in drawn:
        assert [entry.fields["sample.image"].shape for entry in written] == [(16, 16, 3)] * 2
        assert all(isinstance(entry.fields["sample.qa"][0]["answer"], str) for entry in written)


def test_codes_of_another_quantizer_are_refused(world: World, tmp_path: Path) -> None:
    torch.manual_seed(8)
    other = make_world(tmp_path / "other", hybrid("autoencoders.vq.quantizer.phi_ratio=0.25"), [sample_of(0)])
    with pytest.raises(UsageError, match=r"'image\.codes' was written by the tokenizer .* but autoencoders\.vq is"):
        train_unified(recipe_from(HYBRID), str(world.shards), tmp_path / "run", OPTIONS, tokenizers=[other.tokenizers["autoencoders.vq"]])


@pytest.mark.slow
def test_the_hybrid_gives_back_what_it_was_overfitted_to(world: World, tmp_path: Path) -> None:
    """Pictures code by code, captions and answers letter by letter, from one transformer."""
    sets = ["phases.joint.steps=400", "phases.joint.batch_size=16", "phases.joint.lr_schedule=cosine"]
    run = train_unified(recipe_from(HYBRID, sets=sets), str(world.shards), tmp_path / "run", OPTIONS)
    written = list(open_shards(str(sample(run, str(world.shards), tmp_path / "samples", OPTIONS))))
    truth = pictures_of(world)
    assert all(not np.array_equal(a, b) for i, a in enumerate(truth) for b in truth[:i])
    assert all(np.array_equal(entry.fields["sample.image"], own) for entry, own in zip(written, truth, strict=True))
    assert [entry.fields["sample.caption"] for entry in written] == CAPTIONS
    for entry, own in zip(written, world.samples, strict=True):
        assert [record["answer"] for record in entry.fields["sample.qa"]] == [record["answer"] for record in own.fields["qa"]]
