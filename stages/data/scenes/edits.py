"""Edits: an instruction in words, and what it does to a scene.

    "add a red circle top left" · "remove the red circle" · "make the red circle blue" · "make the red circle a square"
    "move the red circle to bottom right"

`apply_instruction` is the oracle: it takes any instruction of these forms. `draw_edit` makes one.
"""

import re
from dataclasses import replace

import numpy as np

from stages.data.scenes.language import normalise, parse_phrase, pattern_of
from stages.data.scenes.questions import unique_patterns
from stages.data.scenes.world import ATTRIBUTES, Scene, SceneObject, split_of

# What the result of an edit may show, so that no training sample shows a scene of `val` or a held-out combination.
RESULT_SPLITS = {"train": ("train",), "val": ("train", "val"), "heldout": ("train", "val", "heldout")}


def apply_instruction(instruction: str, scene: Scene) -> Scene | None:
    """The scene after an edit; None where the instruction does not parse, is ambiguous in this scene, or changes nothing."""
    text, level = normalise(instruction), scene.row
    if text.startswith("add "):
        phrase = parse_phrase(text.removeprefix("add "))
        if phrase is None or phrase[1] != 1:
            return None
        said = {attribute: getattr(phrase[0], attribute) for attribute in ATTRIBUTES}
        only = {attribute: values[0] for attribute, values in level.values.items() if len(values) == 1}
        new = SceneObject(**{attribute: value or only.get(attribute, "") for attribute, value in said.items()})
        if new.place in scene.by_place or any(getattr(new, attribute) not in level.values[attribute] for attribute in ATTRIBUTES):
            return None
        return scene.adding(new)

    match = re.fullmatch(r"remove (the .+)|make (the .+) (\w+)|move (the .+) to (.+)", text)
    if match is None:
        return None
    phrase = parse_phrase((match[1] or match[2] or match[4]).removesuffix(" a"), article="the")
    named = phrase[0].among(scene) if phrase and phrase[1] == 1 else []
    if len(named) != 1:
        return None
    target, value = named[0], match[3] or match[5]
    rest = scene.without(target.place)
    if match[1]:
        return rest
    for attribute in ATTRIBUTES:
        if value in level.values[attribute] and (attribute == "place") == bool(match[4]):
            changed = replace(target, **{attribute: value})
            return None if changed == target or changed.place in rest.by_place else rest.adding(changed)
    return None


def _draw_instruction(scene: Scene, rng: np.random.Generator) -> str:
    level = scene.row
    target = scene.objects[rng.integers(len(scene.objects))]
    patterns = unique_patterns(scene, target)
    name = patterns[rng.integers(len(patterns))].the()
    free = [place for place in level.places if place not in scene.by_place]
    kind = str(rng.choice(["add", "remove", "move", *(attribute for attribute in level.named if attribute != "place")]))
    if kind == "remove":
        return f"remove {name}"
    if kind in ("add", "move") and not free:
        return ""
    if kind == "move":
        return f"move {name} to {rng.choice(free)}"
    values = {attribute: str(rng.choice(choices)) for attribute, choices in level.values.items()}
    if kind == "add":
        return f"add {pattern_of(SceneObject(**{**values, 'place': str(rng.choice(free))}), level.named).an()}"
    return f"make {name} {'a ' if kind == 'shape' else ''}{values[kind]}"


def draw_edit(scene: Scene, split: str, rng: np.random.Generator) -> tuple[str, Scene]:
    """(instruction, result): a random edit of a scene with at least one object, whose result this split may show and is not empty."""
    while True:
        instruction = _draw_instruction(scene, rng)
        result = apply_instruction(instruction, scene)
        if result is not None and 0 < len(result.objects) <= scene.row.max_objects and split_of(result) in RESULT_SPLITS[split]:
            return instruction, result
