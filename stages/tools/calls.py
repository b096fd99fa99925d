"""The language of plans: one call a line, a tool and its arguments by name.

    draw(caption="a red circle top left")
    edit(image=<step-1>, instruction="make the red circle blue")
    answer(image=<step-2>, question="what colour is the circle?")

A value is a text in double quotes (a string of JSON), `<image>`, the picture that came with the request, or `<step-N>`, what line N gave:
so a plan names its dependencies, as HuggingGPT's does (arXiv:2303.17580, section 3.1, `<resource>-id`).

Visual ChatGPT (arXiv:2303.04671, section 3.2) writes one call at a time and names files instead, "image.png" or "2_edit_1_draw.png": a name
tells which call made the file, with which tool, and from what. Its *history* is what has happened so far: the file it was given, then a line
for every call with what came of it. It answers a history with the next call, or with `done`.

Nothing here is evaluated: a plan is read by these few rules, and whatever else a model writes is a `CallError` that says what is wrong.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

GIVEN = "image"  # the field of a prompt that calls may refer to; its others are the truth about it, or none of a tool's business
DONE = "done"
NAME = re.compile(r"[a-z][a-z0-9_-]*")
_TEXT = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
_REFERENCE = re.compile(r"<([a-z][a-z0-9_-]*)>")
_FILE = re.compile(r"(\d+)_[\w-]+\.png")
_SHOWN = 60  # characters of what was found, in a message


class CallError(ValueError):
    """What is wrong with a call, in one line."""


@dataclass(frozen=True)
class Reference:
    """`<image>` or `<step-2>`: a thing by its name."""

    name: str

    def __str__(self) -> str:
        return f"<{self.name}>"


Value: TypeAlias = str | Reference


@dataclass(frozen=True)
class Call:
    """One line of a plan."""

    tool: str
    arguments: Mapping[str, Value]

    def __str__(self) -> str:
        told = ", ".join(f"{name}={spelled(value)}" for name, value in self.arguments.items())
        return f"{self.tool}({told})"


def spelled(value: Value) -> str:
    """A value as plans write it."""
    return str(value) if isinstance(value, Reference) else json.dumps(value, ensure_ascii=False)


def write_plan(calls: Sequence[Call]) -> str:
    """Inverse of `read_plan`."""
    return "\n".join(map(str, calls))


def read_plan(text: str) -> list[Call]:
    """The calls of a plan. Raises CallError with the number of the first line that is none."""
    calls = []
    for number, line in enumerate(lines_of(text), start=1):
        try:
            calls.append(read_call(line))
        except CallError as error:
            raise CallError(f"line {number}: {error}") from None
    return calls


def lines_of(text: str) -> list[str]:
    """The lines of a plan: only a line feed ends one, and an empty plan has none."""
    return text.split("\n") if text.strip() else []


def read_call(line: str) -> Call:
    """One call. Raises CallError for anything else, whether or not there is such a tool."""
    text = line.strip()
    named = NAME.match(text)
    if named is None or not text.startswith("(", named.end()):
        raise CallError(f"expected TOOL(ARGUMENT=VALUE, ...), found {shown(text)}")
    tool, at = named[0], named.end() + 1
    arguments: dict[str, Value] = {}
    while not (text.startswith(")", at) and not arguments):
        at += len(text[at:]) - len(text[at:].lstrip())
        argument = NAME.match(text, at)
        if argument is None or not text.startswith("=", argument.end()):
            raise CallError(f"{tool}: expected ARGUMENT=VALUE, found {shown(text[at:])}")
        if argument[0] in arguments:
            raise CallError(f"{tool}: {argument[0]} is given twice")
        arguments[argument[0]], at = _read_value(text, argument.end() + 1, f"{tool}: {argument[0]}")
        if text.startswith(")", at):
            break
        if not text.startswith(",", at):
            raise CallError(f"{tool}: expected ',' or ')' after {argument[0]}, found {shown(text[at:])}")
        at += 1
    if at + 1 < len(text):
        raise CallError(f"{tool}: expected nothing after ')', found {shown(text[at + 1 :])}")
    return Call(tool, arguments)


def _read_value(text: str, at: int, where: str) -> tuple[Value, int]:
    """The value that starts at a place of a line, and where it ends."""
    if reference := _REFERENCE.match(text, at):
        return Reference(reference[1]), reference.end()
    if not text.startswith('"', at):
        raise CallError(f"{where}: expected a text in quotes, <{GIVEN}> or <step-N>, found {shown(text[at:].split(',')[0])}")
    quoted = _TEXT.match(text, at)
    if quoted is None:
        raise CallError(f"{where}: expected a closing quote, found the end of the line after {shown(text[at:])}")
    try:
        value = json.loads(quoted[0])
        value.encode()
    except ValueError:
        raise CallError(f"{where}: expected a text with JSON's escapes, found {shown(quoted[0])}") from None
    if "\0" in value:
        raise CallError(f"{where}: expected a text, found a NUL in it")
    return value, quoted.end()


def shown(text: str) -> str:
    """Some text inside a message: on one line, short, and "nothing" where there is none."""
    cut = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
    return json.dumps(cut, ensure_ascii=False) if cut.strip() else "nothing"


# --- one call at a time -----------------------------------------------------------------------------------------------------------


def file_name(step: int, tool: str, source: str = "") -> str:
    """The name of the picture a call made, chained to that of the picture it was made from."""
    return f"{step}_{tool}_{source.removesuffix('.png')}.png" if source else f"{step}_{tool}.png"


def opening(*, picture: bool) -> str:
    """The history before the first call."""
    return f"{GIVEN}.png" if picture else "no file"


def happened(call: Call, result: str, *, picture: bool) -> str:
    """The line of history about a call that gave a file of this name, or this text."""
    return f"{call} -> {result if picture else spelled(result)}"


def by_reference(call: Call, texts: Mapping[str, str] | None = None) -> Call:
    """The same call with files named by the step that made them, so that plans of both kinds can be compared.

    texts: what earlier steps said -> which step that was; an argument that repeats it refers to that step.
    """

    def renamed(value: Value) -> Value:
        if isinstance(value, Reference):
            return value
        made = _FILE.fullmatch(value)
        name = GIVEN if value == f"{GIVEN}.png" else f"step-{made[1]}" if made else (texts or {}).get(value)
        return Reference(name) if name else value

    return Call(call.tool, {name: renamed(value) for name, value in call.arguments.items()})
