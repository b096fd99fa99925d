"""Segments → (t, h, w) positions for the rotary embedding.

A clock runs through each sample. `sequential`: one tick a token. `shared`: a whole attention block stands at the current
tick, then the clock moves on by one (Transfusion's and BAGEL's images). `grid`: (t, h, w) offsets from the current tick,
then as many ticks as the longest side. After an isolated block the clock goes back: what later tokens cannot see takes no time.
"""

from collections.abc import Sequence as Segments
from functools import cache

import torch
from torch import Tensor

from stages.sequence.segment import PositionKind, Segment


@cache
def grid_offsets(grid: tuple[int, ...]) -> Tensor:
    """Int64 (l, 3): the (t, h, w) place of each token of a grid, in raster order; missing leading axes are 0."""
    full = (1,) * (3 - len(grid)) + tuple(grid)
    axes = torch.meshgrid(*[torch.arange(side) for side in full], indexing="ij")
    return torch.stack([axis.reshape(-1) for axis in axes], dim=1)


@cache
def _steps(length: int) -> Tensor:
    return torch.arange(length)[:, None].expand(length, 3)


@cache
def _still(length: int) -> Tensor:
    return torch.zeros(length, 3, dtype=torch.int64)


def offsets_of(segment: Segment) -> Tensor:
    """Int64 (l, 3): positions of a segment's tokens relative to the clock at its start."""
    if segment.positions == PositionKind.SEQUENTIAL:
        return _steps(len(segment))
    if segment.positions == PositionKind.SHARED:
        return _still(len(segment))
    return torch.cat([_still(1), grid_offsets(segment.grid)]) if segment.timed else grid_offsets(segment.grid)


def clocks_of(segments: Segments[Segment], start: int = 0) -> tuple[list[int], int]:
    """The clock at the start of each segment, and after the last one."""
    clock, clocks = start, []
    after: int | None = None  # where the clock goes back to after an isolated block
    for place, segment in enumerate(segments):
        if after is not None and not segment.merge:
            clock, after = after, None
        clock += segment.advance
        clocks.append(clock)
        if segment.mask.is_isolated and after is None:
            after = clock
        if segment.positions == PositionKind.SEQUENTIAL:
            clock += len(segment)
        elif segment.positions == PositionKind.GRID:
            clock += max(segment.grid)
        else:
            following = segments[place + 1] if place + 1 < len(segments) else None
            together = following is not None and following.merge and following.positions == PositionKind.SHARED
            clock += 0 if together else 1  # a merged block shares one tick
    return clocks, clock if after is None else after


def positions_of(segments: Segments[Segment], start: int = 0) -> tuple[list[Tensor], int]:
    """Positions (l, 3) of each segment, and the clock after the last one."""
    clocks, end = clocks_of(segments, start)
    return [clock + offsets_of(segment) for clock, segment in zip(clocks, segments, strict=True)], end
