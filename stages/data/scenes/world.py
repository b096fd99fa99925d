"""What a scene is, and which scenes exist.

A scene is a set of objects on a small grid, at most one object a cell; an object has a shape, a colour, a size and a texture. A level is one
row of `LEVELS`: how many cells, which values each attribute takes, how large the picture is, how freely objects are placed. Nothing in this
package asks for the number of a level, everything reads its row, so a new level is a new row.

Level 0 has 25 states a cell (empty, or 4 shapes x 6 colours) and 25**4 scenes, and asks no question that relates two things; level 1 has
61 states a cell (5 shapes x 2 sizes x 6 colours) and 61**4 = 13,845,841 scenes, of which a model sees a small part. Higher levels have a
3x3 grid, larger pictures, textures, free placement inside a cell, and objects that partly hide each other.

Which split a scene belongs to is a function of the scene alone: `heldout` scenes show a combination of shape and colour that `train` and `val`
never show; of the others a tenth, chosen by hash, is `val`. So no seed and no count can make two splits share a scene.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from stages.errors import DataError

ATTRIBUTES = ("size", "texture", "colour", "shape", "place")  # the order in which a sentence names them
SPLITS = ("train", "val", "heldout")
ONE_LOOK = ("existence", "count", "colour", "shape", "size", "texture", "position")  # questions that one pass over the objects answers
TWO_LOOKS = ("relation", "comparison")  # questions that compare the outcomes of two

# Far apart from each other and from every background, in squared distance over RGB: the reader and a small autoencoder need that more than beauty.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 38, 38),
    "green": (34, 160, 60),
    "blue": (37, 80, 225),
    "yellow": (250, 200, 0),
    "magenta": (200, 30, 200),
    "cyan": (0, 180, 215),
}

PLACES: dict[int, tuple[str, ...]] = {  # cells of a grid in reading order
    2: ("top left", "top right", "bottom left", "bottom right"),
    3: (
        *("top left", "top centre", "top right"),
        *("centre left", "centre", "centre right"),
        *("bottom left", "bottom centre", "bottom right"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Level:
    """One difficulty. Lengths are in pixels, shades and noise in units of the [0, 1] intensity range."""

    number: int
    pixels: int  # the picture is pixels x pixels
    grid: int  # grid x grid cells
    margin: int = 0  # pixels around the grid
    shapes: tuple[str, ...]
    radii: Mapping[str, float]  # size -> radius of the drawn shape
    textures: tuple[str, ...] = ("plain",)
    colours: tuple[str, ...] = tuple(COLOURS)
    max_objects: int
    jitter: int  # how far the centre of an object may be from the centre of its cell, along each axis
    shades: tuple[float, float]  # range of the background
    noise: float  # standard deviation of the intensity noise
    min_visible: float = 1.0  # the least part of an object that nearer objects leave visible
    asks: tuple[str, ...] = ONE_LOOK + TWO_LOOKS  # the types of questions
    held_out: tuple[tuple[str, str], ...]  # (shape, colour) pairs that only the split `heldout` shows

    @property
    def cell(self) -> int:
        return (self.pixels - 2 * self.margin) // self.grid

    @property
    def places(self) -> tuple[str, ...]:
        return PLACES[self.grid]

    @property
    def values(self) -> dict[str, tuple[str, ...]]:
        """Attribute -> the values it takes at this level."""
        return {
            "size": tuple(self.radii),
            "texture": self.textures,
            "colour": self.colours,
            "shape": self.shapes,
            "place": self.places,
        }

    @property
    def named(self) -> tuple[str, ...]:
        """The attributes that a sentence has to name: those with more than one value."""
        return tuple(attribute for attribute in ATTRIBUTES if len(self.values[attribute]) > 1)

    def position(self, place: str) -> tuple[int, int]:
        """(row, column) of a place."""
        return divmod(self.places.index(place), self.grid)

    def centre(self, place: str) -> tuple[int, int]:
        """(y, x) of the centre of a cell, in pixels from the top left corner."""
        row, column = self.position(place)
        return self.margin + row * self.cell + self.cell // 2, self.margin + column * self.cell + self.cell // 2


_SHAPES = ("circle", "square", "triangle", "cross", "ring")
_HELD_OUT = (("triangle", "red"), ("ring", "cyan"))

LEVELS: tuple[Level, ...] = (
    Level(
        number=0,
        pixels=32,
        grid=2,
        shapes=_SHAPES[:4],
        radii={"large": 6.5},
        max_objects=4,
        jitter=0,
        shades=(0.95, 0.95),
        noise=0.004,
        asks=ONE_LOOK,
        held_out=(("triangle", "red"), ("square", "cyan")),
    ),
    Level(
        number=1,
        pixels=32,
        grid=2,
        shapes=_SHAPES,
        radii={"small": 4.5, "large": 6.5},
        max_objects=4,
        jitter=1,
        shades=(0.85, 1.0),
        noise=0.01,
        held_out=_HELD_OUT,
    ),
    Level(
        number=2,
        pixels=48,
        grid=3,
        shapes=_SHAPES,
        radii={"small": 4.5, "large": 6.5},
        max_objects=6,
        jitter=1,
        shades=(0.85, 1.0),
        noise=0.01,
        held_out=_HELD_OUT,
    ),
    Level(
        number=3,
        pixels=64,
        grid=3,
        margin=2,
        shapes=_SHAPES,
        radii={"small": 4.5, "large": 6.5},
        textures=("plain", "striped"),
        max_objects=6,
        jitter=3,
        shades=(0.8, 1.0),
        noise=0.015,
        held_out=_HELD_OUT,
    ),
    Level(
        number=4,
        pixels=96,
        grid=3,
        margin=6,
        shapes=_SHAPES,
        radii={"small": 8.0, "large": 13.0},
        textures=("plain", "striped", "dotted"),
        max_objects=9,
        jitter=7,
        shades=(0.8, 1.0),
        noise=0.015,
        min_visible=0.6,
        held_out=_HELD_OUT,
    ),
)


@dataclass(frozen=True)
class SceneObject:
    size: str
    texture: str
    colour: str
    shape: str
    place: str


@dataclass(frozen=True)
class Scene:
    """A set of objects at different places, kept in reading order. Two scenes are equal when they show the same."""

    level: int
    objects: tuple[SceneObject, ...] = field(default=())

    def __post_init__(self) -> None:
        places = LEVELS[self.level].places
        taken = [entry.place for entry in self.objects]
        if len(set(taken)) != len(taken):
            raise ValueError(f"two objects at one place: {taken}")
        object.__setattr__(self, "objects", tuple(sorted(self.objects, key=lambda entry: places.index(entry.place))))

    @property
    def row(self) -> Level:
        """The row of `LEVELS` this scene lives on."""
        return LEVELS[self.level]

    @cached_property
    def by_place(self) -> dict[str, SceneObject]:
        return {entry.place: entry for entry in self.objects}

    def without(self, place: str) -> "Scene":
        return Scene(self.level, tuple(entry for entry in self.objects if entry.place != place))

    def adding(self, new: SceneObject) -> "Scene":
        return Scene(self.level, (*self.objects, new))

    def to_json(self, offsets: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
        """The scene graph as a JSON object with fixed keys. `offsets` (place -> (y, x), pixels) gives the drawn centres."""
        entries = []
        for entry in self.objects:
            (row, column), (y, x) = self.row.position(entry.place), self.row.centre(entry.place)
            dy, dx = offsets.get(entry.place, (0, 0))
            values = {attribute: getattr(entry, attribute) for attribute in ATTRIBUTES}
            entries.append({**values, "row": row, "column": column, "y": y + dy, "x": x + dx})
        return {"level": self.level, "count": len(entries), "objects": entries}

    @staticmethod
    def from_json(graph: Mapping[str, Any]) -> "Scene":
        """Inverse of `to_json`, up to the drawn centres, which are not part of what a scene says. DataError where it is no scene."""
        level = graph.get("level") if isinstance(graph, Mapping) else None
        if type(level) is not int or not 0 <= level < len(LEVELS):
            raise DataError(f"not a scene: level {level!r:.40}, expected 0 to {len(LEVELS) - 1}")
        entries, known = graph.get("objects"), {**LEVELS[level].values, "place": LEVELS[level].places}
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise DataError("not a scene: expected a list of objects")
        for entry in entries:
            for attribute in ATTRIBUTES:
                if entry.get(attribute) not in known[attribute]:
                    raise DataError(f"not a scene of level {level}: an object with the {attribute} {entry.get(attribute)!r:.40}")
        try:
            return Scene(level, tuple(SceneObject(*(entry[attribute] for attribute in ATTRIBUTES)) for entry in entries))
        except ValueError as error:
            raise DataError(f"not a scene: {error}") from None


def split_of(scene: Scene) -> str:
    """The one split whose samples may show this scene."""
    if any((entry.shape, entry.colour) in scene.row.held_out for entry in scene.objects):
        return "heldout"
    text = json.dumps([[getattr(entry, attribute) for attribute in ATTRIBUTES] for entry in scene.objects])
    return "val" if hashlib.sha256(text.encode()).digest()[0] < 26 else "train"  # 26 of 256 is a tenth


def generator_for(*address: object) -> np.random.Generator:
    """A generator that depends on the address alone: the same bytes on every machine, in every order of calls."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(address).encode()).digest(), "big"))


def draw_scene(level: Level, split: str, rng: np.random.Generator) -> Scene:
    """A random scene of a split: the number of objects is uniform on 1..max_objects, whatever the split.

    The objects of a scene share a palette of 1..all shapes and 1..all colours. Without it nearly all objects of a scene would differ, and "how
    many circles" would nearly always be answered by "one".
    """
    count = int(rng.integers(1, level.max_objects + 1))
    while True:
        palette = {
            attribute: rng.permutation(values)[: rng.integers(1, len(values) + 1)] if attribute in ("shape", "colour") else np.array(values)
            for attribute, values in level.values.items()
        }
        palette["place"] = rng.permutation(level.places)[:count]
        objects = []
        for place in palette["place"]:
            drawn = {attribute: str(rng.choice(palette[attribute])) for attribute in ATTRIBUTES[:-1]}
            objects.append(SceneObject(**drawn, place=str(place)))
        scene = Scene(level.number, tuple(objects))
        if split_of(scene) == split:
            return scene
