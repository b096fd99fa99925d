"""Requests in words, and the plan of tool calls that fulfils each.

    draw        "draw a red circle top left"                            answer   a question, "how many objects?"
    edit        an instruction, "remove the red circle"                 describe "describe the picture"
    look        "what is this?": the one object's shape where the picture shows one object, a description where it shows more, so that the
                right tool cannot be told from the words
    and of two calls, the second reading what the first gave: draw and ask, draw and edit, edit and describe, edit and ask, describe and draw

What is drawn is a scene of its own, never the one in the picture. `carry_out` is the oracle: what a plan comes to, with perfect tools.
"""

from collections.abc import Callable, Sequence

import numpy as np

from stages.data.scenes.edits import apply_instruction, draw_edit
from stages.data.scenes.language import caption, described_scene, parse_caption
from stages.data.scenes.questions import answer, questions
from stages.data.scenes.world import Scene, draw_scene
from stages.errors import UsageError
from stages.tools.calls import DONE, GIVEN, Call, Reference, Value, file_name, happened, opening, write_plan

Ask = Callable[[Scene, str, np.random.Generator], tuple[str, list[Call]]]
IMAGE, FIRST = Reference(GIVEN), Reference("step-1")
SHAPE = "what shape is the object?"


def _draw(value: Value) -> Call:
    return Call("draw", {"caption": value})


def _answer(image: Value, question: str) -> Call:
    return Call("answer", {"image": image, "question": question})


def _edit(image: Value, instruction: str) -> Call:
    return Call("edit", {"image": image, "instruction": instruction})


def _describe(image: Value) -> Call:
    return Call("describe", {"image": image})


def _question(scene: Scene, rng: np.random.Generator) -> str:
    asked = questions(scene, rng)
    return asked[rng.integers(len(asked))]["question"]


def _ask_draw(scene: Scene, split: str, rng: np.random.Generator) -> tuple[str, list[Call]]:
    wanted = caption(draw_scene(scene.row, split, rng))
    return f"draw {wanted}", [_draw(wanted)]


def _ask_answer(scene: Scene, split: str, rng: np.random.Generator) -> tuple[str, list[Call]]:
    question = _question(scene, rng)
    return question, [_answer(IMAGE, question)]


def _ask_edit(scene: Scene, split: str, rng: np.random.Generator) -> tuple[str, list[Call]]:
    instruction, _ = draw_edit(scene, split, rng)
    return instruction, [_edit(IMAGE, instruction)]


def _ask_describe(scene: Scene, split: str, rng: np.random.Generator) -> tuple[str, list[Call]]:
    return "describe the picture", [_describe(IMAGE)]


def _ask_look(scene: Scene, split: str, rng: np.random.Generator) -> tuple[str, list[Call]]:
    return "what is this?", [_answer(IMAGE, SHAPE) if len(scene.objects) == 1 else _describe(IMAGE)]


def _ask_draw_answer(scene: Scene, split: str, rng: np.random.Generator) -> tuple[str, list[Call]]:
    wanted = draw_scene(scene.row, split, rng)
    question = _question(wanted, rng)
    return f"draw {caption(wanted)}, then tell me: {question}", [_draw(caption(wanted)), _answer(FIRST, question)]


def _ask_draw_edit(scene: Scene, split: str, rng: np.random.Generator) -> tuple[str, list[Call]]:
    wanted = draw_scene(scene.row, split, rng)
    instruction, _ = draw_edit(wanted, split, rng)
    return f"draw {caption(wanted)}, then {instruction}", [_draw(caption(wanted)), _edit(FIRST, instruction)]


def _ask_edit_describe(scene: Scene, split: str, rng: np.random.Generator) -> tuple[str, list[Call]]:
    instruction, _ = draw_edit(scene, split, rng)
    return f"{instruction}, then describe it", [_edit(IMAGE, instruction), _describe(FIRST)]


def _ask_edit_answer(scene: Scene, split: str, rng: np.random.Generator) -> tuple[str, list[Call]]:
    instruction, result = draw_edit(scene, split, rng)
    question = _question(result, rng)
    return f"{instruction}, then tell me: {question}", [_edit(IMAGE, instruction), _answer(FIRST, question)]


def _ask_describe_draw(scene: Scene, split: str, rng: np.random.Generator) -> tuple[str, list[Call]]:
    return "describe the picture and draw it anew", [_describe(IMAGE), _draw(FIRST)]


REQUESTS: tuple[dict[str, Ask], ...] = (  # by number of calls
    {},
    {"draw": _ask_draw, "answer": _ask_answer, "edit": _ask_edit, "describe": _ask_describe, "look": _ask_look},
    {
        "draw-answer": _ask_draw_answer,
        "draw-edit": _ask_draw_edit,
        "edit-describe": _ask_edit_describe,
        "edit-answer": _ask_edit_answer,
        "describe-draw": _ask_describe_draw,
    },
)


def check_plans(plans: int) -> None:
    """UsageError for a number of calls that no request has."""
    if not 0 <= plans < len(REQUESTS):
        raise UsageError(f"--plans {plans}: the requests here need 1 or {len(REQUESTS) - 1} calls, and 0 leaves them out")


def plan_fields(scene: Scene, split: str, most: int, rng: np.random.Generator) -> dict[str, object]:
    """A request that `most` calls are enough for, as fields of a sample that shows the scene.

    request.txt   the words; plan.txt: the right calls, one a line
    steps.json    the same one call at a time, [{"history", "call"}], the last call being `done`; see `stages.tools.calls`
    """
    kinds = [ask for asks in REQUESTS[: most + 1] for ask in asks.values()]
    request, calls = kinds[rng.integers(len(kinds))](scene, split, rng)
    return {"request": request, "plan": write_plan(calls), "steps": conversation(calls, scene)}


def results(calls: Sequence[Call], scene: Scene) -> list[Scene | str] | None:
    """What every call of a plan gives with perfect tools, a picture being the scene it shows; None where one gives nothing.

    Calls are those of the plans made here; `describe` gives the full description.
    """
    things: dict[str, Scene | str] = {GIVEN: scene}
    for number, call in enumerate(calls, start=1):
        given = {name: things.get(value.name) if isinstance(value, Reference) else value for name, value in call.arguments.items()}
        result = _perform(call.tool, given, scene.level)
        if result is None:
            return None
        things[f"step-{number}"] = result
    return [things[f"step-{number}"] for number in range(1, len(calls) + 1)]


def _perform(tool: str, given: dict[str, Scene | str | None], level: int) -> Scene | str | None:
    image, words = given.get("image"), next((value for name, value in given.items() if name != "image"), None)
    if tool == "draw" and isinstance(words, str):
        return described_scene(parse_caption(words), level)
    if tool == "describe" and isinstance(image, Scene):
        return caption(image)
    if tool in ("answer", "edit") and isinstance(image, Scene) and isinstance(words, str):
        return answer(words, image) if tool == "answer" else apply_instruction(words, image)
    return None


def carry_out(calls: Sequence[Call], scene: Scene) -> Scene | str | None:
    """What a plan comes to: the result of its last call, None for a plan that comes to nothing."""
    found = results(calls, scene)
    return found[-1] if found else None


def conversation(calls: Sequence[Call], scene: Scene) -> list[dict[str, str]]:
    """A plan one call at a time: each call beside the history it answers, files by name. The plan must be one that works."""
    found = results(calls, scene)
    assert found is not None, write_plan(calls)
    names, history, turns = {GIVEN: f"{GIVEN}.png"}, opening(picture=True), []
    for number, (call, result) in enumerate(zip(calls, found, strict=True), start=1):
        sources = [names[value.name] for name, value in call.arguments.items() if isinstance(value, Reference) and name == "image"]
        told = Call(call.tool, {n: names[value.name] if isinstance(value, Reference) else value for n, value in call.arguments.items()})
        name = file_name(number, call.tool, *sources[:1]) if isinstance(result, Scene) else result
        names[f"step-{number}"] = name
        turns.append({"history": history, "call": str(told)})
        history += "\n" + happened(told, name, picture=isinstance(result, Scene))
    return [*turns, {"history": history, "call": DONE}]
