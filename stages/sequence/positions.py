"""Segments → (t, h, w) positions for the rotary embedding.

A clock runs through each sample. `sequential`: one tick a token. `shared`: a whole attention block stands at the current
tick, then the clock moves on by one (Transfusion's and BAGEL's images). `grid`: (t, h, w) offsets from the current tick,
then as many ticks as the longest side. Isolated segments take no time: what later tokens cannot see does not move the clock.
"""

from collections.abc import Sequence as Segments

import torch
from torch import Tensor

from stages.sequence.segment import MaskKind, PositionKind, Segment


def grid_offsets(grid: tuple[int, ...]) -> Tensor:
    """Int64 (l, 3): the (t, h, w) place of each token of a grid, in raster order; missing leading axes are 0."""
    full = (1,) * (3 - len(grid)) + tuple(grid)
    axes = torch.meshgrid(*[torch.arange(side) for side in full], indexing="ij")
    return torch.stack([axis.reshape(-1) for axis in axes], dim=1)


def positions_of(segments: Segments[Segment], start: int = 0) -> tuple[list[Tensor], int]:
    """Positions (l, 3) of each segment, and the clock after the last one."""
    clock, placed, held = start, [], False
    for place, segment in enumerate(segments):
        clock += segment.advance
        length = len(segment)
        following = segments[place + 1] if place + 1 < len(segments) else None
        if segment.positions == PositionKind.SEQUENTIAL:
            ticks = clock + torch.arange(length)
            placed.append(ticks[:, None].expand(length, 3))
            moves = length
        elif segment.positions == PositionKind.SHARED:
            placed.append(torch.full((length, 3), clock))
            held = following is not None and following.merge and following.positions == PositionKind.SHARED
            moves = 0 if held else 1
        else:
            placed.append(clock + grid_offsets(segment.grid))
            moves = max(segment.grid)
        if segment.mask != MaskKind.ISOLATED:
            clock += moves
    return placed, clock
