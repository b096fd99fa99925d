"""Plans: which segments a sample becomes, what its data cannot do, and what is left when a condition is dropped."""

from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from worlds import CAPTIONS, MIXED, mixed_recipe, planner_of, recipe_from, sample_of, text_tokenizer

from stages.data.sample import Sample
from stages.errors import DataError
from stages.recipe import Recipe, SegmentSpec
from stages.sequence.masks import may_attend
from stages.sequence.pack import lay_out
from stages.sequence.plan import MissingField, Planner
from stages.sequence.segment import MaskKind, PositionKind, Role, Segment, Sequence

TOKENIZER = text_tokenizer()
BASE = mixed_recipe()


def recipe_with(segments: str, *sets: str, task: str = "try") -> Recipe:
    """MIXED with one more task."""
    return recipe_from(MIXED, sets=[f"tokenizers.bpe.vocab_size={TOKENIZER.vocab_size}", f"tasks.{task}.segments={segments}", *sets])


def plan(recipe: Recipe, task: str = "try", sample: Sample | None = None, seed: int = 0) -> Sequence:
    return planner_of(recipe).plan(sample or sample_of(1), task, Random(seed))


def told(segments: Any) -> list[str]:
    """Each segment in one word: its text with special tokens, or `port h×w`."""
    words = []
    for segment in segments:
        if segment.port == "text":
            words.append(TOKENIZER.decode(segment.payload.tolist(), special=True))
        else:
            words.append(f"{segment.port} {'×'.join(map(str, segment.grid))}")
    return words


# templates


def test_a_template_is_its_literals_and_its_fields_in_order() -> None:
    sequence = plan(BASE, "draw")
    assert told(sequence.segments) == [f"<t2i><sot>{CAPTIONS[1]}<eot>", "<soi>", "codes 2×3", "<eoi>"]
    assert sequence.key == "0001"
    assert sequence.task == "draw"


def test_each_piece_of_a_template_is_tokenized_on_its_own() -> None:
    """So that no merge crosses the border between given and predicted tokens."""
    sequence = plan(recipe_with('[{port="text", text="a red{caption}<eot>"}]'), sample=sample_of(0, caption="dish"))
    expected = [*TOKENIZER.encode("a red"), *TOKENIZER.encode("dish"), TOKENIZER.special_id("<eot>")]
    assert sequence.segments[0].payload.tolist() == expected


@pytest.mark.parametrize("injected", ["<eot>", "a<eot><soi>", "<t2i> {caption} <eoi>"])
def test_data_cannot_inject_special_tokens_or_placeholders(injected: str) -> None:
    payload = plan(BASE, "draw", sample_of(1, caption=injected)).segments[0].payload.tolist()
    special = [TOKENIZER.special_id(name) for name in TOKENIZER.special]
    assert [token for token in payload if token in special] == [TOKENIZER.special_id(name) for name in ("<t2i>", "<sot>", "<eot>")]
    assert TOKENIZER.decode(payload[2:-1]) == injected


def test_codes_and_latents_keep_their_grid_and_raster_order() -> None:
    sample = sample_of(3, grid=(2, 4))
    codes = next(s for s in plan(BASE, "draw", sample).segments if s.port == "codes")
    assert codes.grid == (2, 4)
    assert codes.payload.tolist() == sample.fields["image.codes"].flatten().tolist()
    latents = next(s for s in plan(BASE, "paint", sample).segments if s.port == "latents")
    assert latents.grid == (2, 4)
    np.testing.assert_array_equal(latents.payload.numpy(), sample.fields["image.latents"].reshape(5, 8).T)


def test_latents_are_cut_into_patches_and_the_grid_counts_patches() -> None:
    recipe = recipe_from(MIXED, sets=[f"tokenizers.bpe.vocab_size={TOKENIZER.vocab_size}", "ports.latents.patch_size=2"])
    latents = next(s for s in plan(recipe, "paint", sample_of(3, grid=(2, 6))).segments if s.port == "latents")
    assert latents.grid == (1, 3)
    assert latents.payload.shape == (3, 20)


def test_a_segment_takes_mask_positions_expert_and_role_from_its_port_unless_it_says_otherwise() -> None:
    recipe = recipe_with('[{port="text", text="<sot>"}, {port="codes", field="image", role="target", mask="isolated", weight=0.5}]')
    words, _, codes, _ = plan(recipe).segments
    assert (words.mask, words.positions, words.expert, words.role) == (MaskKind.CAUSAL, PositionKind.SEQUENTIAL, 0, Role.CONTEXT)
    assert (codes.mask, codes.positions, codes.expert, codes.role) == (MaskKind.ISOLATED, PositionKind.GRID, 1, Role.TARGET)
    assert codes.weight == 0.5
    assert codes.field == "image"


# markers


def test_markers_inside_belong_to_the_pictures_block_and_carry_no_loss_unless_supervised() -> None:
    words, before, codes, after = plan(BASE, "draw").segments
    assert [s.port for s in (before, codes, after)] == ["text", "codes", "text"]
    assert [s.mask for s in (before, codes, after)] == [MaskKind.FULL] * 3
    assert [s.merge for s in (before, codes, after)] == [False, True, True]
    assert [s.role for s in (before, codes, after)] == [Role.CONTEXT, Role.TARGET, Role.CONTEXT]
    assert before.expert == words.expert == 0
    assert codes.expert == 1


def test_markers_outside_are_causal_text_and_predicted_where_supervised() -> None:
    before, latents, after = plan(BASE, "paint").segments[2:5]
    assert [s.mask for s in (before, latents, after)] == [MaskKind.CAUSAL, MaskKind.FULL, MaskKind.CAUSAL]
    assert [s.merge for s in (before, latents, after)] == [False, False, False]
    assert [s.role for s in (before, after)] == [Role.TARGET, Role.TARGET]
    context = plan(recipe_with('[{port="latents", field="image"}, {port="text", text="{caption}", role="target"}]')).segments
    assert [s.role for s in context[:3]] == [Role.CONTEXT] * 3  # a picture that is given is not announced


def test_a_merged_picture_merges_its_first_marker_into_the_block_before() -> None:
    segments = plan(BASE, "answer").segments
    assert told(segments)[:4] == ["<mmu>", "<soi>", "codes 2×3", "<eoi>"]
    assert [s.merge for s in segments[:5]] == [False, True, True, True, False]
    assert lay_out(segments).block_id[0, :9].tolist() == [0] * 9


# list fields


ROWS = (
    'ports.codes={content="codes", autoencoder="vq", vocabulary="all", expert="pictures", objective={kind="next-token"}, mask="causal", '
    'positions="sequential", grid_embedding="none", markers={before="<soi>", row="<sot>", after="<eoi>", supervised=true}}',
    'sample.codes={sampler="autoregressive"}',
    'tasks.answer.segments=[{port="codes", field="image"}, {port="text", text="{caption}<eot>", role="target"}]',
)


def test_each_row_of_a_picture_may_end_with_a_marker() -> None:
    """Emu3: the rows' own codes in raster order, one attention block, and the markers judged like words."""
    sequence = plan(recipe_with('[{port="text", text="<t2i>"}, {port="codes", field="image", role="target"}]', *ROWS))
    assert told(sequence.segments) == ["<t2i>", "<soi>", "codes 3", "<sot>", "codes 3", "<sot>", "<eoi>"]
    codes = torch.cat([segment.payload for segment in sequence.segments if segment.port == "codes"])
    assert codes.tolist() == sample_of(1).fields["image.codes"].flatten().tolist()
    assert all(segment.role == Role.TARGET for segment in sequence.segments[1:])
    layout = lay_out(sequence.segments)
    assert layout.block_id[0].tolist() == [0] + [1] * 10
    assert layout.positions[0, :, 0].tolist() == list(range(11))


def test_a_list_of_texts_gives_one_entry_an_epoch_each_in_turn() -> None:
    recipe = recipe_with('[{port="text", text="<sot>"}, {port="text", field="captions", role="target"}]')
    planner = planner_of(recipe)
    sample = sample_of(1, captions=["one", "two", "three"])
    seen = []
    for epoch in range(6):
        planner.at_epoch(epoch)
        seen += told(planner.plan(sample, "try", Random(epoch)).segments[1:])
    assert sorted(seen[:3]) == ["one", "three", "two"]
    assert seen[3:] == seen[:3]
    planner.at_epoch(0)
    starts = {told(planner.plan(sample_of(n, captions=["one", "two", "three"]), "try", Random(0)).segments)[1] for n in range(20)}
    assert starts == {"one", "two", "three"}  # samples do not all begin with the first


def test_each_repeats_its_segments_over_all_records_in_an_order_of_its_own() -> None:
    orders = {tuple(told(plan(BASE, "answer", sample_of(2), seed).segments)[4:]) for seed in range(12)}
    first = ("<sot>how many?", "2<eot>")
    second = ("<sot>of what?", f"{CAPTIONS[2][2:9]}<eot>")
    assert orders == {(*first, *second), (*second, *first)}


def test_each_with_a_limit_draws_that_many_records_anew_each_time() -> None:
    segments = (
        '[{each="qa", limit=1, segments=[{port="text", text="<sot>{question}"}, {port="text", text="{answer}<eot>", role="target"}]}]'
    )
    recipe = recipe_with(segments)
    drawn = [told(plan(recipe, sample=sample_of(2), seed=seed).segments) for seed in range(12)]
    assert {len(words) for words in drawn} == {2}
    assert {words[0] for words in drawn} == {"<sot>how many?", "<sot>of what?"}


# what is missing


@pytest.mark.parametrize(
    ("task", "fields", "message", "hint"),
    [
        ("draw", {"image.codes": np.zeros((2, 3), np.int32)}, "'caption' is missing", "this sample has: image.codes"),
        (
            "draw",
            {"caption": "a", "image": np.zeros((8, 8, 3), np.uint8)},
            "'image.codes' is missing",
            "`mmgen tokenize` writes 'image.codes' from 'image'",
        ),
        ("draw", {"caption": 7, "image.codes": np.zeros((2, 3), np.int32)}, "'caption' holds int, expected text", ""),
        ("draw", {"caption": [], "image.codes": np.zeros((2, 3), np.int32)}, "the list 'caption' is empty", ""),
        ("answer", {"qa": "why?", "image.codes": np.zeros((2, 3), np.int32)}, "repeats over 'qa', which is not a list", ""),
    ],
)
def test_a_sample_without_a_needed_field_says_which_and_whose(task: str, fields: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(MissingField, match=message) as caught:
        planner_of(BASE).plan(Sample("k7", fields, "shards/a.tar"), task, Random(0))
    assert caught.value.message.startswith("shards/a.tar: ")
    assert caught.value.hint == hint
    assert caught.value.exit_code == 3


def test_optional_segments_are_left_out_where_their_field_is_missing() -> None:
    assert told(plan(BASE, "paint").segments)[-1] == "<eoi>"
    assert told(plan(BASE, "paint", sample_of(1, comment="nice")).segments)[-1] == "nice<eot>"


def test_which_tasks_fit_is_known_from_the_fields_alone() -> None:
    planner = planner_of(BASE)
    assert planner.can_plan("draw", {"caption", "image.codes"})
    assert not planner.can_plan("draw", {"caption", "image"})
    assert planner.can_plan("answer", {"qa", "image.codes"})
    assert planner.can_plan("paint", {"caption", "image.latents"})  # `comment` is optional
    needed = planner.fields_needed(["answer", "paint"])
    assert needed - {"caption.ids", "comment.ids"} == {"qa", "image.codes", "image.latents", "caption", "comment"}


def test_ids_that_came_with_the_shards_are_read_only_when_this_tokenizer_wrote_them() -> None:
    sample = sample_of(1, **{"caption.ids": np.array([40, 41, 42])})
    planner = planner_of(BASE)
    planner.trust_ids({"caption.ids": "f" * 64, "image.codes": TOKENIZER.fingerprint})
    assert told(planner.plan(sample, "draw", Random(0)).segments)[0] == f"<t2i><sot>{CAPTIONS[1]}<eot>"
    planner.trust_ids({"caption.ids": TOKENIZER.fingerprint})
    assert planner.plan(sample, "draw", Random(0)).segments[0].payload.tolist()[2:-1] == [40, 41, 42]


@pytest.mark.parametrize("ids", [[40, TOKENIZER.special_id("<soi>")], [40, 10**6], [-1, 40], [TOKENIZER.special_id("<eos>")]])
def test_ids_that_no_text_has_are_not_believed_whoever_is_said_to_have_written_them(ids: list[int]) -> None:
    sample = sample_of(1, **{"caption.ids": np.array(ids)})
    planner = planner_of(BASE)
    planner.trust_ids({"caption.ids": TOKENIZER.fingerprint})
    assert told(planner.plan(sample, "draw", Random(0)).segments)[0] == f"<t2i><sot>{CAPTIONS[1]}<eot>"
    del sample.fields["caption"]
    with pytest.raises(DataError, match=r"'caption\.ids' holds ids of special tokens or outside the vocabulary"):
        planner.plan(sample, "draw", Random(0))


# dropped conditions


DROP = "cond_dropout_prob=1.0"
TWO = '[{port="text", text="<sot>"}, {port="codes", field="image", %s}, {port="text", text="{caption}<eot>", role="target"}]'


def test_removed_conditions_leave_no_trace_in_the_sequence() -> None:
    dropped, whole = plan(recipe_with(TWO % DROP)), plan(recipe_with(TWO % "cond_dropout_prob=0.0"))
    assert told(dropped.segments) == ["<sot>", f"{CAPTIONS[1]}<eot>"]
    assert told(whole.segments) == ["<sot>", "<soi>", "codes 2×3", "<eoi>", f"{CAPTIONS[1]}<eot>"]
    assert lay_out(dropped.segments).positions[0, 1, 0] == 1  # and the clock does not know of them


def test_held_conditions_leave_their_time_behind() -> None:
    """BAGEL: when a picture is dropped, the text after it stands where it would have stood."""
    dropped = plan(recipe_with(TWO % DROP, 'ports.codes.null_condition="hold"'))
    whole = plan(recipe_with(TWO % "cond_dropout_prob=0.0", 'ports.codes.null_condition="hold"'))
    assert told(dropped.segments) == ["<sot>", f"{CAPTIONS[1]}<eot>"]
    n = len(whole.segments[-1])
    assert torch.equal(lay_out(dropped.segments).positions[0, -n:], lay_out(whole.segments).positions[0, -n:])


def test_emptied_conditions_keep_their_template_without_the_field() -> None:
    recipe = recipe_with(
        f'[{{port="text", text="<t2i><sot>{{caption}}<eot>", {DROP}}}, {{port="codes", field="image", role="target"}}]',
        'ports.text.null_condition="empty"',
    )
    assert told(plan(recipe).segments)[0] == "<t2i><sot><eot>"


def test_padded_conditions_say_nothing_in_as_many_tokens() -> None:
    """Janus: the unconditional rows of guidance see <pad> where the caption stood, and the picture stays at its place."""
    draw = '[{port="text", text="<t2i>"}, {port="text", text="{caption}<eot>", %s}, {port="codes", field="image", role="target"}]'
    sets = (
        'ports.text.null_condition="pad"',
        'tasks.paint.segments=[{port="text", text="<bos>"}, {port="latents", field="image", role="target"}]',
    )
    kept, padded = (plan(recipe_with(draw % keys, *sets)) for keys in ("cond_dropout_prob=0.0", DROP))
    n = len(kept.segments[1])
    assert told(padded.segments) == ["<t2i>", "<pad>" * n, *told(kept.segments)[2:]]
    assert torch.equal(lay_out(padded.segments).positions, lay_out(kept.segments).positions)


def test_conditions_are_dropped_about_as_often_as_the_recipe_says_and_by_group() -> None:
    pair = '[{port="text", text="{caption}", cond_dropout_prob=0.3, drop_group="words"}, {port="text", text="<sot>{caption}", cond_dropout_prob=0.3, drop_group="words"}, {port="codes", field="image", role="target"}]'
    recipe = recipe_with(pair)
    counts = [len(plan(recipe, seed=seed).segments) for seed in range(400)]
    assert set(counts) == {3, 5}  # both or neither
    assert counts.count(3) / 400 == pytest.approx(0.3, abs=0.07)


def test_the_same_random_numbers_make_the_same_plan() -> None:
    planner, sample = planner_of(BASE), sample_of(2)
    first, again = (planner.plan(sample, "answer", Random(5)) for _ in range(2))
    assert told(first.segments) == told(again.segments)


# prompts: what stands before the first thing the model writes


def rest_of(task: str, sample: Sample, planner: Planner | None = None, **keys: Any) -> tuple[list[str], list[str]]:
    segments, rest = (planner or planner_of(BASE)).prompt(sample, task, **keys)
    return told(segments), [spec.field or spec.text for spec in rest]


def test_a_prompt_is_the_plan_without_its_last_target() -> None:
    assert rest_of("draw", sample_of(1)) == ([f"<t2i><sot>{CAPTIONS[1]}<eot>"], ["image"])
    segments = planner_of(BASE).prompt(sample_of(1), "draw")[0]
    assert torch.equal(segments[0].payload, plan(BASE, "draw").segments[0].payload)


def test_a_target_that_is_there_is_given_and_one_that_is_not_is_written() -> None:
    given = sample_of(1, comment="nice")
    assert rest_of("paint", given)[1] == ["{comment}<eot>"]
    bare = Sample("k", {"image.latents": given.fields["image.latents"]})
    assert rest_of("paint", bare) == (["<bos>"], ["{caption}", "image"])


def test_a_prompt_of_one_record_holds_that_question_and_asks_for_its_answer() -> None:
    words, rest = rest_of("answer", sample_of(2), record=1)
    assert words[-1] == "<sot>of what?"
    assert rest == ["{answer}<eot>"]


def test_the_unconditional_prompt_is_planned_by_the_same_path_as_training() -> None:
    """`drop` leaves out what training leaves out, so both branches of guidance are known to the model."""
    planner = planner_of(BASE)
    dropped = planner.prompt(sample_of(1), "draw", drop=["caption"])[0]
    trained = plan(
        recipe_from(
            MIXED.replace("cond_dropout_prob = 0.1", "cond_dropout_prob = 1.0"), sets=[f"tokenizers.bpe.vocab_size={TOKENIZER.vocab_size}"]
        ),
        "draw",
    )
    assert [*told(dropped), "<soi>", "codes 2×3", "<eoi>"] == told(trained.segments)


def test_a_held_condition_right_before_what_is_written_holds_its_time_there_too() -> None:
    held = MIXED.replace('objective = { kind = "next-token" }', 'objective = { kind = "next-token" }\nnull_condition = "hold"', 1)
    sets = [f"tokenizers.bpe.vocab_size={TOKENIZER.vocab_size}"]
    trained = plan(recipe_from(held.replace("cond_dropout_prob = 0.1", "cond_dropout_prob = 1.0"), sets=sets), "draw")
    planner = planner_of(recipe_from(held, sets=sets))
    prompt, rest = planner.prompt(sample_of(1), "draw", drop=["caption"])
    asked = [*prompt, *planner.block(rest[0], torch.zeros(6, dtype=torch.int64), (2, 3))]
    here, there = lay_out(asked), lay_out(list(trained.segments))
    assert here.positions.tolist() == there.positions.tolist() and int(here.positions[0, 0, 0]) > 5
    assert torch.equal(may_attend(here, here), may_attend(there, there))


def test_a_noised_copy_that_is_given_is_left_out_of_a_prompt() -> None:
    """Nobody else would see it. The clean copy after it is read."""
    noised = '{ port = "latents", field = "image", role = "target", mask = "isolated" },\n  { port = "latents", field = "image" }'
    text = MIXED.replace('{ port = "latents", field = "image", role = "target" }', noised)
    planner = planner_of(recipe_from(text, sets=[f"tokenizers.bpe.vocab_size={TOKENIZER.vocab_size}"]))
    prompt, rest = planner.prompt(sample_of(1, comment="well"), "paint")
    assert [segment.mask for segment in prompt if segment.port == "latents"] == [MaskKind.FULL]
    assert [spec.text for spec in rest] == ["{comment}<eot>"]


def test_a_picture_made_while_sampling_is_wrapped_as_in_training() -> None:
    planner = planner_of(BASE)
    spec = SegmentSpec(port="codes", field="image", role=Role.TARGET)
    made: list[Segment] = planner.block(spec, torch.from_numpy(sample_of(1).fields["image.codes"].astype(np.int64)).flatten(), (2, 3))
    trained = plan(BASE, "draw").segments[1:]
    for ours, theirs in zip(made, trained, strict=True):
        assert torch.equal(ours.payload, theirs.payload)
        assert (ours.port, ours.grid, ours.mask, ours.merge, ours.positions, ours.expert) == (
            theirs.port,
            theirs.grid,
            theirs.mask,
            theirs.merge,
            theirs.positions,
            theirs.expert,
        )
