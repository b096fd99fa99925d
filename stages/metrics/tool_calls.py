"""Are the tool calls the right ones? Plans are parsed and compared call by call; what came of them is read back and compared too.

    exact       the same calls with the same arguments, in order           tools      the same tools in order, whatever their arguments
    arguments   of the arguments the right plan has, those that are there with the same value, at the same step of the same tool
    parsed      what was written are calls, whether or not they make sense
    executed    every call was carried out (only where tools were there to do it)
    result      the last call gave what the right plan comes to: the same answer, a picture that reads as the same scene, a description
                of the same scene (only where tools were there, and the prompt is a scene)

A plan that does not parse has no right call. `sample.plan` is a plan, `sample.steps` the calls of a dialogue, each with the true history
before it: easier, and so protocol. Chance is what the most frequent true plan reaches, or the most frequent order of tools. Beside the
whole, `exact` is given for each order of tools.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.data.scenes import LEVELS, Scene, described_scene, parse_caption, read_scene
from stages.data.scenes.plans import carry_out
from stages.errors import DataError
from stages.metrics.intervals import bootstrap_share
from stages.metrics.object_scores import share
from stages.metrics.question_accuracy import plain
from stages.metrics.score import Fields, Score, Setting
from stages.tools.calls import DONE, Call, CallError, read_plan

Result = tuple[str, Any]  # ("text", words), ("picture", scene), or ("", None) where nothing came of it


@dataclass(frozen=True)
class Planned:
    """What was written: its calls (None: not parsed), whether all were carried out, and what the last gave (None: there were no tools)."""

    calls: tuple[Call, ...] | None
    executed: bool | None = None
    result: Result | None = None


@dataclass(frozen=True)
class Wanted:
    """What should have been: the calls, and what they come to (None: not known)."""

    calls: tuple[Call, ...]
    result: Scene | str | None
    told: bool  # calls of a dialogue, each after its true history


class ToolCalls:
    paired = True

    def __init__(self, setting: Setting) -> None:
        self.seed = setting.seed

    @staticmethod
    def applies(sample: Fields, setting: Setting) -> bool:
        return {"sample.plan", "plan"} <= sample.keys() or "sample.steps" in sample

    def look(self, sample: Fields) -> Planned:
        calls = parsed(sample["sample.plan"] if "sample.plan" in sample else dialogue(sample, "call"))
        if "sample.tools" not in sample:
            return Planned(calls)
        records = sample["sample.tools"]
        return Planned(calls, all(record["ok"] for record in records), result_of(sample))

    def expect(self, sample: Fields) -> Wanted:
        told = "sample.plan" not in sample
        text = dialogue(sample, "truth") if told else sample["plan"]
        calls = parsed(text)
        if calls is None:
            raise DataError(f"{sample['__key__']}: the true plan is none: {text!r:.200}")
        known = not told and "scene" in sample
        return Wanted(calls, carry_out(calls, Scene.from_json(sample["scene"])) if known else None, told)

    def scores(self, seen: list[Planned], expected: list[Wanted]) -> list[Score]:
        pairs = [(one.calls or (), two.calls) for one, two in zip(seen, expected, strict=True)]
        exact = [one == two for one, two in pairs]
        orders = [tools_of(two) for _, two in pairs]
        n = len(pairs)
        protocol = {"history": "true" if any(wanted.told for wanted in expected) else "none given", "chance": "most frequent true plan"}

        def with_chance(score: Score, truths: Sequence[Any]) -> Score:
            best = Counter(truths).most_common(1)[0][1] / len(truths)
            return Score(score.category, score.value, score.n, score.samples, score.interval, best, protocol)

        right, wanted = [agreeing(one, two) for one, two in pairs], [sum(len(call.arguments) for call in two) for _, two in pairs]
        scores = [
            with_chance(share("exact", exact, protocol), [str([*map(str, two)]) for _, two in pairs]),
            with_chance(share("tools", [tools_of(one) == order for (one, _), order in zip(pairs, orders, strict=True)], protocol), orders),
        ]
        if sum(wanted):
            interval = bootstrap_share(np.array(right), np.array(wanted), self.seed)
            scores.append(Score("arguments", sum(right) / sum(wanted), sum(wanted), n, interval, protocol=protocol))
        scores.append(share("parsed", [one.calls is not None for one in seen], protocol))
        if all(one.executed is not None for one in seen):
            scores.append(share("executed", [bool(one.executed) for one in seen], protocol))
            judged = [(one.result, two.result) for one, two in zip(seen, expected, strict=True) if two.result is not None]
            if judged:
                scores.append(share("result", [same_result(one, two) for one, two in judged], protocol))
        for order in sorted(set(orders)):
            scores.append(share(f"exact {order}", [hit for hit, own in zip(exact, orders, strict=True) if own == order], protocol))
        return scores


def parsed(text: str) -> tuple[Call, ...] | None:
    try:
        return tuple(read_plan(text))
    except CallError:
        return None


def dialogue(sample: Fields, what: str) -> str:
    """The calls of `sample.steps` as one plan; `done` at its end is no call, and too early or too late it is a wrong one."""
    calls = [record[what] for record in sample["sample.steps"]]
    return "\n".join(calls[:-1] if calls and calls[-1] == DONE else calls)


def tools_of(calls: Sequence[Call]) -> str:
    return ", ".join(call.tool for call in calls)


def agreeing(calls: Sequence[Call], truth: Sequence[Call]) -> int:
    """How many arguments of the true plan are there with the same value, in a call of the same tool at the same step."""
    pairs = [(one, two) for one, two in zip(calls, truth, strict=False) if one.tool == two.tool]
    return sum(one.arguments.get(name) == value for one, two in pairs for name, value in two.arguments.items())


def result_of(sample: Fields) -> Result:
    """What the last call of the record gave; a picture as the scene the reader finds in it."""
    last = (sample["sample.tools"] or [{"ok": False}])[-1]
    if not last["ok"]:
        return "", None
    if last["kind"] == "text":
        return "text", last["result"]
    if "scene" not in sample:
        return "picture", None
    try:
        reading = read_scene(sample["sample.picture"], Scene.from_json(sample["scene"]).level)
    except ValueError as error:
        raise DataError(f"{sample['__key__']}: sample.picture: {error}") from None
    return "picture", reading.scene if reading.valid else None


def same_result(made: Result | None, wanted: Scene | str) -> bool:
    """Whether what came of a plan is what should have. A description counts by the scene it describes, not by its words."""
    kind, found = made or ("", None)
    if isinstance(wanted, Scene):
        return kind == "picture" and found == wanted
    if kind != "text" or not isinstance(found, str):
        return False
    described = parse_caption(wanted)  # no answer is a sentence of the captions' grammar
    if described is None:
        return plain(found) == plain(wanted)
    return any(
        described_scene(parse_caption(found), level) == described_scene(described, level) is not None for level in range(len(LEVELS))
    )
