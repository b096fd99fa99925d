"""The mask rule against its definition in words, and what follows from it."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from worlds import segment_lists, text

from stages.sequence.masks import additive, is_causal, may_attend
from stages.sequence.pack import lay_out, pack
from stages.sequence.segment import Layout, MaskKind, Segment, Sequence


def mask_of(segments: list[Segment]) -> Tensor:
    layout = lay_out(segments)
    return may_attend(layout, layout)[0]


def rows(mask: Tensor) -> str:
    return " ".join("".join(str(int(entry)) for entry in row) for row in mask)


def sequences(lists: list[list[Segment]]) -> list[Sequence]:
    return [Sequence(key=str(number), task="any", segments=tuple(segments)) for number, segments in enumerate(lists)]


def in_words(segments: list[Segment]) -> Tensor:
    """Token by token: the own block (all of it, or its past), and every earlier block that is not isolated."""
    tokens = []
    block = -1
    for segment in segments:
        block += not segment.merge
        tokens += [(block, segment.mask)] * len(segment)
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for q, (q_block, q_kind) in enumerate(tokens):
        for k, (k_block, k_kind) in enumerate(tokens):
            if q_block == k_block:
                mask[q, k] = q_kind in (MaskKind.FULL, MaskKind.ISOLATED) or k <= q
            else:
                mask[q, k] = k_block < q_block and k_kind not in (MaskKind.ISOLATED, MaskKind.ISOLATED_CAUSAL)
    return mask


@given(segment_lists())
def test_the_mask_is_what_the_words_say(segments: list[Segment]) -> None:
    assert torch.equal(mask_of(segments), in_words(segments))


@given(segment_lists())
def test_no_information_leaks_over_several_layers(segments: list[Segment]) -> None:
    mask = mask_of(segments)
    two_hops = (mask.float() @ mask.float()) > 0
    assert torch.equal(two_hops, mask)


@given(segment_lists(), st.integers(0, 30))
def test_a_token_never_sees_what_comes_after_its_block(segments: list[Segment], cut: int) -> None:
    head = segments[: 1 + cut % len(segments)]
    while len(head) < len(segments) and segments[len(head)].merge:
        head = segments[: len(head) + 1]
    n = sum(len(segment) for segment in head)
    assert torch.equal(mask_of(segments)[:n, :n], mask_of(head))
    assert not mask_of(segments)[:n, n:].any()


@given(st.lists(segment_lists(max_segments=3), min_size=2, max_size=4))
def test_samples_in_one_row_form_the_block_diagonal_of_their_own_masks(lists: list[list[Segment]]) -> None:
    total = sum(len(segment) for segments in lists for segment in segments)
    layout = pack(sequences(lists), row_length=total + 2).layout
    mask = may_attend(layout, layout)[0]
    order = [int(number) for number in dict.fromkeys(layout.sample_id[0].tolist()) if number >= 0]
    expected = torch.block_diag(*(mask_of(lists[number]).float() for number in order), torch.eye(2)).bool()
    assert torch.equal(mask, expected)  # the two padding rows see themselves, so that a softmax has something to normalise


@given(segment_lists())
def test_the_causal_fast_path_is_taken_only_where_the_mask_is_causal(segments: list[Segment]) -> None:
    layout = lay_out(segments)
    if is_causal(layout):
        assert torch.equal(mask_of(segments), torch.ones(layout.shape[1], layout.shape[1]).tril().bool())


def test_plain_text_takes_the_causal_fast_path_and_padding_or_strangers_leave_it() -> None:
    two_texts = [text(3), text(2)]
    assert is_causal(lay_out(two_texts))
    assert not is_causal(lay_out([text(3), text(2, mask=MaskKind.FULL)]))
    assert not is_causal(pack(sequences([two_texts]), row_length=7).layout)
    assert not is_causal(pack(sequences([two_texts, [text(4)]]), row_length=9).layout)


def test_additive_is_zero_where_allowed_and_minus_infinity_elsewhere() -> None:
    mask = mask_of([text(2), text(2, mask=MaskKind.ISOLATED), text(1)])
    bias = additive(mask[None], torch.float32)
    assert bias.shape == (1, 1, 5, 5)
    assert torch.equal(bias[0, 0] == 0, mask)
    assert torch.equal(bias[0, 0] == -torch.inf, ~mask)


def test_a_merged_segment_extends_the_block_before_it() -> None:
    apart = mask_of([text(1, mask=MaskKind.FULL), text(2, mask=MaskKind.FULL)])
    merged = mask_of([text(1, mask=MaskKind.FULL), text(2, mask=MaskKind.FULL, merge=True)])
    assert rows(apart) == "100 111 111"
    assert rows(merged) == "111 111 111"


def test_an_isolated_block_sees_itself_whole_and_is_seen_by_nobody_else() -> None:
    isolated = MaskKind.ISOLATED
    assert rows(mask_of([text(1), text(2, mask=isolated), text(2, mask=isolated), text(1)])) == "100000 111000 111000 100110 100110 100001"


# rows hidden from a port


@st.composite
def sighted(draw: st.DrawFn) -> list[Segment]:
    """Any segments, each of a port of three, hidden from any of the other two."""
    made = []
    for segment in draw(segment_lists()):
        number = draw(st.integers(0, 2))
        made.append(replace(segment, port_number=number, hidden_from=draw(st.integers(0, 7)) & ~(1 << number)))
    return made


@given(sighted())
def test_rows_of_a_port_never_see_what_is_hidden_from_it_and_everything_else_as_before(segments: list[Segment]) -> None:
    tokens = [segment for segment in segments for _ in range(len(segment))]
    hidden = torch.tensor([[bool(k.hidden_from >> q.port_number & 1) for k in tokens] for q in tokens])
    mask = mask_of(segments)
    assert torch.equal(mask, in_words(segments) & ~hidden)
    assert mask.diagonal().all()
    if hidden.any():
        assert not is_causal(lay_out(segments))


def test_a_layout_of_which_nothing_more_is_said_hides_nothing() -> None:
    layout = lay_out([text(3)])
    columns = {name: value for name, value in vars(layout).items() if name not in ("port_number", "hidden_from")}
    plain = Layout(**columns)
    assert plain.hidden_from.shape == plain.sample_id.shape
    assert torch.equal(may_attend(plain, plain), may_attend(layout, layout))
