"""What lies in the folders a report is made of: run records, metrics, results, recipes, and how runs descend from each other.

A folder tells what it is by its files: `results.json` makes it an evaluation, `model.safetensors` a checkpoint, tars a shard folder.
Evaluations of checkpoints hold the samples they judged in `samples/`. Nothing is assumed about other stages but these files.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from stages.errors import DataError, UsageError

Kind = Literal["evaluation", "checkpoint", "shards"]


@dataclass(frozen=True)
class Folder:
    """One run folder, read. `record` is its run.json, `metrics` the lines of metrics.jsonl, `results` the rows of results.json."""

    path: Path
    kind: Kind
    record: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    metrics: tuple[dict[str, Any], ...] = ()
    results: tuple[dict[str, Any], ...] = ()
    name: str = ""

    @property
    def recipe_toml(self) -> str:
        return self.record.get("recipe", "")

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as plain tables; empty for runs without one."""
        return tomllib.loads(self.recipe_toml)


def read_folders(paths: list[Path]) -> list[Folder]:
    """The folders in the order given, each once, followed by the samples an evaluation holds. Names are made different.

    Raises UsageError for a path that is no run folder.
    """
    found: dict[Path, Folder] = {}
    for path in paths:
        for folder in (path, path / "samples"):
            if folder == path or (holds_shards(folder) and (path / "results.json").exists()):
                found.setdefault(folder.resolve(), read_folder(folder))
    folders = list(found.values())
    names = distinct_names([folder.path.resolve() for folder in folders])
    return [Folder(**{**vars(folder), "name": name}) for folder, name in zip(folders, names, strict=True)]


def read_folder(path: Path) -> Folder:
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder", hint="report takes the folders that other stages wrote")
    kind: Kind
    if (path / "results.json").exists():
        kind = "evaluation"
    elif (path / "config.json").exists() or (path / "state").is_dir() or (path / "run.json").exists():
        kind = "checkpoint"
    elif holds_shards(path):
        kind = "shards"
    else:
        hint = "report takes the folders that other stages wrote"
        raise UsageError(f"{path}: neither shards, nor a checkpoint, nor an evaluation", hint=hint)
    meta = path / ".mmgen" if (path / ".mmgen" / "run.json").exists() else path
    results = read_json(path / "results.json").get("results", [])
    record, status, metrics = read_json(meta / "run.json"), read_json(meta / "status.json"), read_lines(meta / "metrics.jsonl")
    return Folder(path, kind, record, status, metrics, tuple(results))


def holds_shards(path: Path) -> bool:
    """Whether a folder holds tars, or is the parent of splits that do."""
    return path.is_dir() and (any(path.glob("*.tar")) or any(path.glob("*/*.tar")))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty when the file is absent."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: expected a JSON object, found {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_lines(path: Path) -> tuple[dict[str, Any], ...]:
    """The whole lines of a metrics.jsonl; the last one may have been cut by a kill."""
    if not path.exists():
        return ()
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return tuple(line for line in lines if isinstance(line, dict))


def distinct_names(paths: list[Path]) -> list[str]:
    """The shortest endings of the paths that tell them apart: runs/a/model and runs/b/model become a/model and b/model."""
    names = []
    for path in paths:
        length = 1
        while length < len(path.parts) and any(other != path and other.parts[-length:] == path.parts[-length:] for other in paths):
            length += 1
        names.append("/".join(path.parts[-length:]))
    return names


# --- provenance -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """One run on the way from the import to here, with the depth of the longest way to it."""

    path: str
    record: Mapping[str, Any]
    fingerprint: str
    depth: int


def chain(folders: list[Folder]) -> list[Link]:
    """Every run the folders descend from, and the folders themselves, each once, inputs before what was made of them.

    A record nests what was known of its inputs; where an input still lies where it was, its own run.json says more.
    """
    links: dict[str, Link] = {}

    def visit(path: str, record: Mapping[str, Any], fingerprint: str) -> int:
        depth = 0
        for entry in inputs_of(record):
            place, nested = str(entry.get("path") or ""), entry.get("provenance") or {}
            own = record_at(place, made_before=record.get("started")) if not nested.get("command") else {}
            depth = max(depth, 1 + visit(place, own or nested, str(entry.get("fingerprint") or "")))
        identity = identity_of(record) or f"{path} {fingerprint}"
        known = links.get(identity)
        if known is None:
            links[identity] = Link(path, record, fingerprint, depth)
        else:  # the fuller record wins, path and fingerprint are whichever are known, the longest way counts
            fuller = record if len(record) > len(known.record) else known.record
            links[identity] = Link(known.path or path, fuller, known.fingerprint or fingerprint, max(depth, known.depth))
        return depth

    for folder in folders:
        if folder.record:
            visit(str(folder.path), folder.record, "")
    return sorted(links.values(), key=lambda link: (link.depth, str(link.record.get("started", ""))))


def identity_of(record: Mapping[str, Any]) -> str:
    """What two records of one run have in common, however much of it each tells; empty for no record."""
    if not record.get("started"):
        return json.dumps({key: value for key, value in record.items() if key != "split"}, sort_keys=True) if record else ""
    return json.dumps([record.get("stage"), record.get("command"), record["started"]])


def inputs_of(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The inputs a record names, wherever it does: in `inputs`, or under names of its own such as `model` and `prompts`."""
    for name, value in record.items():
        if name == "joined" and isinstance(value, list):
            for inner in value:
                yield from inputs_of(inner)
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, Mapping) and "fingerprint" in entry and ("path" in entry or "provenance" in entry):
                yield entry


def record_at(path: str, *, made_before: str | None) -> dict[str, Any]:
    """The run.json of the folder an input was read from (or of the parent of its splits); empty if there is none, or if it tells of
    a run that ended after the input had been read."""
    if not path or "::" in path or "//" in path:
        return {}
    for folder in (Path(path), Path(path).parent):
        for file in (folder / ".mmgen" / "run.json", folder / "run.json"):
            record = read_json(file)
            if record and str(record.get("finished") or "9") <= str(made_before or "9"):
                return record
    return {}
