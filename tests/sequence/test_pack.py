"""Packing: every token once, every sample whole, and nothing about a sample depends on its neighbours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator
from worlds import lively, mixed_recipe, own_rows, planner_of, sample_of, segment_lists, text

from stages.sequence.pack import Cursor, continue_rows, pack
from stages.sequence.segment import Batch, MaskKind, Role, Segment, Sequence


def sequence(segments: list[Segment], key: str = "a") -> Sequence:
    return Sequence(key=key, task="any", segments=tuple(segments))


def sequences(lists: list[list[Segment]]) -> list[Sequence]:
    return [sequence(segments, str(number)) for number, segments in enumerate(lists)]


many = st.lists(segment_lists(max_segments=3), min_size=1, max_size=5)


@given(many, st.one_of(st.none(), st.integers(40, 60)))
def test_every_token_is_laid_down_once_in_the_order_of_its_sample(lists: list[list[Segment]], row_length: int | None) -> None:
    batch = pack(sequences(lists), row_length)
    b, length = batch.layout.shape
    owner = torch.full((b * length,), -1)
    for rows in batch.ports.values():
        assert (owner[rows.rows] == -1).all()
        owner[rows.rows] = 1
    assert torch.equal(owner >= 0, batch.layout.sample_id.flatten() >= 0)
    for number, segments in enumerate(lists):
        own = batch.layout.sample_id == number
        assert int(own.any(dim=1).sum()) == 1  # in one row
        columns = own.any(dim=0).nonzero().squeeze(1)
        assert torch.equal(columns, torch.arange(columns[0], columns[0] + sum(map(len, segments))))  # without a gap
        assert torch.equal(batch.layout.index[own], torch.arange(int(own.sum())))


@given(many)
def test_unpacking_gives_every_payload_back(lists: list[list[Segment]]) -> None:
    batch = pack(sequences(lists))
    for name, rows in batch.ports.items():
        starts = rows.segment_sizes().cumsum(0) - rows.segment_sizes()
        for number in range(len(lists)):
            expected = [segment for segment in lists[number] if segment.port == name]
            found = (rows.sample == number).nonzero().squeeze(1).tolist()
            assert [rows.grids[place] for place in found] == [segment.grid for segment in expected]
            for place, segment in zip(found, expected, strict=True):
                own = slice(int(starts[place]), int(starts[place]) + len(segment))
                assert torch.equal(rows.values[own], segment.payload)
                assert bool(rows.target[own].all()) == (segment.role == Role.TARGET)
                assert (rows.segment[own] == place).all()


@given(many)
def test_the_row_before_a_token_is_of_the_same_sample_or_there_is_none(lists: list[list[Segment]]) -> None:
    batch = pack(sequences(lists))
    samples, index = batch.layout.sample_id.flatten(), batch.layout.index.flatten()
    for rows in batch.ports.values():
        first = rows.previous < 0
        assert torch.equal(first, index[rows.rows] == 0)
        assert torch.equal(samples[rows.previous[~first]], samples[rows.rows[~first]])
        assert torch.equal(index[rows.previous[~first]] + 1, index[rows.rows[~first]])


@given(many)
def test_the_order_of_a_batch_moves_rows_and_changes_no_sample(lists: list[list[Segment]]) -> None:
    forwards, backwards = pack(sequences(lists)), pack(sequences(lists)[::-1])
    for number in range(len(lists)):
        for name in ("block_id", "index", "full", "isolated", "positions", "expert_id"):
            mine = own_rows(getattr(forwards.layout, name), forwards.layout, number)
            theirs = own_rows(getattr(backwards.layout, name), backwards.layout, len(lists) - 1 - number)
            assert torch.equal(mine, theirs)


def test_short_samples_share_rows_and_long_ones_decide_the_length() -> None:
    batch = pack(sequences([[text(150)], [text(60)], [text(90)], [text(70)]]))
    assert batch.layout.shape == (3, 150)
    assert batch.num_tokens == 370
    assert batch.padding == pytest.approx(1 - 370 / 450)
    assert [sorted(set(row.tolist()) - {-1}) for row in batch.layout.sample_id] == [[0], [1, 2], [3]]


def test_a_batch_says_whose_samples_it_holds() -> None:
    batch = pack(
        [Sequence(key="x", task="draw", segments=(text(2, role=Role.TARGET), text(3))), Sequence(key="y", task="ask", segments=(text(1),))]
    )
    assert batch.keys == ("x", "y")
    assert batch.tasks == ("draw", "ask")
    assert batch.num_supervised == 2


def test_a_sample_that_is_too_long_is_an_error_that_names_both_lengths() -> None:
    with pytest.raises(ValueError, match=r"a sequence of 9 tokens does not fit a row of 7"):
        pack([sequence([text(5), text(4)])], row_length=7)


def test_segments_merged_into_one_block_must_agree_on_their_mask() -> None:
    with pytest.raises(ValueError, match=r"'text' \(full\) is merged into a block of 'text' \(causal\)"):
        pack([sequence([text(2), text(3, mask=MaskKind.FULL, merge=True)])])


def test_rows_that_go_on_are_padded_on_the_right_and_their_cursors_move_alone() -> None:
    batch, cursors = continue_rows(
        [[text(3)], [], [text(1)]], [Cursor(), Cursor(index=7, block=2, clock=5), Cursor(index=4, block=1, clock=9)]
    )
    assert (batch.layout.sample_id >= 0).tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert cursors == [Cursor(3, 0, 3), Cursor(7, 2, 5), Cursor(5, 2, 10)]
    assert batch.layout.index[2, 0] == 4
    assert batch.layout.positions[2, 0, 0] == 9


# packing changes nothing: the most valuable property of all, because masks, positions, routing and connectors must all agree


MODEL = lively(mixed_recipe())


def hidden_of(batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return MODEL.hidden(batch)


@given(many, st.integers(0, 9))
@settings(max_examples=40)
def test_packing_changes_nothing(lists: list[list[Segment]], room: int) -> None:
    """Alone, padded, and packed beside strangers, the hidden rows of a sample are the same."""
    total = sum(len(segment) for segments in lists for segment in segments)
    together = pack(sequences(lists), row_length=total + room)
    apart = pack(sequences(lists), row_length=max(sum(map(len, segments)) for segments in lists) + room)
    packed, spread = hidden_of(together), hidden_of(apart)
    assert torch.isfinite(packed).all()
    assert torch.isfinite(spread).all()
    for number, segments in enumerate(lists):
        alone = hidden_of(pack([sequence(segments)], row_length=sum(map(len, segments))))[0]
        torch.testing.assert_close(own_rows(packed, together.layout, number), alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(own_rows(spread, apart.layout, number), alone, atol=1e-5, rtol=1e-5)


def test_packing_changes_no_loss() -> None:
    """What a batch of planned samples costs is the sum of what each costs alone; text only, where nothing is drawn at random."""
    import random

    planner = planner_of(MODEL.recipe)
    planned = [planner.plan(sample_of(number, grid=(1 + number, 2)), "answer", random.Random(0)) for number in range(4)]

    def cost(chosen: list[Sequence]) -> tuple[float, int]:
        with torch.no_grad():
            loss = MODEL.losses(pack(chosen), Generator().manual_seed(0))["text"]
        return float(loss.total), loss.count

    total, count = cost(planned)
    alone = [cost([entry]) for entry in planned]
    assert count == sum(number for _, number in alone)
    assert total == pytest.approx(sum(loss for loss, _ in alone), rel=1e-5)
