"""Scene -> picture: anti-aliased shapes on a plain background.

A sprite is a pair of masks over a square window: `cover` says how much of a pixel the shape covers, `ink` how much of the shape's colour it
shows there (less than `cover` where a texture darkens it). Painting is `canvas * (1 - cover) + colour * ink`, so a picture is linear in the
colours, which is what lets the reader invert it. Objects are painted in reading order: a later one lies in front.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import ceil

import numpy as np

from stages.data.scenes.world import COLOURS, Level, Scene

Array = np.ndarray

SUBPIXELS = 8  # supersampling along each axis


def _inside(shape: str, u: Array, v: Array) -> Array:
    """Whether a point of the square [-1, 1]^2 belongs to the shape; u runs right, v runs down."""
    radius = np.hypot(u, v)
    arm = 0.36  # half the width of a cross's arm
    return {
        "circle": radius <= 1,
        "square": np.maximum(abs(u), abs(v)) <= 0.96,
        "triangle": (v <= 0.88) & (abs(u) <= (v + 1) / 1.88),
        "cross": (np.minimum(abs(u), abs(v)) <= arm) & (np.maximum(abs(u), abs(v)) <= 1),
        "ring": (radius <= 1) & (radius >= 0.6),
    }[shape]


def _brightness(texture: str, u: Array, v: Array, radius: float) -> Array:
    """How much of its colour a point of the shape shows. The period is in pixels, so that a pattern is visible at every size."""
    x, y = u * radius, v * radius
    dark = {
        "plain": np.zeros_like(x, dtype=bool),
        "striped": (x + y) % 5 < 2.5,
        "dotted": np.hypot((x + 2.5) % 5 - 2.5, (y + 2.5) % 5 - 2.5) < 1.6,
    }[texture]
    return np.where(dark, 0.45, 1.0)


@dataclass(frozen=True)
class Sprite:
    """Masks in [0, 1] over a (window, window) square of pixels, the shape in its middle."""

    cover: Array
    ink: Array


def window(level: Level) -> int:
    """The side of every sprite of a level, in pixels; even, so that it can be centred on a corner of pixels."""
    return 2 * ceil(max(level.radii.values()))


@cache
def sprite(shape: str, texture: str, radius: float, side: int) -> Sprite:
    axis = ((np.arange(side * SUBPIXELS) + 0.5) / SUBPIXELS - side / 2) / radius
    u, v = np.meshgrid(axis, axis)
    inside = _inside(shape, u, v).astype(np.float64)

    def shrink(mask: Array) -> Array:
        return mask.reshape(side, SUBPIXELS, side, SUBPIXELS).mean(axis=(1, 3))

    return Sprite(cover=shrink(inside), ink=shrink(inside * _brightness(texture, u, v, radius)))


def colour_of(name: str) -> Array:
    return np.array(COLOURS[name]) / 255


def corner(level: Level, place: str, offset: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the picture that the sprite of an object covers."""
    (y, x), half = level.centre(place), window(level) // 2
    top, left = y + offset[0] - half, x + offset[1] - half
    return slice(top, top + 2 * half), slice(left, left + 2 * half)


@dataclass(frozen=True)
class Nuisance:
    """All of a picture that its scene does not say."""

    shade: float  # background intensity in [0, 1]
    offsets: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # place -> (y, x) shift in pixels, for every place, used or not
    noise: Array | None = None  # (pixels, pixels, 3), added to intensities


def _visible(scene: Scene, offsets: Mapping[str, tuple[int, int]]) -> Iterable[float]:
    """The part of each object that objects in front of it leave visible."""
    level = scene.row
    hidden = np.zeros((level.pixels, level.pixels))
    for entry in reversed(scene.objects):
        cover = sprite(entry.shape, entry.texture, level.radii[entry.size], window(level)).cover
        at = corner(level, entry.place, offsets[entry.place])
        yield float((cover * (1 - hidden[at])).sum() / cover.sum())
        hidden[at] = 1 - (1 - hidden[at]) * (1 - cover)


def draw_nuisance(scenes: Iterable[Scene], rng: np.random.Generator) -> Nuisance:
    """One nuisance for several scenes of a level (the two sides of an edit), in all of which every object stays visible enough."""
    scenes = list(scenes)
    level = scenes[0].row
    shade = float(rng.uniform(*level.shades))
    noise = level.noise * rng.standard_normal((level.pixels, level.pixels, 3))
    for jitter in [level.jitter] * 100 + list(range(level.jitter, -1, -1)):  # a crowd that never fits is placed less freely
        shifts = rng.integers(-jitter, jitter + 1, (len(level.places), 2)).tolist()
        offsets = {place: (y, x) for place, (y, x) in zip(level.places, shifts, strict=True)}
        if all(part >= level.min_visible - 1e-9 for scene in scenes for part in _visible(scene, offsets)):
            break
    return Nuisance(shade, offsets, noise)


def render(scene: Scene, nuisance: Nuisance) -> Array:
    """The picture of a scene: uint8 (pixels, pixels, 3) RGB. The same arguments give the same bytes."""
    level = scene.row
    canvas = np.full((level.pixels, level.pixels, 3), nuisance.shade)
    for entry in scene.objects:
        masks = sprite(entry.shape, entry.texture, level.radii[entry.size], window(level))
        at = corner(level, entry.place, nuisance.offsets.get(entry.place, (0, 0)))
        canvas[at] = canvas[at] * (1 - masks.cover[..., None]) + colour_of(entry.colour) * masks.ink[..., None]
    if nuisance.noise is not None:
        canvas += nuisance.noise
    return np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)
