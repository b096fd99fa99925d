"""Rows of several pictures → each picture as a whole, and back: for parts that mix the tokens of one picture."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Grid = tuple[int, ...]


def through_pictures(rows: Tensor, grids: Sequence[Grid], part: Callable[[Tensor, Grid, list[int]], Tensor]) -> Tensor:
    """rows (n, d), picture after picture, with the grid of each → (n, e).

    part: (s, l, d) of the s pictures that have one grid, that grid, and which pictures they are → (s, l, e).
    """
    pieces = rows.split([math.prod(grid) for grid in grids])
    done: dict[int, Tensor] = {}
    for grid in dict.fromkeys(grids):
        numbers = [number for number, other in enumerate(grids) if other == grid]
        done.update(zip(numbers, part(torch.stack([pieces[number] for number in numbers]), grid, numbers), strict=True))
    return torch.cat([done[number] for number in range(len(grids))])


def as_maps(tokens: Tensor, grid: Grid) -> Tensor:
    """(s, h·w, d) → (s, d, h, w)."""
    return tokens.unflatten(1, grid).movedim(-1, 1)


def as_tokens(maps: Tensor) -> Tensor:
    """(s, d, h, w) → (s, h·w, d)."""
    return maps.flatten(2).transpose(1, 2)


def first_of_each(values: Tensor, grids: Sequence[Grid]) -> Tensor:
    """The value of each picture's first token: (n,) → (s,)."""
    sizes = torch.tensor([math.prod(grid) for grid in grids], device=values.device)
    return values.index_select(0, sizes.cumsum(0) - sizes)
