"""What can be said about a scene, and what it means exactly.

    sentence   = "nothing" | ["a picture of "] listing | "there is|are " statement
    listing    = phrase {(", " | " and ") phrase}                    exactly these objects, nothing else
    phrase     = noun phrase, its place before or after: "a red circle top left", "top left a red circle", "two blue squares"
    statement  = phrase                                              at least these ("there is a red circle", "there are two rings")
               | "no" noun | "exactly" number noun                   just so many
               | phrase relation phrase                              "there is a circle left of a red square"
               | phrase "and" phrase "of the same" attribute         "there are a circle and a ring of the same colour"

A sentence of this grammar has one meaning, the set of scenes it is true of: `parse_caption` gives it, `meaning.holds(scene)` decides
membership. A listing that names every attribute has exactly one scene: `described_scene`. Left and right compare columns, above and below rows.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Protocol

import numpy as np

from stages.data.scenes.world import ATTRIBUTES, LEVELS, PLACES, Level, Scene, SceneObject

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = {
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (-1, 0),
    "below": (1, 0),
}  # (rows, columns) from the second to the first object


@dataclass(frozen=True)
class Pattern:
    """A description of an object: the attributes it names. The empty string leaves an attribute open."""

    size: str = ""
    texture: str = ""
    colour: str = ""
    shape: str = ""
    place: str = ""

    def matches(self, entry: SceneObject) -> bool:
        return all(getattr(self, attribute) in ("", getattr(entry, attribute)) for attribute in ATTRIBUTES)

    def among(self, scene: Scene) -> list[SceneObject]:
        return [entry for entry in scene.objects if self.matches(entry)]

    def words(self, number: int = 1) -> str:
        """The noun phrase without article and place."""
        noun = self.shape or "object"
        return " ".join(word for word in (self.size, self.texture, self.colour, noun if number == 1 else plural(noun)) if word)

    def the(self) -> str:
        return " ".join(word for word in ("the", self.words(), self.place) if word)

    def an(self, number: int = 1) -> str:
        return " ".join(word for word in ("a" if number == 1 else NUMBERS[number], self.words(number), self.place) if word)


def pattern_of(entry: SceneObject, attributes: Sequence[str]) -> Pattern:
    """The description of an object that names just these attributes."""
    return Pattern(**{attribute: getattr(entry, attribute) for attribute in attributes})


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def related(first: SceneObject, relation: str, second: SceneObject, level: Level) -> bool:
    rows, columns = RELATIONS[relation]
    (row, column), (other_row, other_column) = level.position(first.place), level.position(second.place)
    return (row - other_row) * rows + (column - other_column) * columns > 0


class Meaning(Protocol):
    """The set of scenes a sentence is true of."""

    def holds(self, scene: Scene) -> bool: ...


@dataclass(frozen=True)
class Listing:
    """These objects, and (if `only`) no others: the patterns can be given to different objects."""

    patterns: tuple[Pattern, ...]
    only: bool

    def holds(self, scene: Scene) -> bool:
        if len(self.patterns) > len(scene.objects) or (self.only and len(self.patterns) < len(scene.objects)):
            return False
        owner: dict[int, int] = {}  # object -> pattern: a bipartite matching grown by augmenting paths

        def place(index: int, seen: set[int]) -> bool:
            for candidate, entry in enumerate(scene.objects):
                if candidate not in seen and self.patterns[index].matches(entry):
                    seen.add(candidate)
                    if candidate not in owner or place(owner[candidate], seen):
                        owner[candidate] = index
                        return True
            return False

        return all(place(index, set()) for index in range(len(self.patterns)))


@dataclass(frozen=True)
class Counted:
    """Exactly so many objects match."""

    pattern: Pattern
    number: int

    def holds(self, scene: Scene) -> bool:
        return len(self.pattern.among(scene)) == self.number


@dataclass(frozen=True)
class Related:
    """Two objects match and stand in a relation."""

    first: Pattern
    relation: str
    second: Pattern

    def holds(self, scene: Scene) -> bool:
        pairs = ((a, b) for a in self.first.among(scene) for b in self.second.among(scene))
        return any(related(a, self.relation, b, scene.row) for a, b in pairs)


@dataclass(frozen=True)
class Alike:
    """Two different objects match and share the value of an attribute."""

    first: Pattern
    second: Pattern
    attribute: str

    def holds(self, scene: Scene) -> bool:
        pairs = ((a, b) for a in self.first.among(scene) for b in self.second.among(scene))
        return any(a != b and getattr(a, self.attribute) == getattr(b, self.attribute) for a, b in pairs)


# --- parsing ----------------------------------------------------------------------------------------------------------------------


def _words(attribute: str) -> str:
    """A regular expression of the values an attribute has at some level, the longest first."""
    if attribute == "place":
        values = {place for grid in PLACES.values() for place in grid}
    else:
        values = {value for level in LEVELS for value in level.values[attribute]}
    return "|".join(sorted(values, key=lambda value: (-len(value), value)))


_PLURALS = {plural(noun): noun for noun in (*_words("shape").split("|"), "object")}
_NOUNS = "|".join((*_PLURALS, *_PLURALS.values()))
_KIND = rf"(?:(?P<size>{_words('size')}) )?(?:(?P<texture>{_words('texture')}) )?(?:(?P<colour>{_words('colour')}) )?(?P<noun>{_NOUNS})"
_PLACE = _words("place")
_PHRASE = re.compile(rf"(?:(?P<before>{_PLACE}) )?(?P<number>a|the|{'|'.join(NUMBERS[2:])}) {_KIND}(?: (?P<after>{_PLACE}))?")
_COUNT = re.compile(rf"(?P<number>no|exactly (?:{'|'.join(NUMBERS[1:])})) {_KIND}")
_PLAIN = re.compile(_KIND)


def normalise(text: str) -> str:
    """Lower case, single spaces, no final full stop."""
    return re.sub(r"\s*,\s*", ", ", " ".join(text.lower().split())).removesuffix(".").strip()


def _pattern(match: re.Match[str], number: int, place: str = "") -> Pattern | None:
    """The pattern of a matched noun phrase; None if its noun does not agree with its number."""
    groups, noun = match.groupdict(), match["noun"]
    if (noun in _PLURALS) != (number != 1):
        return None
    shape = _PLURALS.get(noun, noun)
    return Pattern(groups["size"] or "", groups["texture"] or "", groups["colour"] or "", "" if shape == "object" else shape, place)


def parse_kind(text: str, *, number: int = 1) -> Pattern | None:
    """`large red circle`, or `large red circles` for a number other than 1: no article, no place."""
    match = _PLAIN.fullmatch(text)
    return _pattern(match, number) if match else None


def parse_phrase(text: str, *, article: str = "a") -> tuple[Pattern, int] | None:
    """(pattern, number) of a noun phrase with article or number and at most one place; `article` is the one that stands for 1."""
    match = _PHRASE.fullmatch(text)
    if match is None or (match["before"] and match["after"]) or match["number"] == {"a": "the", "the": "a"}[article]:
        return None
    number = 1 if match["number"] == article else NUMBERS.index(match["number"])
    pattern = _pattern(match, number, match["before"] or match["after"] or "")
    return (pattern, number) if pattern else None


def _parse_listing(text: str, *, only: bool) -> Meaning | None:
    patterns: list[Pattern] = []
    for part in re.split(r", | and ", text):
        phrase = parse_phrase(part)
        if phrase is None:
            return None
        patterns += [phrase[0]] * phrase[1]
    return Listing(tuple(patterns), only)


def _parse_pair(first: str, second: str) -> tuple[Pattern, Pattern] | None:
    a, b = parse_phrase(first), parse_phrase(second)
    return (a[0], b[0]) if a and b and a[1] == b[1] == 1 else None


def _parse_statement(text: str) -> Meaning | None:
    if match := _COUNT.fullmatch(text):
        word = match["number"].removeprefix("exactly ")
        number = 0 if word == "no" else NUMBERS.index(word)
        pattern = parse_kind(text.removeprefix(match["number"] + " "), number=number or 1)
        return Counted(pattern, number) if pattern else None
    if match := re.fullmatch(rf"(.+) and (.+) of the same ({'|'.join(ATTRIBUTES[:-1])})", text):
        pair = _parse_pair(match[1], match[2])
        return Alike(*pair, match[3]) if pair else None
    if match := re.fullmatch(rf"(.+) ({'|'.join(RELATIONS)}) (.+)", text):
        pair = _parse_pair(match[1], match[3])
        return Related(pair[0], match[2], pair[1]) if pair else None
    return _parse_listing(text, only=False)


def parse_caption(text: str) -> Meaning | None:
    """The meaning of a sentence, or None if it is not a sentence of the grammar (which counts as wrong)."""
    text = normalise(text).removeprefix("a picture of ")
    if text == "nothing":
        return Listing((), only=True)
    if match := re.fullmatch(r"there (?:is|are) (.+)", text):
        return _parse_statement(match[1])
    return _parse_listing(text, only=True)


def satisfied(meaning: Meaning | None, scene: Scene) -> bool:
    """Whether a sentence is true of a scene; no sentence is not."""
    return meaning is not None and meaning.holds(scene)


def described_scene(meaning: Meaning | None, level: int) -> Scene | None:
    """The only scene of a level that a sentence is true of, or None if it is true of none or of several by what it leaves unsaid.

    An attribute with one value at this level need not be said.
    """
    if not isinstance(meaning, Listing) or not meaning.only:
        return None
    values = LEVELS[level].values
    objects = []
    for pattern in meaning.patterns:
        said = {attribute: getattr(pattern, attribute) for attribute in ATTRIBUTES}
        full = {attribute: said[attribute] or (values[attribute][0] if len(values[attribute]) == 1 else "") for attribute in ATTRIBUTES}
        if any(full[attribute] not in values[attribute] for attribute in ATTRIBUTES):
            return None
        objects.append(SceneObject(**full))
    if len({entry.place for entry in objects}) < len(objects):
        return None
    return Scene(level, tuple(objects))


# --- speaking ---------------------------------------------------------------------------------------------------------------------


def caption(scene: Scene) -> str:
    """The full description in reading order: "a red circle top left, a blue square bottom right", or "nothing"."""
    return ", ".join(pattern_of(entry, scene.row.named).an() for entry in scene.objects) or "nothing"


def _tally(scene: Scene, attributes: Sequence[str], rng: np.random.Generator) -> str:
    """A listing of the whole scene by some attributes, equal phrases counted: "two red circles and a blue square"."""
    numbers: dict[Pattern, int] = {}
    for entry in scene.objects:
        pattern = pattern_of(entry, attributes)
        numbers[pattern] = numbers.get(pattern, 0) + 1
    phrases = [pattern.an(number) for pattern, number in numbers.items()]
    return _joined([phrases[i] for i in rng.permutation(len(phrases))])


def _joined(phrases: Sequence[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def paraphrases(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Full descriptions in other words and orders; each has this scene as its only meaning."""
    if not scene.objects:
        return ["nothing", "a picture of nothing"]
    patterns = [pattern_of(scene.objects[i], scene.row.named) for i in rng.permutation(len(scene.objects))]
    after = [pattern.an() for pattern in patterns]
    before = [f"{pattern.place} {pattern.an().removesuffix(' ' + pattern.place)}" for pattern in patterns]
    return [", ".join(after), _joined(before), "a picture of " + _joined(after)]


def partial_captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """True sentences that leave something open. None of them names a combination of shape and colour that the scene does not show."""
    if not scene.objects:
        return ["there is no object"]
    attributes = [attribute for attribute in scene.row.named if attribute != "place"]
    entries = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    shape = str(rng.choice(scene.row.shapes))
    number = len(Pattern(shape=shape).among(scene))
    count = f"exactly {NUMBERS[number]}" if number else "no"
    sentences = [
        _tally(scene, attributes, rng),
        _tally(scene, ("shape",), rng),
        f"there is {pattern_of(entries[0], attributes).an()}",
        f"there {'is' if number < 2 else 'are'} {count} {Pattern(shape=shape).words(number or 1)}",
    ]
    pairs = list(permutations(entries, 2))
    holding = [(a, relation, b) for a, b in pairs for relation in RELATIONS if related(a, relation, b, scene.row)]
    if holding:
        a, relation, b = holding[rng.integers(len(holding))]
        first, second = (pattern_of(entry, ("colour", "shape")) for entry in (a, b))
        sentences.append(f"there is {first.an()} {relation} {second.an()}")
    alike = [(a, b, attribute) for a, b in pairs for attribute in ("colour", "size") if getattr(a, attribute) == getattr(b, attribute)]
    alike = [(a, b, attribute) for a, b, attribute in alike if attribute in attributes and a.shape != b.shape]
    if alike:
        a, b, attribute = alike[rng.integers(len(alike))]
        sentences.append(f"there are a {a.shape} and a {b.shape} of the same {attribute}")
    return sentences
