"""Writing with a cache equals reading with a full forward pass; what a sample becomes depends on its key and not on its batch."""

from collections.abc import Sequence as Listing
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor
from worlds import CAPTIONS, lively, mixed_recipe, planner_of, sample_of, text_tokenizer

from stages.data.sample import Sample
from stages.decoding import Prompt, Session
from stages.model import Model
from stages.parts.layers import patchify
from stages.parts.samplers import AutoregressiveConfig, DdimConfig, EulerConfig, Guide, HeunConfig, MaskedConfig, SamplerConfig
from stages.parts.samplers.noise import sample_generator, sample_normals
from stages.recipe import SegmentSpec, load_recipe
from stages.sequence.pack import pack
from stages.sequence.plan import Planner
from stages.sequence.segment import Role, Segment, Sequence

MODEL = lively(mixed_recipe())
IN_ORDER = lively(
    mixed_recipe(
        'ports.codes.objective={kind="next-token"}',
        'ports.codes.mask="causal"',
        'ports.codes.positions="sequential"',
        'sample.codes={sampler="autoregressive"}',
        'tasks.answer.segments=[{port="codes", field="image"}, {port="text", text="{caption}<eot>", role="target"}]',
    )
)
PLANNER = planner_of(MODEL.recipe)
GRID = (2, 3)
TEXT = SegmentSpec(port="text", text="{comment}<eot>", role=Role.TARGET)
CODES = SegmentSpec(port="codes", field="image", role=Role.TARGET)
LATENTS = SegmentSpec(port="latents", field="image", role=Role.TARGET)
ONE_PASS = Guide(kind="nested", drops=(frozenset(),), terms=(), interval=(0.0, 1.0), renorm="none")
SEED = 3


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


def contexts(task: str = "draw", numbers: Listing[int] = (0, 1, 4), drop: Listing[str] = ()) -> list[list[Segment]]:
    """Prompts of three lengths."""
    made = [PLANNER.prompt(sample_of(number), task, drop=drop)[0] for number in numbers]
    assert drop or len({sum(map(len, context)) for context in made}) == len(numbers)
    return made


def open_session(
    passes: list[list[list[Segment]]], guide: Guide = ONE_PASS, model: Model = MODEL, keys: Listing[str] = ("x", "y", "z")
) -> Session:
    """passes[i][p]: the context of sample i in pass p."""
    prompts = [Prompt(key, "draw/0", own) for key, own in zip(keys, passes, strict=False)]
    return Session(model, planner_of(model.recipe), prompts, guide, 120, SEED)


def single(given: list[list[Segment]]) -> list[list[list[Segment]]]:
    return [[context] for context in given]


def hidden_after(segments: Listing[Segment], model: Model = MODEL) -> Tensor:
    """The hidden rows (l, d) of one sample in one full forward pass."""
    return model.hidden(pack([Sequence(key="a", task="t", segments=tuple(segments))]))[0]


def written_text(ids: list[int]) -> Segment:
    return Segment(port="text", payload=torch.tensor(ids), grid=(len(ids),), expert=PLANNER.expert_of("text"))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


# text


def test_text_written_token_by_token_stands_where_a_full_pass_puts_it() -> None:
    given = contexts()
    session = open_session(single(given))
    ids, ended = session.write_text(TEXT, AutoregressiveConfig(max_tokens=8), stop=[])
    assert [len(own) for own in ids] == [8, 8, 8]
    assert ended == [-1, -1, -1]
    for row, (context, own) in enumerate(zip(given, ids, strict=True)):
        close(session.last[row], hidden_after([*context, written_text(own)])[-1])


def test_greedy_text_is_the_argmax_of_full_passes() -> None:
    given = contexts()
    ids, _ = open_session(single(given)).write_text(TEXT, AutoregressiveConfig(temperature=0.0, max_tokens=6), stop=[])
    for context, own in zip(given, ids, strict=True):
        hidden = hidden_after([*context, written_text(own)])[-7:-1]
        assert MODEL.predict("text", hidden).argmax(dim=1).tolist() == own


def test_writing_ends_at_the_stop_token_which_joins_the_context_but_not_the_answer() -> None:
    given = contexts()
    free, _ = open_session(single(given)).write_text(TEXT, AutoregressiveConfig(max_tokens=9), stop=[])
    stop = [free[0][3]]
    session = open_session(single(given))
    ids, ended = session.write_text(TEXT, AutoregressiveConfig(max_tokens=9), stop=stop)
    for own, all_of_it, end in zip(ids, free, ended, strict=True):
        cut = all_of_it.index(stop[0]) if stop[0] in all_of_it else 9
        assert own == all_of_it[:cut]
        assert end == (stop[0] if cut < 9 else -1)
    close(session.last[0], hidden_after([*given[0], written_text([*ids[0], *stop])])[-1])


def test_a_switch_token_ends_the_text_and_leaves_no_trace() -> None:
    given = contexts()
    free, _ = open_session(single(given)).write_text(TEXT, AutoregressiveConfig(max_tokens=9), stop=[])
    session = open_session(single(given))
    ids, ended = session.write_text(TEXT, AutoregressiveConfig(max_tokens=9), stop=[], switch=[free[1][4]])
    cut = free[1].index(free[1][4])
    assert ids[1] == free[1][:cut]
    assert ended[1] == free[1][4]
    close(session.last[1], hidden_after([*given[1], written_text(ids[1])])[-1] if ids[1] else hidden_after(given[1])[-1])


def test_the_stop_token_of_a_segment_is_the_first_of_the_literal_after_its_field() -> None:
    session = open_session(single(contexts()))
    assert session.stop_token(TEXT) == text_tokenizer().special_id("<eot>")
    assert session.stop_token(SegmentSpec(port="text", field="caption")) is None


# pictures over a cached prefix


def block(spec: SegmentSpec, payload: Tensor, model: Model = MODEL) -> list[Segment]:
    return planner_of(model.recipe).block(spec, payload, GRID)


def core_rows(model: Model, segments: Listing[Segment], port: str, values: Tensor, t: float | None = None) -> Tensor:
    """Predictions of one port's rows in a full forward pass that shows them `values` at noise level t."""
    batch = pack([Sequence(key="a", task="t", segments=tuple(segments))])
    rows = batch.ports[port]
    timestep = None if t is None else torch.full((len(values),), t)
    shown = replace(batch, ports={**batch.ports, port: replace(rows, values=values, timestep=timestep)})
    return model.predict(port, model.hidden(shown)[0].index_select(0, rows.rows), rows=shown.ports[port])


def test_a_round_of_masked_decoding_predicts_what_a_full_pass_predicts() -> None:
    """One greedy round from all hidden: the codes are the argmax of the full pass."""
    given = contexts()
    codes = open_session(single(given)).write_picture(CODES, MaskedConfig(num_steps=1, temperature=0.0), GRID, [True] * 3, commit=False)
    assert codes.shape == (3, *GRID)
    mask_id = MODEL.slices["codes"].size
    for context, own in zip(given, codes, strict=True):
        hidden = torch.full((6,), mask_id)
        predicted = core_rows(MODEL, [*context, *block(CODES, torch.zeros(6, dtype=torch.int64))], "codes", hidden)
        assert torch.equal(predicted.argmax(dim=1), own.flatten())


def guided_contexts(drop: Listing[str] = ("caption",)) -> list[list[list[Segment]]]:
    return [list(passes) for passes in zip(contexts(), contexts(drop=drop), strict=True)]


@pytest.mark.parametrize("scale", [2.5, 0.0])
def test_guidance_combines_two_full_passes(scale: float) -> None:
    config = MaskedConfig(num_steps=1, temperature=0.0, guidance_scale=scale)
    passes = guided_contexts()
    codes = open_session(passes, config.guide({"caption"})).write_picture(CODES, config, GRID, [True] * 3, commit=False)
    hidden = torch.full((6,), MODEL.slices["codes"].size)
    for (cond, uncond), own in zip(passes, codes, strict=True):
        picture = block(CODES, torch.zeros(6, dtype=torch.int64))
        with_text, without = (core_rows(MODEL, [*context, *picture], "codes", hidden) for context in (cond, uncond))
        assert torch.equal((without + scale * (with_text - without)).argmax(dim=1), own.flatten())


def test_guidance_scale_one_runs_one_pass_and_is_the_condition() -> None:
    off, on = MaskedConfig(num_steps=3), MaskedConfig(num_steps=3, guidance_scale=1.0)
    assert len(on.guide({"caption"}).drops) == 1
    session = open_session([[own[0]] for own in guided_contexts()], on.guide({"caption"}))
    assert session.passes == 1
    expected = open_session(single(contexts())).write_picture(CODES, off, GRID, [True] * 3, commit=False)
    assert torch.equal(session.write_picture(CODES, on, GRID, [True] * 3, commit=False), expected)


def starting_noise(key: str, written: int = 1) -> Tensor:
    return sample_normals([sample_generator(SEED, key, "draw/0", written)], (6, 5))[0]


def test_a_denoising_step_over_the_cached_prefix_is_a_full_pass() -> None:
    """One Euler step from pure noise on the line: clean = noise - velocity(noise, t = 1)."""
    given = contexts("paint")
    latents = open_session(single(given)).write_picture(LATENTS, EulerConfig(num_steps=1), GRID, [True] * 3, commit=False)
    assert latents.shape == (3, 5, *GRID)
    for context, own, key in zip(given, latents, "xyz", strict=True):
        noise = starting_noise(key)
        velocity = core_rows(MODEL, [*context, *block(LATENTS, torch.zeros(6, 5))], "latents", noise, 1.0)
        close(patchify(own, 1), noise - velocity)


def test_several_denoising_steps_with_guidance_repeat_two_full_passes() -> None:
    config = EulerConfig(num_steps=3, guidance_scale=1.7)
    passes = [list(own) for own in zip(contexts("paint"), contexts("paint", drop=["caption"]), strict=True)]
    latents = open_session(passes, config.guide({"caption"})).write_picture(LATENTS, config, GRID, [True] * 3, commit=False)
    for (cond, uncond), own, key in zip(passes, latents, "xyz", strict=True):
        x = starting_noise(key)
        for t in (1.0, 2 / 3, 1 / 3):
            picture = block(LATENTS, torch.zeros(6, 5))
            with_text, without = (core_rows(MODEL, [*context, *picture], "latents", x, t) for context in (cond, uncond))
            x = x - (without + 1.7 * (with_text - without)) / 3
        torch.testing.assert_close(patchify(own, 1), x, atol=1e-4, rtol=1e-3)


def test_codes_in_order_are_the_argmax_of_full_passes_over_the_ports_own_ids() -> None:
    given = contexts()
    session = open_session(single(given), model=IN_ORDER)
    codes = session.write_picture(CODES, AutoregressiveConfig(temperature=0.0), GRID, [True] * 3, commit=True)
    assert int(codes.max()) < 11
    for row, (context, own) in enumerate(zip(given, codes, strict=True)):
        picture = block(CODES, own.flatten(), IN_ORDER)
        hidden = hidden_after([*context, *picture], IN_ORDER)
        before = sum(map(len, context))  # the row of <soi> predicts the first code
        assert torch.equal(IN_ORDER.predict("codes", hidden[before : before + 6]).argmax(dim=1), own.flatten())
        close(session.last[row], hidden[-1])


@pytest.mark.parametrize("config", [MaskedConfig(num_steps=4, choice_temperature=3.0), AutoregressiveConfig(temperature=5.0)])
def test_sampled_codes_come_from_the_ports_own_ids(config: SamplerConfig) -> None:
    model = MODEL if isinstance(config, MaskedConfig) else IN_ORDER
    codes = open_session(single(contexts()), model=model).write_picture(CODES, config, GRID, [True] * 3, commit=False)
    assert 0 <= int(codes.min()) <= int(codes.max()) < model.recipe.autoencoders["vq"].codebook_size  # type: ignore[operator]
    assert len(codes.unique()) > 3


BY_ROWS = lively(
    mixed_recipe(
        'ports.codes={content="codes", autoencoder="vq", vocabulary="all", expert="pictures", objective={kind="next-token"}, '
        'mask="causal", positions="sequential", grid_embedding="none", markers={before="<soi>", row="<sot>", after="<eoi>"}}',
        'sample.codes={sampler="autoregressive"}',
        'tasks.answer.segments=[{port="codes", field="image"}, {port="text", text="{caption}<eot>", role="target"}]',
    )
)


@pytest.mark.parametrize("active", [[True] * 3, [True, False, True]])
def test_codes_written_row_by_row_are_the_argmax_of_full_passes(active: list[bool]) -> None:
    """The markers between the rows are given; what is read of them when the next row begins is what training reads."""
    given = contexts()
    session = open_session(single(given), model=BY_ROWS)
    codes = session.write_picture(CODES, AutoregressiveConfig(temperature=0.0), GRID, active, commit=True)
    for row, (context, own, on) in enumerate(zip(given, codes, active, strict=True)):
        picture = block(CODES, own.flatten(), BY_ROWS) if on else []
        hidden = hidden_after([*context, *picture], BY_ROWS)
        close(session.last[row], hidden[-1])
        if on:
            first = sum(map(len, context))  # <soi>; the rows begin one and five tokens later
            read = [first, first + 1, first + 2, first + 4, first + 5, first + 6]
            assert torch.equal(BY_ROWS.predict("codes", hidden[read]).argmax(dim=1), own.flatten())


# going on after a picture


@pytest.mark.parametrize(
    ("spec", "config", "task"),
    [(CODES, MaskedConfig(num_steps=3), "draw"), (LATENTS, EulerConfig(num_steps=2), "paint")],
    ids=["codes", "latents"],
)
def test_text_after_a_picture_reads_the_clean_picture(spec: SegmentSpec, config: SamplerConfig, task: str) -> None:
    """The finished block is committed by a pass of its own, at noise level 0, with its markers; text then goes on as in a full pass."""
    given = contexts(task)
    session = open_session(single(given))
    content = session.write_picture(spec, config, GRID, [True] * 3, commit=True)
    ids, _ = session.write_text(TEXT, AutoregressiveConfig(max_tokens=5), stop=[])
    for row, (context, own) in enumerate(zip(given, ids, strict=True)):
        payload = content[row].flatten() if spec is CODES else patchify(content[row], 1)
        close(session.last[row], hidden_after([*context, *block(spec, payload), written_text(own)])[-1])


def test_what_is_not_committed_is_not_there() -> None:
    session = open_session(single(contexts()))
    before, columns = session.last.clone(), session.cache.length
    session.write_picture(CODES, MaskedConfig(num_steps=2), GRID, [True] * 3, commit=False)
    assert torch.equal(session.last, before)
    assert session.cache.length == columns


def test_samples_that_take_no_part_in_a_picture_go_on_as_if_it_never_was() -> None:
    given = contexts()
    session = open_session(single(given))
    content = session.write_picture(CODES, MaskedConfig(num_steps=2), GRID, [True, False, True], commit=True)
    ids, _ = session.write_text(TEXT, AutoregressiveConfig(max_tokens=4), stop=[])
    drawn = block(CODES, content[0].flatten())
    close(session.last[0], hidden_after([*given[0], *drawn, written_text(ids[0])])[-1])
    close(session.last[1], hidden_after([*given[1], written_text(ids[1])])[-1])


def test_a_pass_without_the_condition_does_not_read_what_is_written_of_it() -> None:
    """A caption written by the model belongs to its drop group: the unconditional rows stay where they were."""
    caption = SegmentSpec(port="text", field="caption", role=Role.TARGET, cond_dropout_prob=0.1)
    guide = EulerConfig(guidance_scale=2.0).guide({"caption"})
    start = [PLANNER.given(SegmentSpec(port="text", text="<bos>"), {}, sample_of(0))] * 3
    session = open_session([[own, own] for own in start], guide)
    before = session.last.clone()
    ids, _ = session.write_text(caption, AutoregressiveConfig(max_tokens=4), stop=[], guide=False)
    assert torch.equal(session.last[3:], before[3:])
    for row in range(3):
        close(session.last[row], hidden_after([*start[row], written_text(ids[row])])[-1])


# seeds: a sample is a function of (seed, key, stream)


def write_everything(keys: Listing[str], numbers: Listing[int], max_tokens: int = 7) -> list[tuple[list[int], Tensor, Tensor]]:
    given = [PLANNER.prompt(sample_of(number), "draw")[0] for number in numbers]
    session = open_session(single(given), keys=keys)
    stop = [text_tokenizer().encode(letter)[0] for letter in "aeiou \u0120"]
    ids, _ = session.write_text(TEXT, AutoregressiveConfig(max_tokens=max_tokens), stop=stop)
    codes = session.write_picture(CODES, MaskedConfig(num_steps=3), GRID, [True] * len(keys), commit=True)
    latents = session.write_picture(LATENTS, HeunConfig(num_steps=2), GRID, [True] * len(keys), commit=False)
    return [(ids[row], codes[row], latents[row]) for row in range(len(keys))]


def test_a_sample_does_not_depend_on_its_batch() -> None:
    """Alone or among strangers whose texts end sooner or later: the same text and codes, and the same latents but for rounding."""
    together = write_everything(["a", "b", "c", "d"], [0, 1, 4, 6], max_tokens=90)
    assert len({len(ids) for ids, _, _ in together}) > 1
    for place, (key, number) in enumerate(zip("abcd", [0, 1, 4, 6], strict=True)):
        ids, codes, latents = write_everything([key], [number], max_tokens=90)[0]
        assert ids == together[place][0]
        assert torch.equal(codes, together[place][1])
        torch.testing.assert_close(latents, together[place][2], atol=1e-4, rtol=1e-3)


def test_another_key_gives_another_sample_of_the_same_prompt() -> None:
    (_, codes, latents), (_, other_codes, other_latents) = write_everything(["a", "b"], [1, 1])
    assert not torch.equal(codes, other_codes)
    assert float((latents - other_latents).abs().max()) > 0.1


def test_ancestral_noise_belongs_to_the_sample_too() -> None:
    config = DdimConfig(num_steps=3, eta=1.0)
    both = open_session(single(contexts("paint", (0, 1))), keys="ab").write_picture(LATENTS, config, GRID, [True] * 2, commit=False)
    alone = open_session(single(contexts("paint", (1,))), keys="b").write_picture(LATENTS, config, GRID, [True], commit=False)
    torch.testing.assert_close(both[1], alone[0], atol=1e-4, rtol=1e-3)


def test_the_captions_used_here_differ_in_length() -> None:
    """What makes every test above a test of ragged prompts."""
    assert len({len(text_tokenizer().encode(caption)) for caption in (CAPTIONS[0], CAPTIONS[1], CAPTIONS[4])}) == 3


# the noise level as a row of its own, and pictures that are read again


def timed_model(name: str) -> Model:
    """A shipped recipe whose pictures begin with the time, at the sizes of these tests."""
    return lively(load_recipe(name, size="tiny", sets=[f"tokenizers.bpe.vocab_size={text_tokenizer().vocab_size}"]))


@pytest.mark.parametrize("name", ["show-o2", "janusflow"])
def test_steps_over_the_cache_run_the_row_of_the_time_too_and_repeat_full_passes(name: str) -> None:
    """Two guided Euler steps, in a full block and in a causal one, beside full passes over prompt, time and picture."""
    model = timed_model(name)
    planner = planner_of(model.recipe)
    port = next(port for port, entry in model.recipe.ports.items() if entry.timestep == "token")
    spec = SegmentSpec(port=port, field="image", role=Role.TARGET)
    config = EulerConfig(num_steps=2, guidance_scale=1.7)
    passes = [[planner.prompt(sample_of(n), "draw", drop=drop)[0] for drop in ((), ("caption",))] for n in (0, 1, 4)]
    drawn = open_session(passes, config.guide({"caption"}), model).write_picture(spec, config, GRID, [True] * 3, commit=False)
    channels = model.content_dim(model.recipe.ports[port])
    for (cond, uncond), own, key in zip(passes, drawn, "xyz", strict=True):
        x = sample_normals([sample_generator(SEED, key, "draw/0", 1)], (6, channels))[0]
        for t in (1.0, 0.5):
            picture = block(spec, torch.zeros(6, channels), model)
            with_text, without = (core_rows(model, [*context, *picture], port, x, t) for context in (cond, uncond))
            x = x - (without + 1.7 * (with_text - without)) / 2
        torch.testing.assert_close(patchify(own, model.recipe.ports[port].patch_size), x, atol=1e-4, rtol=1e-3)


def test_text_after_a_timed_picture_reads_it_clean_at_level_zero() -> None:
    model = timed_model("show-o2")
    planner = planner_of(model.recipe)
    spec = SegmentSpec(port="image", field="image", role=Role.TARGET)
    given = [planner.prompt(sample_of(number), "draw")[0] for number in (0, 1, 4)]
    session = open_session(single(given), model=model)
    drawn = session.write_picture(spec, EulerConfig(num_steps=2), GRID, [True] * 3, commit=True)
    for row, (context, own) in enumerate(zip(given, drawn, strict=True)):
        full = hidden_after([*context, *block(spec, patchify(own, 2), model)], model)
        close(session.last[row], full[-1])


def test_a_picture_is_drawn_read_in_both_forms_and_edited_as_in_training() -> None:
    """BAGEL's story: the second picture's first step, in all passes of nested guidance, beside full passes over what training plans."""
    recipe = load_recipe("bagel", size="tiny", sets=[f"tokenizers.bpe.vocab_size={text_tokenizer().vocab_size}"])
    model = lively(recipe)
    planner = Planner(recipe, {"bpe": text_tokenizer()}, dict(model.encoders.items()))
    entry = sample_of(2, instruction="make it green")
    config = recipe.sample["draw"].model_copy(update={"num_steps": 1})
    assert isinstance(config, EulerConfig)
    guide = config.guide({"text", "latents", "features"})
    assert len(guide.drops) == 3
    contexts_, rest = zip(*(planner.prompt(entry, "story", drop=drop) for drop in guide.drops), strict=True)
    assert [spec.field or spec.text for spec in rest[0]] == ["source", "source", "source", "<bos>{instruction}<eos>", "result"]
    session = Session(model, planner, [Prompt("x", "draw/0", list(contexts_))], guide, 120, SEED)
    session.guide = guide.after({"text"})
    source = session.write_picture(rest[0][0], config, GRID, [True], commit=True)[0]
    values = {**entry.fields, "source.latents": source.numpy(), "source": np.full((16, 24, 3), 77, np.uint8)}
    for spec in rest[0][1:4]:
        session.write([planner.given(spec, values, entry, drop=drop) for drop in guide.drops])
    session.guide = guide
    result = session.write_picture(rest[0][4], config, GRID, [True], commit=False)[0]

    noise = sample_normals([sample_generator(SEED, "x", "draw/0", 2)], (6, 16))[0]
    whole = Sample("x", {**values, "result.latents": np.zeros((4, 4, 6), np.float32)})
    velocities = []
    for drop in guide.drops:
        segments = planned_without(planner, whole, drop)
        batch = pack([Sequence(key="x", task="story", segments=tuple(segments))])
        rows = batch.ports["draw"]
        last = rows.segment == len(rows.grids) - 1
        shown = replace(rows, values=torch.where(last[:, None], torch.cat([torch.zeros(len(last) - 6, 16), noise]), rows.values))
        shown = replace(shown, timestep=last.float())
        hidden = model.hidden(replace(batch, ports={**batch.ports, "draw": shown}))[0]
        velocities.append(model.predict("draw", hidden.index_select(0, rows.rows))[last])
    close(patchify(result, 2), noise - guide.combine([velocity[None] for velocity in velocities])[0])


def planned_without(planner: Planner, sample: Sample, drop: frozenset[str]) -> list[Segment]:
    """The story as training plans it when chance drops just these groups."""

    class Chance(Random):
        def random(self) -> float:
            return 0.0 if next(groups) in drop else 1.0

    groups = iter(sorted({spec.group for spec in planner.recipe.tasks["story"].flat() if spec.cond_dropout_prob}))
    return list(planner.plan(sample, "story", Chance()).segments)
