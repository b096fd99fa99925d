"""The one mask rule beside the published masks, each built again from its definition as a dense matrix, entry by entry."""

from random import Random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from worlds import planner_of, recipe_from, sample_of, text, text_tokenizer

from stages.model import meta_model
from stages.recipe import load_recipe
from stages.sequence.masks import is_causal, may_attend
from stages.sequence.pack import lay_out, pack
from stages.sequence.plan import Planner
from stages.sequence.segment import MaskKind, PositionKind, Segment, Sequence

CAUSAL, FULL, ISOLATED = MaskKind.CAUSAL, MaskKind.FULL, MaskKind.ISOLATED


def ours(segments: list[Segment]) -> Tensor:
    layout = lay_out(segments)
    return may_attend(layout, layout)[0]


def golden(rows: str) -> Tensor:
    return torch.tensor([[entry == "1" for entry in row] for row in rows.split()])


def causal(n: int) -> Tensor:
    return torch.ones(n, n).tril().bool()


def part(length: int, mask: MaskKind = CAUSAL, *, merge: bool = False, shared: bool = False) -> Segment:
    return text(length, mask=mask, merge=merge, positions=PositionKind.SHARED if shared else PositionKind.SEQUENTIAL)


# spans: ("text", n) or ("image", n), what an interleaved document is made of
spans_of = st.lists(st.tuples(st.sampled_from(["text", "image"]), st.integers(1, 5)), min_size=1, max_size=6)
Spans = list[tuple[str, int]]


def bounds(lengths: list[int]) -> list[tuple[int, int]]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [(end - length, end) for end, length in zip(ends, lengths, strict=True)]


# causal, and causal with bidirectional blocks (Transfusion, LMFusion, Show-o2, HunyuanImage-3)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_segments_of_text_are_one_causal_triangle(lengths: list[int]) -> None:
    assert torch.equal(ours([part(n) for n in lengths]), causal(sum(lengths)))


def blocks_by_squares(length: int, blocks: list[tuple[int, int]]) -> Tensor:
    """A causal triangle with a square of ones filled in for each block."""
    mask = causal(length)
    for start, stop in blocks:
        mask[start:stop, start:stop] = True
    return mask


def blocks_by_offsets(length: int, blocks: list[tuple[int, int]]) -> Tensor:
    """causal or (q >= offset and k < offset + length): right although nothing is said of k >= offset, as those keys are past."""
    q, k = torch.arange(length)[:, None], torch.arange(length)[None, :]
    mask = k <= q
    for start, stop in blocks:
        mask = mask | ((q >= start) & (k < stop))
    return mask


def blocks_by_ids(length: int, blocks: list[tuple[int, int]]) -> Tensor:
    """causal or of the same block, where -1 is no block."""
    ids = torch.full((length,), -1)
    for number, (start, stop) in enumerate(blocks):
        ids[start:stop] = number
    q, k = torch.arange(length)[:, None], torch.arange(length)[None, :]
    return (k <= q) | ((ids[:, None] == ids[None, :]) & (ids[:, None] >= 0))


@given(spans_of)
def test_bidirectional_blocks_agree_with_all_three_published_spellings(spans: Spans) -> None:
    mask = ours([part(n, FULL if kind == "image" else CAUSAL) for kind, n in spans])
    places = bounds([n for _, n in spans])
    blocks = [place for place, (kind, _) in zip(places, spans, strict=True) if kind == "image"]
    length = places[-1][1]
    for spelling in (blocks_by_squares, blocks_by_offsets, blocks_by_ids):
        assert torch.equal(mask, spelling(length, blocks)), spelling.__name__


def test_markers_outside_a_block_match_the_hand_checked_rows() -> None:
    expected = golden("100000000 110000000 111000000 111100000 111111100 111111100 111111100 111111110 111111111")
    assert torch.equal(ours([part(4), part(3, FULL), part(2)]), expected)


def test_markers_inside_a_block_match_the_hand_checked_rows() -> None:
    expected = golden("100000000 110000000 111000000 111111110 111111110 111111110 111111110 111111110 111111111")
    inside = [part(1, FULL), part(3, FULL, merge=True), part(1, FULL, merge=True)]
    assert torch.equal(ours([part(3), *inside, part(1)]), expected)


def markers_recipe(inside: bool) -> str:
    shown = load_recipe("show-o", size="tiny")
    assert shown.ports["codes"].markers.inside
    return shown.to_toml().replace('after = "<eoi>"', f'after = "<eoi>"\ninside = {str(inside).lower()}')


def test_the_planner_places_markers_inside_or_outside_as_the_recipe_says() -> None:
    for inside in (True, False):
        recipe = recipe_from(markers_recipe(inside), sets=[f"tokenizers.bpe.vocab_size={text_tokenizer().vocab_size}"])
        sequence = planner_of(recipe).plan(sample_of(1), "draw", Random(3))
        words = len(sequence.segments[0])
        block = (words, words + 8) if inside else (words + 1, words + 7)
        assert torch.equal(ours(list(sequence.segments)), blocks_by_squares(words + 8, [block])), inside


# Show-o's omni-attention


def omni_draw(words: int, picture: int) -> Tensor:
    """Text rows are causal; every row from <soi> to <eoi> sees all text and the whole of the picture."""
    mask = causal(words + picture)
    mask[words:, :] = True
    return mask


def omni_understand(lead: int, total: int) -> Tensor:
    """Every row sees all keys up to <eoi> (`lead` of them); beyond, causal."""
    mask = causal(total)
    mask[:, :lead] = True
    return mask


@given(st.integers(1, 8), st.integers(1, 8))
def test_omni_attention_of_drawing(words: int, codes: int) -> None:
    segments = [part(words), part(1, FULL), part(codes, FULL, merge=True), part(1, FULL, merge=True)]
    assert torch.equal(ours(segments), omni_draw(words, codes + 2))


@given(st.integers(1, 8), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_omni_attention_of_understanding(codes: int, turns: list[int]) -> None:
    segments = [part(n, FULL, merge=place > 0) for place, n in enumerate([1, 1, codes, 1])] + [part(n) for n in turns]
    assert torch.equal(ours(segments), omni_understand(codes + 3, codes + 3 + sum(turns)))


def test_omni_attention_matches_the_hand_checked_rows() -> None:
    padded = golden("100000000 010000000 011000000 011100000 011110000 011111111 011111111 011111111 011111111")
    assert torch.equal(ours([part(4), part(1, FULL), part(2, FULL, merge=True), part(1, FULL, merge=True)]), padded[1:, 1:])
    understanding = golden("11111000 " * 5 + "11111100 11111110 11111111")
    lead = [part(n, FULL, merge=place > 0) for place, n in enumerate([1, 1, 2, 1])]
    assert torch.equal(ours([*lead, part(3)]), understanding)


def test_the_shipped_show_o_plans_both_of_its_masks() -> None:
    recipe = load_recipe("show-o", size="tiny", sets=[f"tokenizers.bpe.vocab_size={text_tokenizer().vocab_size}"])
    planner = planner_of(recipe)
    draw = planner.plan(sample_of(2), "draw", Random(1))
    picture = 2 + 6  # <soi> 2x3 <eoi>
    assert torch.equal(ours(list(draw.segments)), omni_draw(len(draw) - picture, picture))
    for task in ("caption", "answer"):
        told = planner.plan(sample_of(2, qa=sample_of(2).fields["qa"][:1]), task, Random(1))  # it asks one question at a time
        assert torch.equal(ours(list(told.segments)), omni_understand(1 + picture, len(told))), task


# BAGEL


def bagel_dense(spans: Spans) -> Tensor:
    """Split by split: all keys before, the own square causal or whole; then every noised column is emptied but for its own square."""
    places = bounds([n for _, n in spans])
    mask = torch.zeros(places[-1][1], places[-1][1], dtype=torch.bool)
    for (start, stop), (kind, n) in zip(places, spans, strict=True):
        mask[start:stop, :start] = True
        mask[start:stop, start:stop] = causal(n) if kind == "text" else True
    for (start, stop), (kind, _) in zip(places, spans, strict=True):
        if kind == "noise":
            mask[:, start:stop] = False
            mask[start:stop, start:stop] = True
    return mask


def bagel_predicate(spans: Spans) -> Tensor:
    """(k <= q or of one block) and not (k noised and k's noise is not q's), as a function of ids."""
    block, noise = [], []
    for number, (kind, n) in enumerate(spans):
        block += [-1 if kind == "text" else number] * n
        noise += [number if kind == "noise" else -1] * n
    blk, nz, at = torch.tensor(block), torch.tensor(noise), torch.arange(len(block))
    seen = (at[None, :] <= at[:, None]) | ((blk[:, None] == blk[None, :]) & (blk[:, None] >= 0))
    return seen & ~((nz[None, :] >= 0) & (nz[None, :] != nz[:, None]))


def bagel_rotary(spans: Spans) -> list[int]:
    """Text counts on; a clean picture takes one id; a noised one stands at the current id and takes none."""
    clock, ids = 0, []
    for kind, n in spans:
        ids += list(range(clock, clock + n)) if kind == "text" else [clock] * n
        clock += {"text": n, "clean": 1, "noise": 0}[kind]
    return ids


def bagel_segments(spans: Spans) -> list[Segment]:
    kinds = {"text": CAUSAL, "clean": FULL, "noise": ISOLATED}
    return [part(n, kinds[kind], shared=kind != "text") for kind, n in spans]


bagel_spans = st.lists(st.tuples(st.sampled_from(["text", "clean", "noise"]), st.integers(1, 4)), min_size=1, max_size=7)


@given(bagel_spans)
def test_clean_and_noisy_copies_are_masked_as_by_bagel(spans: Spans) -> None:
    mask = ours(bagel_segments(spans))
    assert torch.equal(mask, bagel_dense(spans))
    assert torch.equal(mask, bagel_predicate(spans))


@given(bagel_spans)
def test_clean_and_noisy_copies_stand_where_bagel_puts_them(spans: Spans) -> None:
    positions = lay_out(bagel_segments(spans)).positions[0]
    assert positions[:, 0].tolist() == bagel_rotary(spans)
    assert torch.equal(positions, positions[:, :1].expand(-1, 3))


def test_a_picture_generated_and_later_read_matches_the_hand_checked_rows() -> None:
    spans = [("text", 2), ("noise", 3), ("clean", 3), ("clean", 3), ("text", 2)]
    rows = ["1000000000000", "1100000000000"] + ["1111100000000"] * 3 + ["1100011100000"] * 3
    rows += ["1100011111100"] * 3 + ["1100011111110", "1100011111111"]
    assert torch.equal(ours(bagel_segments(spans)), golden(" ".join(rows)))
    assert lay_out(bagel_segments(spans)).positions[0, :, 0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 4, 5]


# scales, prefixes, and the two extremes


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_scales_see_coarser_scales_and_themselves(sides: list[int]) -> None:
    """VAR: sc(k) <= sc(q), for square maps of any sides."""
    scale = torch.repeat_interleave(torch.arange(len(sides)), torch.tensor([side * side for side in sides]))
    assert torch.equal(ours([part(side * side, FULL) for side in sides]), scale[None, :] <= scale[:, None])


def test_two_scales_match_the_hand_checked_rows() -> None:
    assert torch.equal(ours([part(1, FULL), part(4, FULL)]), golden("10000 11111 11111 11111 11111"))


@given(st.integers(1, 6), st.integers(0, 4), st.integers(1, 6))
def test_a_prefix_of_picture_and_prompt_sees_itself_whole(picture: int, prompt: int, answer: int) -> None:
    """PaliGemma: k <= q, or both in the prefix."""
    segments = [part(picture, FULL), *([part(prompt, FULL, merge=True)] if prompt else []), part(answer)]
    at = torch.arange(picture + prompt + answer)
    prefix = at < picture + prompt
    assert torch.equal(ours(segments), (at[None, :] <= at[:, None]) | (prefix[:, None] & prefix[None, :]))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_one_merged_full_block_sees_everything(lengths: list[int]) -> None:
    """MMaDA and diffusion transformers."""
    assert ours([part(n, FULL, merge=place > 0) for place, n in enumerate(lengths)]).all()


@given(st.integers(1, 5), st.integers(1, 5))
def test_generation_reads_understanding_one_way(understanding: int, generation: int) -> None:
    """Cosmos 3: understanding is causal among itself, generation sees all of both."""
    mask = ours([part(understanding), part(generation, FULL)])
    expected = causal(understanding + generation)
    expected[understanding:] = True
    assert torch.equal(mask, expected)


# the shipped recipes of systems that denoise: what they plan, beside the same references

SHAPE = (2, 3)  # of a picture's tokens


def planned(name: str, task: str, *sets: str) -> list[Segment]:
    """One example of a shipped recipe's task, nothing dropped."""
    recipe = load_recipe(name, size="tiny", sets=[*sets, f"tokenizers.bpe.vocab_size={text_tokenizer().vocab_size}"])
    planner = Planner(recipe, {"bpe": text_tokenizer()}, dict(meta_model(recipe).encoders.items()))
    port = next(port for port in recipe.ports.values() if port.autoencoder)
    shape = (recipe.autoencoders[port.autoencoder].latent_channels, *(side * port.patch_size for side in SHAPE))
    latents, picture = np.zeros(shape, np.float32), np.zeros((16, 24, 3), np.uint8)
    fields = {f"{field}.latents": latents for field in ("image", "source", "result")} | {"image": picture, "source": picture}
    sample = sample_of(1, instruction="make it green", **fields)
    return list(planner.plan(sample, task, None).segments)


def spans_by_block(segments: list[Segment]) -> Spans:
    """Each attention block as the references name it."""
    kinds = {CAUSAL: "text", FULL: "clean", ISOLATED: "noise"}
    spans: Spans = []
    for segment in segments:
        if segment.merge:
            spans[-1] = (spans[-1][0], spans[-1][1] + len(segment))
        else:
            spans.append((kinds[segment.mask], len(segment)))
    return spans


def test_bagel_plans_a_picture_that_is_drawn_and_later_read_three_times() -> None:
    segments = planned("bagel", "story")
    spans = spans_by_block(segments)
    words = [len(segment) for segment in segments if segment.port == "text" and segment.mask == CAUSAL]
    seen = 16 + 2  # patches of the tower's view, markers
    assert spans == [("text", words[0]), ("noise", 8), ("clean", 8), ("clean", seen), ("text", words[1]), ("noise", 8)]
    mask = ours(segments)
    assert torch.equal(mask, bagel_dense(spans))
    assert torch.equal(mask, bagel_predicate(spans))
    assert lay_out(segments).positions[0, :, 0].tolist() == bagel_rotary(spans)
    experts = [segment.expert for segment in segments for _ in range(len(segment))]
    latent = [segment.port == "draw" for segment in segments for _ in range(len(segment))]
    assert experts == [int(entry) for entry in latent]  # markers are the understanding expert's


def test_over_any_number_of_layers_a_noised_copy_of_bagel_reaches_itself_only() -> None:
    segments = planned("bagel", "story")
    reach = ours(segments)
    for _ in range(4):  # after n squarings, paths of up to 2^n layers
        reach = (reach.float() @ reach.float()) > 0
    spans = spans_by_block(segments)
    for (start, stop), (kind, n) in zip(bounds([n for _, n in spans]), spans, strict=True):
        if kind == "noise":
            assert reach[start:stop, start:stop].all()
            assert reach[:, start:stop].sum() == n * n


def test_mogao_hides_latents_from_words_and_from_nothing_else() -> None:
    segments = planned("mogao", "story")
    ports = [segment.port for segment in segments for _ in range(len(segment))]
    hidden = torch.tensor([[q == "text" and k == "draw" for k in ports] for q in ports])
    assert hidden.any()
    mask = ours(segments)
    assert torch.equal(mask, bagel_dense(spans_by_block(segments)) & ~hidden)
    (start, *_) = [place for place, (port, segment) in enumerate(zip(ports, expanded(segments), strict=True)) if segment.field == "result"]
    clean = [segment.port == "draw" and segment.mask == FULL for segment in expanded(segments)]
    features = [segment.port == "see" for segment in expanded(segments)]
    assert mask[start, torch.tensor(clean)].all() and mask[start, torch.tensor(features)].all()  # the noised picture sees both forms


def expanded(segments: list[Segment]) -> list[Segment]:
    return [segment for segment in segments for _ in range(len(segment))]


def test_show_o2_is_causal_with_a_full_block_that_begins_with_the_time_and_leaves_its_markers_out() -> None:
    for task in ("draw", "caption"):
        segments = planned("show-o2", task)
        place = next(number for number, segment in enumerate(segments) if segment.port == "image")
        start = sum(len(segment) for segment in segments[:place])
        assert [segments[place - 1].field, segments[place + 1].field] == ["<soi>", "<eoi>"]
        assert len(segments[place]) == 1 + 6
        total = sum(map(len, segments))
        for spelling in (blocks_by_squares, blocks_by_offsets, blocks_by_ids):
            assert torch.equal(ours(segments), spelling(total, [(start, start + 7)])), (task, spelling.__name__)
        assert lay_out(segments).positions[0, :, 0].tolist() == list(range(total))


def test_janusflow_stays_causal_and_the_time_stands_where_a_picture_would_begin() -> None:
    segments = planned("janusflow", "draw")
    assert [segment.port for segment in segments] == ["text", "text", "draw"]
    assert segments[-1].timed and len(segments[-1]) == 1 + 6
    total = sum(map(len, segments))
    assert torch.equal(ours(segments), causal(total))
    layout, batch = lay_out(segments), pack([Sequence(key="a", task="draw", segments=tuple(segments))])
    assert is_causal(layout)
    rows = batch.ports["draw"]
    assert rows.time_rows is not None and rows.time_rows.tolist() == [total - 7]
    assert rows.rows.tolist() == list(range(total - 6, total))
