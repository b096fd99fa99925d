"""tools.toml: what a controller can call. A tool is a checkpoint of mmgen that is asked one of its tasks.

    [tools.answer]
    description = "answers a question about a picture"
    model = "runs/janus"                                     a folder, relative to this file, or hf://org/name
    task = "answer"                                          a task of that model's recipe
    reads = { image = "image", question = "question" }       argument of the call -> field the task reads
    writes = "answer"                                        the field the task writes

Whether an argument is a text or a picture follows from the task: the port that reads its field says so.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from stages.documents import MAX_TOML_BYTES, parse_toml, read_bytes, shown
from stages.errors import UsageError, nearest
from stages.hub import SCHEME, resolve
from stages.recipe import EachSpec, Recipe, SegmentSpec, Task
from stages.sequence.segment import Content, Role
from stages.tools.calls import NAME
from stages.training.checkpoint import open_checkpoint

Kind = Literal["text", "picture"]
Thing = str | np.ndarray  # a text, or a picture: uint8 (H, W, 3)


MAX_TOOLS = 64  # each may be a network of its own


class _Table(BaseModel):
    """What a table of the file may say."""

    model_config = ConfigDict(extra="forbid", strict=True)
    description: str = ""
    model: str
    task: str
    reads: dict[str, str]
    writes: str


@dataclass(frozen=True)
class Tool:
    """A tool: what it is called with, which checkpoint it asks, and what comes back."""

    name: str
    description: str
    model: str
    folder: Path
    task: str
    reads: Mapping[str, str]  # argument -> field
    kinds: Mapping[str, Kind]  # argument -> what it must be
    writes: str
    gives: Kind
    each: str  # the list whose records the task goes through: a call is about one record
    inner: frozenset[str]  # fields of such a record

    def prompt(self, arguments: Mapping[str, Thing]) -> dict[str, Any]:
        """The fields of a sample that asks the task about these arguments."""
        fields: dict[str, Any] = {}
        record: dict[str, Any] = {}
        for argument, thing in arguments.items():
            (record if self.reads[argument] in self.inner else fields)[self.reads[argument]] = thing
        return {**fields, self.each: [record]} if self.each else fields


@dataclass(frozen=True)
class Toolbox:
    """The tools of one file. `fingerprint` is that of the file's bytes."""

    file: Path
    fingerprint: str
    tools: Mapping[str, Tool]


def open_tools(file: Path) -> Toolbox:
    """Read and check a tools.toml; no weights are loaded. Raises UsageError with file, key, and the nearest valid choice."""
    try:
        data = read_bytes(file, most=MAX_TOML_BYTES, error=UsageError, linked=True)
    except UsageError as error:
        raise UsageError(error.message, hint=error.hint or "--tools takes a file such as tools.toml") from None
    tables = parse_toml(data, file, error=UsageError)
    for key in tables:
        if key != "tools":
            raise UsageError(f"{file}: {key}: there is no such key", hint="every tool is a table [tools.NAME]")
    found = tables.get("tools")
    if not isinstance(found, dict) or not found:
        raise UsageError(f"{file}: tools: expected tables [tools.NAME], found {'none' if found is None else shown(found)}")
    if len(found) > MAX_TOOLS:
        raise UsageError(f"{file}: tools: {len(found):,} tools, a toolbox has at most {MAX_TOOLS}")
    return Toolbox(file, hashlib.sha256(data).hexdigest(), {name: _tool(file, name, table) for name, table in found.items()})


def _tool(file: Path, name: str, table: Any) -> Tool:
    here = f"{file}: tools.{name}"
    for what in (name, *(table.get("reads") or () if isinstance(table, dict) and isinstance(table.get("reads"), dict) else ())):
        if not NAME.fullmatch(what):
            raise UsageError(f"{here}: {what!r} is no name of a tool or an argument", hint="small letters, digits, - and _")
    try:
        said = _Table.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (here, *first["loc"])))
        if first["type"] == "extra_forbidden":
            raise UsageError(f"{key}: there is no such key", hint=nearest(str(first["loc"][-1]), _Table.model_fields)) from None
        found = "" if first["type"] == "missing" else f" (found {shown(first['input'])})"
        raise UsageError(f"{key}: {first['msg']}{found}") from None
    if "\0" in said.model or not said.model:
        raise UsageError(f"{here}.model: expected a folder or hf://org/name, found {shown(said.model)}")
    folder = resolve(said.model) if said.model.startswith(SCHEME) else file.parent / said.model
    try:
        recipe = open_checkpoint(folder).recipe
    except UsageError as error:
        raise UsageError(f"{here}.model: {error.message}", hint=error.hint) from None
    except OSError as error:  # a path that is too long, or not for this user
        raise UsageError(f"{here}.model: {shown(said.model)}: {(error.strerror or str(error)).lower()}") from None
    if said.task not in recipe.tasks:
        raise UsageError(f"{here}.task: '{recipe.name}' has no task '{said.task}'", hint=nearest(said.task, recipe.tasks))
    task = recipe.tasks[said.task]
    written = next((s for s in reversed(list(task.flat())) if s.role == Role.TARGET and s.fields), None)
    if written is None or said.writes != written.fields[-1]:
        wrote = written.fields[-1] if written else "nothing"
        raise UsageError(f"{here}.writes: the task '{said.task}' of '{recipe.name}' writes '{wrote}', found '{said.writes}'")
    each, outer, inner = _fields_of(recipe, task, said.writes)
    asked = {**outer, **inner}
    for argument, field in said.reads.items():
        if field not in asked:
            message = f"{here}.reads.{argument}: the task '{said.task}' of '{recipe.name}' reads no field '{field}'"
            raise UsageError(message, hint=nearest(field, asked))
    if lacking := sorted(asked.keys() - said.reads.values()):
        raise UsageError(f"{here}.reads: the task '{said.task}' of '{recipe.name}' also needs {', '.join(lacking)}")
    if len(set(said.reads.values())) < len(said.reads):
        raise UsageError(f"{here}.reads: two arguments fill the same field")
    kinds = {argument: asked[field] for argument, field in said.reads.items()}
    gives = _kind(recipe, written)
    return Tool(name, said.description, said.model, folder, said.task, said.reads, kinds, said.writes, gives, each, frozenset(inner))


def _fields_of(recipe: Recipe, task: Task, written: str) -> tuple[str, dict[str, Kind], dict[str, Kind]]:
    """(list field, "" without one; fields of the prompt; fields of a record of the list) that a task needs, each with what it is."""
    each = next((entry for entry in task.segments if isinstance(entry, EachSpec)), None)
    flat = [entry for entry in task.segments if isinstance(entry, SegmentSpec) and not entry.optional]
    outer = {field: _kind(recipe, segment) for segment in flat for field in segment.fields if field in task.prompt_fields}
    inner = {field: _kind(recipe, s) for s in each.segments for field in s.fields if field != written} if each else {}
    return each.each if each else "", outer, inner


def _kind(recipe: Recipe, segment: SegmentSpec) -> Kind:
    return "text" if recipe.ports[segment.port].content == Content.TOKEN_IDS or segment.text else "picture"
