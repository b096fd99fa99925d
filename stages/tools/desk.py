"""One plan while it is carried out: what its calls may refer to, what came of each, and what is left of that in the end."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from stages.data.sample import Sample
from stages.errors import nearest
from stages.tools.calls import GIVEN, Call, CallError, Reference, Value, by_reference, file_name, happened, opening, shown
from stages.tools.toolbox import Kind, Thing, Tool

NO_PICTURE = np.full((1, 1, 3), 255, np.uint8)  # every sample of a shard has the same fields, also one whose calls made no picture


class Desk:
    """A prompt, asked for the `number`-th time, and what the calls of its plan may refer to: its picture, and what calls before gave."""

    def __init__(self, prompt: Sample, number: int) -> None:
        self.prompt, self.number = prompt, number
        given = GIVEN in prompt.fields
        self.things: dict[str, Thing] = {GIVEN: prompt.fields[GIVEN]} if given else {}
        self.files: dict[str, str] = {f"{GIVEN}.png": GIVEN} if given else {}  # name of a picture -> what it refers to
        self.failed: set[str] = set()
        self.history = opening(picture=given)
        self.plan: list[str] = []  # what was written, line by line
        self.records: list[dict[str, Any]] = []  # of the calls, in order

    @property
    def steps(self) -> int:
        """Calls that were carried out or refused so far."""
        return len(self.records)

    def resolve(self, call: Call, tools: Mapping[str, Tool]) -> tuple[Tool, dict[str, Thing]]:
        """The tool a call is for, and its arguments. Raises CallError, in one line, for a call that cannot be carried out."""
        if call.tool not in tools:
            raise CallError(f"there is no tool '{call.tool}'; {nearest(call.tool, tools)}")
        tool = tools[call.tool]
        for argument in call.arguments:
            if argument not in tool.kinds:
                raise CallError(f"{tool.name}: there is no argument '{argument}'; {nearest(argument, tool.kinds)}")
        for argument, kind in tool.kinds.items():
            if argument not in call.arguments:
                raise CallError(f"{tool.name}: expected {argument}, a {kind}, found no such argument")
        return tool, {name: self._thing(value, tool.kinds[name], f"{tool.name}: {name}") for name, value in call.arguments.items()}

    def _thing(self, value: Value, kind: Kind, where: str) -> Thing:
        if kind == "picture" and isinstance(value, str):
            if value not in self.files:
                raise CallError(f"{where}: expected a picture, found the text {shown(value)}; {self._there(kind)}")
            return self.things[self.files[value]]
        if isinstance(value, str):
            return value
        if value.name in self.failed:
            raise CallError(f"{where}: expected a {kind}, found {value}, a call that went wrong")
        if value.name not in self.things:
            raise CallError(f"{where}: expected a {kind}, found {value}, which is not there; {self._there(kind)}")
        thing = self.things[value.name]
        if isinstance(thing, str) != (kind == "text"):
            raise CallError(f"{where}: expected a {kind}, found {value}, a {'text' if isinstance(thing, str) else 'picture'}")
        return thing

    def _there(self, kind: Kind) -> str:
        fitting = [str(Reference(name)) for name, thing in self.things.items() if isinstance(thing, str) == (kind == "text")]
        return f"there is {', '.join(fitting)}" if fitting else f"there is no {kind}"

    def keep(self, call: Call, tool: Tool, arguments: Mapping[str, Thing], result: Thing) -> None:
        """A call that was carried out, and what it gave."""
        step = self.steps + 1
        if isinstance(result, str):
            name = result
        else:
            pictures = [file for file, about in self.files.items() for thing in arguments.values() if self.things[about] is thing]
            name = file_name(step, call.tool, *pictures[:1])
            self.files[name] = f"step-{step}"
        self.things[f"step-{step}"] = result
        self.history += "\n" + happened(call, name, picture=not isinstance(result, str))
        self.records.append({"call": str(call), "tool": tool.name, "ok": True, "error": "", "kind": tool.gives, "result": name})

    def refuse(self, line: str, error: str, tool: str = "") -> None:
        """A call that was not, and why."""
        self.failed.add(f"step-{self.steps + 1}")
        self.records.append({"call": line, "tool": tool, "ok": False, "error": error, "kind": "", "result": ""})

    def referring(self, call: Call) -> str:
        """The call as a whole plan would write it."""
        return str(by_reference(call, {thing: name for name, thing in self.things.items() if isinstance(thing, str)}))

    def fields(self, tools: Mapping[str, Tool]) -> dict[str, Any]:
        """What is written beside the prompt: plan, record of the calls, and the last picture and the last text they gave.

        Which of the two there are depends on the tools, never on the plan. Where no call made a picture it is white and has one pixel, where
        none said anything the text is empty.
        """
        made = {
            kind: [thing for name, thing in self.things.items() if name != GIVEN and isinstance(thing, str) == (kind == "text")]
            for kind in ("picture", "text")
        }
        blank: dict[str, Thing] = {"picture": NO_PICTURE, "text": ""}
        last = {kind: (made[kind] or [blank[kind]])[-1] for kind in made if any(tool.gives == kind for tool in tools.values())}
        return {
            "sample.plan": "\n".join(self.plan),
            "sample.tools": self.records,
            **{f"sample.{kind}": thing for kind, thing in last.items()},
        }
