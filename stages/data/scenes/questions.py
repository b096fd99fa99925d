"""Questions about a scene, and their exact answers.

Every kind of question is a template with a parser (`answer` takes any question of these forms and any scene) and a way to be asked. Questions
are asked so that knowing only the question, or only the kind of question, helps as little as possible: of a yes-no question the answer is drawn
first, and a form of question is used only if the scene has an instance for each answer; attributes are uniform by the symmetry of the world.
"""

import re
from collections.abc import Callable, Iterator
from itertools import combinations, permutations
from typing import TypeVar

import numpy as np

from stages.data.scenes.language import NUMBERS, RELATIONS, Pattern, normalise, parse_kind, parse_phrase, pattern_of, related
from stages.data.scenes.world import LEVELS, Level, Scene, SceneObject, split_of

Ask = Callable[[Scene, np.random.Generator], tuple[str, str] | None]
T = TypeVar("T")


def _pick(choices: list[T], rng: np.random.Generator) -> T | None:
    return choices[rng.integers(len(choices))] if choices else None


def _pick_balanced(yes: list[T], no: list[T], rng: np.random.Generator) -> tuple[T, str] | None:
    """An instance and its answer, both answers equally likely; None where one of them is impossible."""
    if not yes or not no:
        return None
    return (yes[rng.integers(len(yes))], "yes") if rng.integers(2) else (no[rng.integers(len(no))], "no")


def unique_patterns(scene: Scene, entry: SceneObject, hidden: tuple[str, ...] = ()) -> list[Pattern]:
    """The shortest descriptions that fit this object of the scene and no other, without naming the `hidden` attributes."""
    usable = [attribute for attribute in scene.row.named if attribute not in hidden]
    for length in range(1, len(usable) + 1):
        patterns = [pattern_of(entry, names) for names in combinations(usable, length)]
        if found := [pattern for pattern in patterns if len(pattern.among(scene)) == 1]:
            return found
    return []


def _ask_existence(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """By shape, by colour, or by both; a held-out combination is named only where its split shows it."""
    level = scene.row
    secret = () if split_of(scene) == "heldout" else level.held_out
    forms = [
        [Pattern(shape=shape) for shape in level.shapes],
        [Pattern(colour=colour) for colour in level.colours],
        [Pattern(shape=shape, colour=colour) for shape in level.shapes for colour in level.colours if (shape, colour) not in secret],
    ]
    for i in rng.permutation(len(forms)):
        yes = [pattern for pattern in forms[i] if pattern.among(scene)]
        no = [pattern for pattern in forms[i] if not pattern.among(scene)]
        if chosen := _pick_balanced(yes, no, rng):
            return f"is there {chosen[0].an()}?", chosen[1]
    return None


def _ask_count(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Of all objects (uniform, as the number of objects is), or of a shape or a colour, the answer drawn before the question."""
    if rng.integers(2):
        return "how many objects?", NUMBERS[len(scene.objects)]
    by_answer: dict[int, list[Pattern]] = {}
    for attribute in ("shape", "colour"):
        for value in scene.row.values[attribute]:
            pattern = Pattern(**{attribute: value})
            by_answer.setdefault(len(pattern.among(scene)), []).append(pattern)
    numbers = sorted(by_answer)
    weights = np.array([2.0 ** max(0, number - 1) for number in numbers])  # large numbers are rarely possible: asked when they are
    number = int(rng.choice(numbers, p=weights / weights.sum()))
    pattern = by_answer[number][rng.integers(len(by_answer[number]))]
    return f"how many {pattern.words(2)}?", NUMBERS[number]


def _ask_attribute(attribute: str) -> Ask:
    def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
        if attribute not in scene.row.named:
            return None
        entry = _pick(list(scene.objects), rng)
        pattern = _pick(unique_patterns(scene, entry, (attribute,)), rng) if entry else None
        return (f"what {attribute} is {pattern.the()}?", getattr(entry, attribute)) if pattern else None

    return ask


def _ask_position(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    named = [(entry, pattern) for entry in scene.objects for pattern in unique_patterns(scene, entry, ("place",))]
    chosen = _pick(named, rng)
    return (f"where is {chosen[1].the()}?", chosen[0].place) if chosen else None


def _ask_relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    names = [(entry, unique_patterns(scene, entry, ("place",))) for entry in scene.objects]
    pairs = list(permutations([(entry, patterns) for entry, patterns in names if patterns], 2))
    cases = [(a, relation, b) for a, b in pairs for relation in RELATIONS]
    yes = [case for case in cases if related(case[0][0], case[1], case[2][0], scene.row)]
    no = [case for case in cases if related(case[2][0], case[1], case[0][0], scene.row)]  # the opposite holds
    chosen = _pick_balanced(yes, no, rng)
    if chosen is None:
        return None
    (first, relation, second), reply = chosen
    one, other = (patterns[rng.integers(len(patterns))].the() for _, patterns in (first, second))
    return f"is {one} {relation} {other}?", reply


def _ask_comparison(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    attribute = ("shape", "colour")[rng.integers(2)]
    counts = {value: len(Pattern(**{attribute: value}).among(scene)) for value in scene.row.values[attribute]}
    pairs = [(a, b) for a, b in permutations(counts, 2) if counts[a] != counts[b]]
    chosen = _pick_balanced(
        [pair for pair in pairs if counts[pair[0]] > counts[pair[1]]], [p for p in pairs if counts[p[0]] < counts[p[1]]], rng
    )
    if chosen is None:
        return None
    first, second = (Pattern(**{attribute: value}).words(2) for value in chosen[0])
    return f"are there more {first} than {second}?", chosen[1]


QUESTION_TYPES: dict[str, Ask] = {
    "existence": _ask_existence,
    "count": _ask_count,
    "colour": _ask_attribute("colour"),
    "shape": _ask_attribute("shape"),
    "size": _ask_attribute("size"),
    "texture": _ask_attribute("texture"),
    "position": _ask_position,
    "relation": _ask_relation,
    "comparison": _ask_comparison,
}


def questions(scene: Scene, rng: np.random.Generator) -> list[dict[str, str]]:
    """At most one question of each type the level asks: {"question", "answer", "type"}; none where a scene gives no fair one."""
    asked = ((kind, QUESTION_TYPES[kind](scene, rng)) for kind in scene.row.asks)
    return [{"question": pair[0], "answer": pair[1], "type": kind} for kind, pair in asked if pair]


def answer_vocabulary(level: int) -> dict[str, tuple[str, ...]]:
    """Question type -> the answers it can have at a level; a blind guess is right once in their number."""
    row: Level = LEVELS[level]
    attributes: dict[str, tuple[str, ...]] = {
        name: row.values[name] for name in ("colour", "shape", "size", "texture") if name in row.named
    }
    yes_no = dict.fromkeys(("existence", "relation", "comparison"), ("yes", "no"))
    answers = {**yes_no, **attributes, "count": NUMBERS[: row.max_objects + 1], "position": row.places}
    return {kind: known for kind, known in answers.items() if kind in row.asks}


# --- answering --------------------------------------------------------------------------------------------------------------------


def _the_one(text: str, scene: Scene) -> SceneObject | None:
    """The object that `the red circle top left` names, if there is exactly one."""
    phrase = parse_phrase(text, article="the")
    found = phrase[0].among(scene) if phrase and phrase[1] == 1 else []
    return found[0] if len(found) == 1 else None


def _replies(text: str, scene: Scene) -> Iterator[str]:
    def yes_no(truth: bool) -> str:
        return "yes" if truth else "no"

    if (match := re.fullmatch(r"is there (a .+)", text)) and (phrase := parse_phrase(match[1])):
        yield yes_no(bool(phrase[0].among(scene)))
    if (match := re.fullmatch(r"how many (.+)", text)) and (pattern := parse_kind(match[1], number=2)):
        yield NUMBERS[len(pattern.among(scene))]
    if (match := re.fullmatch(r"what (colour|shape|size|texture) is (.+)", text)) and (entry := _the_one(match[2], scene)):
        yield getattr(entry, match[1])
    if (match := re.fullmatch(r"where is (.+)", text)) and (entry := _the_one(match[1], scene)):
        yield entry.place
    if match := re.fullmatch(rf"is (the .+) ({'|'.join(RELATIONS)}) (the .+)", text):
        first, second = _the_one(match[1], scene), _the_one(match[3], scene)
        if first and second:
            yield yes_no(related(first, match[2], second, scene.row))
    if match := re.fullmatch(r"are there more (.+) than (.+)", text):
        more, fewer = (parse_kind(group, number=2) for group in match.groups())
        if more and fewer:
            yield yes_no(len(more.among(scene)) > len(fewer.among(scene)))


def answer(question: str, scene: Scene) -> str | None:
    """The true answer to a question about a scene; None if it is no question of these forms, or asks about an object that is not there."""
    return next(_replies(normalise(question).removesuffix("?"), scene), None)
