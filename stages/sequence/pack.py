"""Sequences → a Batch: several samples laid end to end in rows of one table, so that no compute goes into padding."""

from collections.abc import Iterable
from collections.abc import Sequence as Listing
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.sequence.positions import positions_of
from stages.sequence.segment import Batch, Layout, MaskKind, PortRows, Role, Segment, Sequence


def pack(sequences: Iterable[Sequence], row_length: int | None = None) -> Batch:
    """Lay sequences out in as few rows as first-fit-decreasing finds.

    row_length: tokens a row; without one, the longest sequence decides, and short sequences share rows of at least 128, where
    attention still costs little beside the matrix products. Raises ValueError for a sequence longer than `row_length` and for
    merged segments that disagree on their mask.
    """
    listed = list(sequences)
    longest = max((len(sequence) for sequence in listed), default=0)
    length = row_length or max(longest, min(128, sum(len(sequence) for sequence in listed)))
    if longest > length:
        raise ValueError(f"a sequence of {longest} tokens does not fit a row of {length}")
    rows = _first_fit(listed, length)
    width = row_length or max((sum(len(listed[i]) for i in row) for row in rows), default=0)

    table = _empty_layout(len(rows), width)
    owned: dict[str, list[_Placed]] = {}
    for row, members in enumerate(rows):
        column = 0
        for number in members:
            sequence = listed[number]
            for placed in _place(sequence, number, row * width + column):
                owned.setdefault(placed.segment.port, []).append(placed)
                if placed.segment.in_table:
                    placed.write(table, row, row * width)
            column += len(sequence)
    for number, sequence in enumerate(listed):  # objectives-only segments of sequences that own no row
        if len(sequence) == 0 and not any(number in members for members in rows):
            for placed in _place(sequence, number, 0):
                owned.setdefault(placed.segment.port, []).append(placed)
    ports = {name: _gather(sorted(placed, key=lambda p: (p.start, p.number))) for name, placed in owned.items()}
    return Batch(table, ports, tuple(s.key for s in listed), tuple(s.task for s in listed))


def lay_out(segments: Listing[Segment]) -> Layout:
    """The one-row layout (1, l) of a single sample's segments."""
    return pack([Sequence(key="", task="", segments=tuple(segments))]).layout


@dataclass
class Cursor:
    """Where a sample that is being written stands: its next index, its last block, its clock."""

    index: int = 0
    block: int = -1
    clock: int = 0


def continue_rows(rows: Listing[Listing[Segment]], cursors: Listing[Cursor]) -> tuple[Batch, list[Cursor]]:
    """One sample a row, each going on from its cursor; shorter rows are padded on the right. Returns the moved cursors too."""
    width = max((sum(len(segment) for segment in segments) for segments in rows), default=0)
    table = _empty_layout(len(rows), width)
    owned: dict[str, list[_Placed]] = {}
    moved: list[Cursor] = []
    for row, (segments, cursor) in enumerate(zip(rows, cursors, strict=True)):
        sequence = Sequence(key="", task="", segments=tuple(segments))
        placed = list(_place(sequence, row, row * width, cursor.block, cursor.clock))
        for entry in placed:
            owned.setdefault(entry.segment.port, []).append(entry)
            entry.write(table, row, row * width, cursor.index)
        clock = positions_of(segments, cursor.clock)[1]
        moved.append(Cursor(cursor.index + len(sequence), placed[-1].block if placed else cursor.block, clock))
    ports = {name: _gather(placed) for name, placed in owned.items()}
    return Batch(table, ports, ("",) * len(rows), ("",) * len(rows)), moved


def _first_fit(sequences: list[Sequence], length: int) -> list[list[int]]:
    order = sorted((i for i, s in enumerate(sequences) if len(s) > 0), key=lambda i: (-len(sequences[i]), i))
    rows: list[list[int]] = []
    room: list[int] = []
    for number in order:
        need = len(sequences[number])
        place = next((row for row, left in enumerate(room) if left >= need), None)
        if place is None:
            rows.append([])
            room.append(length)
            place = len(rows) - 1
        rows[place].append(number)
        room[place] -= need
    return rows


def _empty_layout(b: int, length: int) -> Layout:
    ints = torch.full((b, length), -1, dtype=torch.int64)
    return Layout(
        sample_id=ints.clone(),
        block_id=ints.clone(),
        index=torch.arange(length).expand(b, length).clone(),  # padding rows need an index of their own to see themselves
        full=torch.zeros((b, length), dtype=torch.bool),
        isolated=torch.zeros((b, length), dtype=torch.bool),
        positions=torch.zeros((b, length, 3), dtype=torch.int64),
        expert_id=torch.zeros((b, length), dtype=torch.int64),
    )


class _Placed:
    """A segment at its place: flat index of its first token, of the sample's first token, block and clock."""

    def __init__(self, segment: Segment, number: int, first: int, start: int, block: int, positions: Tensor) -> None:
        self.segment, self.number, self.first, self.start, self.block, self.positions = segment, number, first, start, block, positions

    def write(self, table: Layout, row: int, row_start: int, index_start: int = 0) -> None:
        span = slice(self.start - row_start, self.start - row_start + len(self.segment))
        table.sample_id[row, span] = self.number
        table.block_id[row, span] = self.block
        place = index_start + self.start - self.first
        table.index[row, span] = torch.arange(place, place + len(self.segment))
        table.full[row, span] = self.segment.mask != MaskKind.CAUSAL
        table.isolated[row, span] = self.segment.mask == MaskKind.ISOLATED
        table.positions[row, span] = self.positions
        table.expert_id[row, span] = self.segment.expert


def _place(sequence: Sequence, number: int, first: int, block: int = -1, clock: int = 0) -> Iterable[_Placed]:
    in_table = [segment for segment in sequence.segments if segment.in_table]
    positions, _ = positions_of(in_table, clock)
    place, start = 0, first
    previous: Segment | None = None
    for segment in sequence.segments:
        if not segment.in_table:
            yield _Placed(segment, number, first, start, -1, torch.zeros((len(segment), 3), dtype=torch.int64))
            continue
        if segment.merge and previous is not None:
            if segment.mask != previous.mask:
                raise ValueError(
                    f"'{segment.port}' is merged into a block of '{previous.port}' but one is {segment.mask}, the other {previous.mask}"
                )
        else:
            block += 1
        yield _Placed(segment, number, first, start, block, positions[place])
        place, start, previous = place + 1, start + len(segment), segment


def _gather(placed: list[_Placed]) -> PortRows:
    outside = not placed[0].segment.in_table
    payloads = [p.segment.payload for p in placed]
    lengths = torch.tensor([len(p.segment) for p in placed])
    starts = torch.tensor([p.start for p in placed])
    firsts = torch.tensor([p.first for p in placed])
    segment = torch.repeat_interleave(torch.arange(len(placed)), lengths)
    within = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).index_select(0, segment)
    rows = starts.index_select(0, segment) + within
    ragged_ids = outside and payloads[0].dim() == 1
    if ragged_ids:
        values = torch.nn.utils.rnn.pad_sequence(payloads, batch_first=True)
    elif payloads[0].dim() == 3:
        values = torch.stack(payloads)
    else:
        values = torch.cat(payloads)
    per_segment = torch.tensor([p.segment.weight for p in placed])
    targets = torch.tensor([p.segment.role == Role.TARGET for p in placed])
    return PortRows(
        rows=torch.full_like(rows, -1) if outside else rows,
        previous=torch.where(rows > firsts.index_select(0, segment), rows - 1, torch.full_like(rows, -1)),
        values=values,
        target=targets.index_select(0, segment),
        weight=per_segment.index_select(0, segment),
        segment=segment,
        timestep_range=torch.tensor([p.segment.timestep_range for p in placed], dtype=torch.float32),
        sample=torch.tensor([p.number for p in placed]),
        grids=[p.segment.grid for p in placed],
        lengths=lengths,
    )
