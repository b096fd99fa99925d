"""Sequences → a Batch: several samples laid end to end in rows of one table, so that no compute goes into padding.

Segments are placed one by one in plain Python (which row, which block, which tick), then all tokens are written at once: every
column of the table is a per-segment value repeated over the segment's tokens.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Listing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.sequence.positions import clocks_of, offsets_of
from stages.sequence.segment import Batch, Layout, PortRows, Role, Segment, Sequence

SHARED_ROW = 128  # short samples share rows of this length: attention still costs little beside the matrix products


def pack(sequences: Iterable[Sequence], row_length: int | None = None) -> Batch:
    """Lay sequences out in as few rows as first-fit-decreasing finds, what belongs to different networks in tables of their own.

    row_length: tokens a row; without one, the longest sequence decides, and short ones share rows. Raises ValueError for a sequence
    longer than `row_length` and for merged segments that disagree on their mask.
    """
    listed = list(sequences)
    placed: dict[str, list[_Placed]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for network in networks_of(segment for sequence in listed for segment in sequence.segments):
        own = [replace(sequence, segments=tuple(s for s in sequence.segments if s.network == network)) for sequence in listed]
        placed[network], shapes[network] = _pack_one(own, row_length)
    batch = _batch(placed, shapes, tuple(s.key for s in listed), tuple(s.task for s in listed))
    for name, source in _sources(listed, placed).items():
        batch.ports[name].source = source
    return batch


def networks_of(segments: Iterable[Segment]) -> list[str]:
    """The networks that segments belong to, in the order in which they come; one even if there is nothing."""
    return list(dict.fromkeys(segment.network for segment in segments)) or [""]


def _pack_one(listed: Listing[Sequence], row_length: int | None) -> tuple[list["_Placed"], tuple[int, int]]:
    """Where the segments of one network stand, and the shape of its table."""
    sizes = [len(sequence) for sequence in listed]
    longest = max(sizes, default=0)
    length = row_length or max(longest, min(SHARED_ROW, sum(sizes)))
    if longest > length:
        raise ValueError(f"a sequence of {longest} tokens does not fit a row of {length}")
    rows = _first_fit(sizes, length)
    width = row_length or max((sum(sizes[i] for i in row) for row in rows), default=0)
    placed: list[_Placed] = []
    for row, members in enumerate(rows):
        start = row * width
        for number in members:
            placed += _place(listed[number], number, start, Cursor())
            start += sizes[number]
    for number, sequence in enumerate(listed):
        if not sizes[number]:  # read by objectives only: owns no row
            placed += _place(sequence, number, 0, Cursor())
    return placed, (len(rows), width)


@dataclass
class Cursor:
    """Where a sample that is being written stands: its next index, its last block, its clock."""

    index: int = 0
    block: int = -1
    clock: int = 0


def continue_rows(rows: Listing[Listing[Segment]], cursors: Listing[Cursor]) -> tuple[Batch, list[Cursor]]:
    """One sample a row, each going on from its cursor; shorter rows are padded on the right. Returns the moved cursors too.

    All segments are of one network. What a network reads of another is not filled in: who has kept those rows does that.
    """
    sizes = [sum(len(segment) for segment in segments) for segments in rows]
    width = max(sizes, default=0)
    placed: list[_Placed] = []
    moved: list[Cursor] = []
    for row, (segments, cursor) in enumerate(zip(rows, cursors, strict=True)):
        own = _place(Sequence(key="", task="", segments=tuple(segments)), row, row * width, cursor)
        placed += own
        moved.append(Cursor(cursor.index + sizes[row], own[-1].block if own else cursor.block, clocks_of(segments, cursor.clock)[1]))
    (network,) = networks_of(segment for segments in rows for segment in segments)
    return _batch({network: placed}, {network: (len(rows), width)}, ("",) * len(rows), ("",) * len(rows)), moved


def lay_out(segments: Listing[Segment]) -> Layout:
    """The one-row layout (1, l) of a single sample's segments."""
    return continue_rows([segments], [Cursor()])[0].layout


@dataclass(frozen=True, slots=True)
class _Placed:
    """A segment at its place: which sample, the flat index of its first token and of its sample's, its index, block and clock."""

    segment: Segment
    number: int
    first: int
    start: int
    index: int
    block: int
    clock: int


def _first_fit(sizes: list[int], length: int) -> list[list[int]]:
    order = sorted((i for i, size in enumerate(sizes) if size), key=lambda i: (-sizes[i], i))
    rows: list[list[int]] = []
    room: list[int] = []
    for number in order:
        place = next((row for row, left in enumerate(room) if left >= sizes[number]), None)
        if place is None:
            place = len(rows)
            rows.append([])
            room.append(length)
        rows[place].append(number)
        room[place] -= sizes[number]
    return rows


def _place(sequence: Sequence, number: int, first: int, cursor: Cursor) -> list[_Placed]:
    clocks = iter(clocks_of([segment for segment in sequence.segments if segment.in_table], cursor.clock)[0])
    placed: list[_Placed] = []
    start, block, previous = first, cursor.block, None
    for segment in sequence.segments:
        if not segment.in_table:
            placed.append(_Placed(segment, number, first, start, 0, -1, 0))
            continue
        if segment.merge and previous is not None:
            if segment.mask != previous.mask:
                raise ValueError(f"'{segment.port}' ({segment.mask}) is merged into a block of '{previous.port}' ({previous.mask})")
        else:
            block += 1
        placed.append(_Placed(segment, number, first, start, cursor.index + start - first, block, next(clocks)))
        start, previous = start + len(segment), segment
    return placed


def _batch(placed: dict[str, list[_Placed]], shapes: dict[str, tuple[int, int]], keys: tuple[str, ...], tasks: tuple[str, ...]) -> Batch:
    ports: dict[str, list[_Placed]] = {}
    for entry in sorted((p for own in placed.values() for p in own), key=lambda p: (p.start, p.number)):
        ports.setdefault(entry.segment.port, []).append(entry)
    layouts = {name: _layout([entry for entry in own if entry.segment.in_table], shapes[name]) for name, own in placed.items()}
    return Batch(layouts, {name: _port_rows(entries) for name, entries in ports.items()}, keys, tasks)


def _sources(listed: list[Sequence], placed: dict[str, list[_Placed]]) -> dict[str, Tensor]:
    """For each port of hidden rows, which flat rows of the other network's table its tokens are: int64 (n,), in table order."""
    if not any(segment.of for sequence in listed for segment in sequence.segments):
        return {}
    standing = {(name, p.number): [] for name, own in placed.items() for p in own}  # type: ignore[var-annotated]
    for name, own in placed.items():
        for p in own:
            standing[name, p.number].append(p)
    found: dict[str, list[tuple[int, list[int]]]] = {}
    for number, sequence in enumerate(listed):
        queues = {name: iter(standing.get((name, number), ())) for name in placed}
        passed: list[_Placed] = []
        for segment in sequence.segments:
            here = next(queues[segment.network])
            if segment.of:
                read = [row for p in passed if p.segment.port in segment.of for row in range(p.start, p.start + len(p.segment))]
                found.setdefault(segment.port, []).append((here.start, read[segment.skip :]))
            passed.append(here)
    return {port: torch.tensor([row for _, rows in sorted(entries) for row in rows], dtype=torch.int64) for port, entries in found.items()}


def _layout(placed: list[_Placed], shape: tuple[int, int]) -> Layout:
    table = Layout.padding(*shape)
    if not placed:
        return table
    _, which, within = _expand([len(p.segment) for p in placed])
    numbers = [
        (
            p.start,
            p.number,
            p.block,
            p.index,
            p.segment.mask.sees_whole,
            p.segment.mask.is_isolated,
            p.clock,
            p.segment.expert,
            p.segment.port_number,
            p.segment.hidden_from,
        )
        for p in placed
    ]
    columns = torch.tensor(numbers).index_select(0, which).unbind(1)
    start, sample, block, index, full, isolated, clock, expert, port, hidden = columns
    at = start + within
    table.sample_id.view(-1).index_copy_(0, at, sample)
    table.block_id.view(-1).index_copy_(0, at, block)
    table.index.view(-1).index_copy_(0, at, index + within)
    table.full.view(-1).index_copy_(0, at, full.bool())
    table.isolated.view(-1).index_copy_(0, at, isolated.bool())
    table.positions.view(-1, 3).index_copy_(0, at, clock[:, None] + torch.cat([offsets_of(p.segment) for p in placed]))
    table.expert_id.view(-1).index_copy_(0, at, expert)
    table.port_number.view(-1).index_copy_(0, at, port)
    table.hidden_from.view(-1).index_copy_(0, at, hidden)
    return table


def _expand(sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Length of each segment (s,); for each token which segment it is of and its place within it (n,)."""
    lengths = torch.tensor(sizes)
    which = torch.repeat_interleave(torch.arange(len(sizes)), lengths)
    within = torch.arange(len(which)) - (lengths.cumsum(0) - lengths).index_select(0, which)
    return lengths, which, within


def _port_rows(placed: list[_Placed]) -> PortRows:
    timed = placed[0].segment.timed  # all of a port's segments are, or none
    lengths, which, within = _expand([len(p.segment) - timed for p in placed])
    outside = not placed[0].segment.in_table
    payloads = [p.segment.payload for p in placed]
    if outside and payloads[0].dim() == 1:
        values = torch.nn.utils.rnn.pad_sequence(payloads, batch_first=True)  # ragged texts for an encoder of their own
    else:
        values = torch.stack(payloads) if payloads[0].dim() == 3 else torch.cat(payloads)
    places = torch.tensor([(p.start, p.first, p.number, p.segment.role == Role.TARGET) for p in placed])
    start, first, _, target = places.index_select(0, which).unbind(1)
    rows = start + timed + within
    return PortRows(
        rows=torch.full_like(rows, -1) if outside else rows,
        previous=torch.where(rows > first, rows - 1, -1),
        values=values,
        target=target.bool(),
        weight=torch.tensor([p.segment.weight for p in placed]).index_select(0, which),
        segment=which,
        timestep_range=torch.tensor([p.segment.timestep_range for p in placed], dtype=torch.float32),
        sample=places[:, 2],
        grids=[p.segment.grid for p in placed],
        scales=[p.segment.scale for p in placed],
        lengths=lengths,
        time_rows=places[:, 0] if timed else None,
    )
