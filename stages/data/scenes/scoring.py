"""How far a scene that was read agrees with the one that was meant, object by object.

`compare` scores one picture against its scene; `CATEGORIES` are those of GenEval (arXiv:2310.11513): each says which prompts it is about and
what has to be right for one of them to count. GenEval asks detectors, here the reader answers exactly. An invalid reading counts as wrong: pass
a scene without objects for it.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from stages.data.scenes.language import RELATIONS, related
from stages.data.scenes.world import ATTRIBUTES, Scene, SceneObject


@dataclass(frozen=True)
class ObjectScore:
    """One object that was meant: whether something is at its place, and which of its attributes that something has."""

    place: str
    found: bool
    size: bool
    texture: bool
    colour: bool
    shape: bool

    @property
    def right(self) -> bool:
        return self.size and self.texture and self.colour and self.shape


@dataclass(frozen=True)
class Comparison:
    """Scores of one picture. Sum the counts over pictures before dividing: precision = right / drawn, recall = right / meant."""

    objects: tuple[ObjectScore, ...]
    meant: int
    drawn: int
    right: int  # objects right in every attribute and in place
    anywhere: int  # objects right in every attribute, wherever they are
    exact: bool  # the scenes are equal


def compare(meant: Scene, drawn: Scene) -> Comparison:
    """Object by object agreement of two scenes of one level."""
    scores = []
    for entry in meant.objects:
        there = drawn.by_place.get(entry.place)
        same = {attribute: getattr(there, attribute, "") == getattr(entry, attribute) for attribute in ATTRIBUTES[:-1]}
        scores.append(ObjectScore(place=entry.place, found=there is not None, **same))

    def kinds(scene: Scene) -> Counter[tuple[str, ...]]:
        return Counter(tuple(getattr(entry, attribute) for attribute in ATTRIBUTES[:-1]) for entry in scene.objects)

    return Comparison(
        objects=tuple(scores),
        meant=len(meant.objects),
        drawn=len(drawn.objects),
        right=sum(score.right for score in scores),
        anywhere=(kinds(meant) & kinds(drawn)).total(),
        exact=meant == drawn,
    )


@dataclass(frozen=True)
class Category:
    """Which scenes, used as prompts, a category is about, and whether a picture read as `drawn` satisfies it."""

    applies: Callable[[Scene], bool]
    satisfied: Callable[[Scene, Scene], bool]


def _shapes(scene: Scene) -> Counter[str]:
    return Counter(entry.shape for entry in scene.objects)


def _colours(scene: Scene) -> set[tuple[str, str]]:
    return {(entry.shape, entry.colour) for entry in scene.objects}


def _is_pair(scene: Scene) -> bool:
    return len(scene.objects) == 2 and len(_shapes(scene)) == 2


def _relations(first: SceneObject, second: SceneObject, scene: Scene) -> set[str]:
    return {relation for relation in RELATIONS if related(first, relation, second, scene.row)}


def _positions_kept(meant: Scene, drawn: Scene) -> bool:
    """Some two drawn objects of the two shapes stand as the meant ones do."""
    first, second = meant.objects
    wanted = _relations(first, second, meant)
    pairs = ((a, b) for a in drawn.objects for b in drawn.objects if (a.shape, b.shape) == (first.shape, second.shape))
    return any(wanted <= _relations(a, b, drawn) for a, b in pairs)


CATEGORIES: dict[str, Category] = {
    "one-object": Category(lambda scene: len(scene.objects) == 1, lambda meant, drawn: _shapes(meant) <= _shapes(drawn)),
    "two-objects": Category(_is_pair, lambda meant, drawn: _shapes(meant) <= _shapes(drawn)),
    "counting": Category(
        lambda scene: len(scene.objects) > 1 and len(_shapes(scene)) == 1,
        lambda meant, drawn: all(_shapes(drawn)[shape] == number for shape, number in _shapes(meant).items()),
    ),
    "colours": Category(lambda scene: len(scene.objects) == 1, lambda meant, drawn: _colours(meant) <= _colours(drawn)),
    "position": Category(_is_pair, _positions_kept),
    "colour-attribution": Category(
        lambda scene: _is_pair(scene) and scene.objects[0].colour != scene.objects[1].colour,
        lambda meant, drawn: _colours(meant) <= _colours(drawn),
    ),
}


def categories(scene: Scene) -> list[str]:
    """The categories a scene, used as a prompt, is an instance of; scenes with many different objects are of none."""
    return [name for name, category in CATEGORIES.items() if category.applies(scene)]


def judge(category: str, meant: Scene, drawn: Scene) -> bool:
    """Whether a picture read as `drawn` satisfies a prompt of this category."""
    return CATEGORIES[category].satisfied(meant, drawn)
