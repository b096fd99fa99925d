"""Picture -> scene, by search over everything the renderer can draw. Nothing here is learned.

For one cell, given what the other cells are believed to show, a picture that holds sprite (cover a, ink m) in colour c is

    front + open * ((1 - a) * behind + m * c)            front, open: the objects painted later; behind: those painted earlier

which is linear in c. So the squared error of every (shape, size, texture, colour, shift) at once is a handful of matrix products over the
sprites, never over rendered pictures. A cell is read again when a neighbour that can overlap it changed, until nothing changes; where sprites
cannot leave their cell (levels 0-3) once is enough, and picture and sprites are both smoothed by a 3x3 box first, which is exact there and
makes errors that noise and blur leave small, and errors that a wrong object leaves stand out.

A reading is believed only if it is good and nothing else is nearly as good: a cell is valid when its mean squared error is at most
`MAX_RESIDUAL` and at most `MAX_RATIO` times that of the second-best state (the first rule alone would accept half-drawn mixtures of two states),
and the picture drawn anew from the reading, not smoothed, differs by at most `MAX_ROUGHNESS` there (which pure noise does not).

Clean pictures are read exactly at every level. Of damaged ones, percent of cells read right / accepted (300, 300, 120, 80, 25 pictures, stored in
8 bits; `tests/data/scenes/test_scene_reader.py` measures and holds them; noise is Gaussian, in units of the [0, 1] range). Of the cells that were
accepted 100 % were right in every column. The last column: even cross-fades of two different states that were accepted; what is left at level 0
are mixtures that look like a third state, as red over blue looks magenta.

    level   3x3 box blur   twice       noise 0.1   noise 0.2   noise 0.3   noise 0.5   cross-fades
    0       100 / 100      100 / 100   100 / 100   100 / 100   100 / 81     98 / 0     1.5
    1       100 / 100      100 / 100   100 / 100   100 / 89     99 / 38     63 / 0     0.3
    2       100 / 100      100 / 100   100 / 100   100 / 92     99 / 36     50 / 0     0.2
    3       100 / 98        98 / 88    100 / 99    100 / 71     98 / 2      29 / 0     0.2
    4        99 / 66        87 / 57    100 / 54    100 / 0     100 / 0      99 / 0     0.0
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from stages.data.scenes.render import Array, Nuisance, colour_of, render, sprite, window
from stages.data.scenes.world import LEVELS, Level, Scene, SceneObject

MAX_RESIDUAL = 0.02  # mean squared error per value, intensities in [0, 1]
MAX_RATIO = 0.5  # best to second-best
MAX_ROUGHNESS = 0.06  # mean squared error per value, before smoothing
MAX_TURNS = 8  # readings of a cell, on average


@dataclass(frozen=True)
class CellReading:
    """What one cell shows. `confidence` is 1 - best error / second-best error: 0 for an even mixture, near 1 for a clean picture."""

    place: str
    residual: float
    confidence: float
    valid: bool


@dataclass(frozen=True)
class Reading:
    """The scene a picture shows best; `valid` is false when some cell is not believable (invalid counts as wrong in every score)."""

    scene: Scene
    valid: bool
    cells: tuple[CellReading, ...]

    @property
    def believed(self) -> Scene:
        """The scene without the objects of cells that are not believable: what to score object by object."""
        valid = {cell.place for cell in self.cells if cell.valid}
        return Scene(self.scene.level, tuple(entry for entry in self.scene.objects if entry.place in valid))


@dataclass(frozen=True)
class _State:
    """A believed object: which sprite and colour, how far from the centre of its cell, in pixels."""

    sprite: int
    colour: int
    offset: tuple[int, int]


@dataclass(frozen=True)
class _Bank:
    """All sprites of a level as matrices with one column each, and the geometry of the search for them."""

    states: tuple[tuple[str, str, str], ...]  # (size, texture, shape)
    cover: Array  # (pixels of a window, states)
    ink: Array
    cover2: Array  # cover^2
    cover_ink: Array  # cover * ink
    ink2: Array  # ink^2
    colours: Array  # (colours, 3)
    side: int  # of a window
    search: int  # shifts to try along each axis
    smooth: bool
    neighbours: Mapping[str, tuple[str, ...]]  # place -> the places whose objects can overlap its object

    @property
    def reach(self) -> int:
        """How far from the centre of its cell a window can extend; pictures are padded by as much."""
        return self.side // 2 + self.search


@cache
def _bank(number: int) -> _Bank:
    level = LEVELS[number]
    search = max(1, level.jitter)  # at least 1: a model that draws one pixel off has drawn the right thing
    extent = window(level) + 2 * search  # an object never shows outside a square of this side around the centre of its cell
    neighbours = {
        place: tuple(
            other for other in level.places if other != place and max(abs(np.subtract(level.centre(place), level.centre(other)))) < extent
        )
        for place in level.places
    }
    smooth = not any(neighbours.values())
    side = window(level) + 2 * smooth
    states = tuple((size, texture, shape) for size in level.radii for texture in level.textures for shape in level.shapes)
    sprites = [sprite(shape, texture, level.radii[size], side) for size, texture, shape in states]
    cover = np.stack([entry.cover for entry in sprites], axis=2)
    ink = np.stack([entry.ink for entry in sprites], axis=2)
    if smooth:
        cover, ink = box_blur(cover), box_blur(ink)
    cover, ink = (masks.reshape(side * side, len(states)).astype(np.float32) for masks in (cover, ink))
    colours = np.stack([colour_of(name) for name in level.colours]).astype(np.float32)
    return _Bank(states, cover, ink, cover**2, cover * ink, ink**2, colours, side, search, smooth, neighbours)


def box_blur(image: Array) -> Array:
    """Mean over 3x3 pixels of (H, W, channels); the border repeats."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9


def background_shade(image: Array) -> float:
    """The background intensity of a picture in [0, 1]: the median of its outermost pixels, which objects rarely reach."""
    border = np.concatenate([image[0].ravel(), image[-1].ravel(), image[:, 0].ravel(), image[:, -1].ravel()])
    return float(np.median(border))


def _around(level: Level, place: str, padding: int, reach: int) -> tuple[slice, slice]:
    """Rows and columns within `reach` of the centre of a cell, in a picture with so much padding."""
    y, x = (coordinate + padding for coordinate in level.centre(place))
    return slice(y - reach, y + reach), slice(x - reach, x + reach)


def _errors(image: Array, level: Level, place: str, believed: Mapping[str, _State], shade: float) -> tuple[Array, float, int]:
    """Squared errors over the surroundings of a cell, of every state it may have, with everything else as believed.

    image: the padded picture. Returns the errors (shifts, sprites, colours), the error of an empty cell, and how many values were compared.
    """
    bank = _bank(level.number)
    behind = np.full(image.shape, shade, np.float32)
    front, opening = np.zeros_like(image), np.ones((*image.shape[:2], 1), np.float32)
    for other in bank.neighbours[place]:  # in painting order
        if (state := believed.get(other)) is None:
            continue
        y, x = np.add(level.centre(other), state.offset) + bank.reach - bank.side // 2
        at = slice(y, y + bank.side), slice(x, x + bank.side)
        clear = 1 - bank.cover[:, state.sprite].reshape(bank.side, bank.side, 1)
        light = bank.ink[:, state.sprite].reshape(bank.side, bank.side, 1) * bank.colours[state.colour]
        if level.places.index(other) < level.places.index(place):
            behind[at] = behind[at] * clear + light
        else:
            front[at] = front[at] * clear + light
            opening[at] *= clear

    # smoothing spreads a neighbour's edge one pixel into this cell: that pixel is not compared
    half = level.cell // 2 - 1 if bank.smooth else bank.reach
    compared, searched = _around(level, place, bank.reach, half), _around(level, place, bank.reach, max(half, bank.reach))
    weight = np.zeros((*image.shape[:2], 1), np.float32)
    weight[compared] = 1
    opening, behind = weight * opening, weight * opening * behind
    missing = weight * (image - front) - behind  # what is left to explain if the cell is empty
    empty = float((missing[compared] ** 2).sum())

    # error = |missing + a * behind - m * open * c|^2, expanded; each product with a sprite is a correlation over all shifts at once
    missing, behind, opening = missing[searched], behind[searched], opening[searched]
    maps = np.concatenate(
        [
            (missing * behind).sum(axis=2, keepdims=True),
            (behind**2).sum(axis=2, keepdims=True),
            opening**2,
            missing * opening,
            behind * opening,
        ],
        axis=2,
    )
    shifts = (2 * bank.search + 1) ** 2
    patches = sliding_window_view(maps, (bank.side, bank.side), axis=(0, 1)).reshape(shifts, maps.shape[2], -1)
    fixed = 2 * patches[:, 0] @ bank.cover + patches[:, 1] @ bank.cover2  # (shifts, sprites)
    square = patches[:, 2] @ bank.ink2
    linear = patches[:, 3:6] @ bank.ink + patches[:, 6:9] @ bank.cover_ink  # (shifts, 3, sprites)
    brightness = (bank.colours**2).sum(axis=1)
    change = fixed[..., None] + square[..., None] * brightness - 2 * linear.swapaxes(1, 2) @ bank.colours.T
    return empty + change, empty, image[compared].size


def read_scene(image: Array, level: int) -> Reading:
    """The scene a picture shows.

    image: uint8 (pixels, pixels, 3) RGB of the level's size; anything else is a ValueError.
    """
    row, bank = LEVELS[level], _bank(level)
    if image.shape != (row.pixels, row.pixels, 3) or image.dtype != np.uint8:
        raise ValueError(f"level {level} pictures are uint8 ({row.pixels}, {row.pixels}, 3), found {image.dtype} {image.shape}")
    values = image.astype(np.float32) / 255
    shade = background_shade(values)
    border = (bank.reach, bank.reach)
    padded = np.pad(values, (border, border, (0, 0)), constant_values=shade)
    if bank.smooth:
        padded = box_blur(padded)

    believed: dict[str, _State] = {}
    cells: dict[str, CellReading] = {}
    waiting = list(row.places)  # the last one is in front of all others: it is read first
    for _ in range(MAX_TURNS * len(row.places)):
        if not waiting:
            break
        place = waiting.pop()
        errors, empty, size = _errors(padded, row, place, believed, shade)
        by_state = np.append(errors.min(axis=0).ravel(), empty)  # the empty cell comes last
        best, second = np.maximum(np.partition(by_state, 1)[:2], 1e-9)
        residual, ratio = float(best) / size, float(best / second)
        cells[place] = CellReading(place, residual, 1 - ratio, residual <= MAX_RESIDUAL and ratio <= MAX_RATIO)

        before = believed.pop(place, None)
        choice = int(by_state.argmin())
        if choice < by_state.size - 1:
            sprite_index, colour_index = divmod(choice, len(row.colours))
            dy, dx = divmod(int(errors[:, sprite_index, colour_index].argmin()), 2 * bank.search + 1)
            believed[place] = _State(sprite_index, colour_index, (dy - bank.search, dx - bank.search))
        if believed.get(place) != before:
            again = [other for other in bank.neighbours[place] if other not in waiting]
            waiting = sorted([*waiting, *again], key=row.places.index)

    objects = []
    for place, state in believed.items():
        size_name, texture, shape = bank.states[state.sprite]
        objects.append(SceneObject(size_name, texture, row.colours[state.colour], shape, place))
    scene = Scene(level, tuple(objects))
    drawn = render(scene, Nuisance(shade, {place: state.offset for place, state in believed.items()}))
    squared = (values - drawn.astype(np.float32) / 255) ** 2
    ordered = []
    for place in row.places:
        rough = float(squared[_around(row, place, 0, row.cell // 2)].mean()) > MAX_ROUGHNESS
        ordered.append(replace(cells[place], valid=cells[place].valid and not rough))
    return Reading(scene, all(cell.valid for cell in ordered), tuple(ordered))
