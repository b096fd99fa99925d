"""The clock: how many ticks a segment takes, and where its tokens stand."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from worlds import segment_lists, text

from stages.sequence.pack import Cursor, continue_rows, lay_out
from stages.sequence.positions import positions_of
from stages.sequence.segment import MaskKind, PositionKind, Segment

SHARED, GRID = PositionKind.SHARED, PositionKind.GRID


def picture(grid: tuple[int, int], positions: PositionKind, *, mask: MaskKind = MaskKind.FULL, merge: bool = False) -> Segment:
    n = grid[0] * grid[1]
    return Segment(port="codes", payload=torch.zeros(n, dtype=torch.int64), grid=grid, mask=mask, merge=merge, positions=positions)


def ticks(*segments: Segment) -> list[int]:
    """The first axis of every token's position."""
    return lay_out(list(segments)).positions[0, :, 0].tolist()


def test_sequential_takes_one_tick_a_token_on_all_three_axes() -> None:
    positions = lay_out([text(3), text(2)]).positions[0]
    assert positions.tolist() == [[i, i, i] for i in range(5)]


def test_a_shared_picture_takes_one_tick_and_text_goes_on_after_it() -> None:
    assert ticks(text(2), picture((2, 3), SHARED), text(2)) == [0, 1, 2, 2, 2, 2, 2, 2, 3, 4]


def test_segments_of_one_shared_block_stand_on_the_same_tick() -> None:
    before, after = (picture((1, 1), SHARED, merge=merge) for merge in (False, True))
    assert ticks(text(1), before, picture((1, 2), SHARED, merge=True), after, text(1)) == [0, 1, 1, 1, 1, 2]


def test_a_grid_runs_rows_and_columns_from_the_current_tick_and_takes_its_longest_side() -> None:
    positions = lay_out([text(2), picture((2, 3), GRID), text(1)]).positions[0]
    assert positions[2:8].tolist() == [[2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4]]
    assert positions[8].tolist() == [5, 5, 5]


def test_a_tall_grid_takes_as_many_ticks_as_rows() -> None:
    assert ticks(picture((3, 2), GRID), text(1))[-1] == 3


def test_what_later_tokens_cannot_see_takes_no_time() -> None:
    noisy = picture((2, 3), SHARED, mask=MaskKind.ISOLATED)
    clean = picture((2, 3), SHARED)
    assert ticks(text(2), noisy, clean, text(1)) == [0, 1] + [2] * 6 + [2] * 6 + [3]


def test_a_segment_that_holds_time_for_a_dropped_one_starts_later() -> None:
    assert ticks(text(2), text(2, advance=5)) == [0, 1, 7, 8]


@given(segment_lists(), st.integers(0, 40))
def test_positions_begin_where_the_clock_stands(segments: list[Segment], start: int) -> None:
    """Adding a constant to the start adds it to every position: rotary attention then cannot tell the difference."""
    here, there = positions_of(segments), positions_of(segments, start)
    assert there[1] == here[1] + start
    for mine, theirs in zip(here[0], there[0], strict=True):
        assert torch.equal(mine + start, theirs)


@given(segment_lists(), st.integers(1, 4))
def test_writing_in_two_goes_stands_where_writing_at_once_stands(segments: list[Segment], cut: int) -> None:
    """What decoding relies on: the cursor carries index, block and clock."""
    at = min(cut, len(segments))
    while at < len(segments) and segments[at].merge:  # a block is written whole
        at += 1
    whole = lay_out(segments)
    first, cursors = continue_rows([segments[:at]], [Cursor()])
    second, moved = continue_rows([segments[at:]], cursors)
    joined = first.layout.append(second.layout)
    for name in ("block_id", "index", "full", "isolated", "positions", "expert_id"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    assert moved[0].index == whole.shape[1]
    assert moved[0].clock == positions_of(segments)[1]
