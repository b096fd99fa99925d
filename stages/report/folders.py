"""What lies in the folders a report is made of: run records, metrics, results, recipes, and how runs descend from each other.

A folder tells what it is by its files: `results.json` makes it an evaluation, `model.safetensors` a checkpoint, tars a shard folder.
Evaluations of checkpoints hold the samples they judged in `samples/`. Nothing is assumed about other stages but these files.

A run may come from anywhere, so its files may hold anything. What is not of its kind (a text where a number belongs, NaN, a list for a
table) is left out here, once: the page shows a dash or nothing for it.
"""

import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from stages.errors import DataError, UsageError
from stages.files import inside, read_text_inside

Kind = Literal["evaluation", "checkpoint", "shards"]

TABLES = ("machine", "versions", "arguments", "provenance")  # of a run's record, what is an object; of a recipe likewise:
RECIPE_TABLES = ("paper", "tasks", "ports", "backbones", "autoencoders", "tokenizers")
MAX_CHAIN = 100  # runs above each other


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
        return self.record.get("recipe") or ""

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as plain tables; empty for runs without one, or with one that is no TOML."""
        try:
            tables = tomllib.loads(self.recipe_toml)
        except (ValueError, RecursionError):
            return {}
        return {name: value for name, value in tables.items() if isinstance(value, dict) or name not in RECIPE_TABLES}

    @property
    def step(self) -> int:
        """The step its status tells; 0 without one."""
        return int(number(self.status.get("step")) or 0)


def number(value: object) -> int | float | None:
    """A number that a page can print and a chart can place; None for anything else, NaN and infinities among them."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None
    return value if abs(value) > 1e-100 else 0


def result_of(entry: object, where: str) -> dict[str, Any]:
    """A row of results.json with all its keys; a number that is none is None. DataError for what is no row."""
    if not isinstance(entry, dict) or not isinstance(entry.get("metric"), str):
        raise DataError(f"{where}: expected objects with a metric, found {entry!s:.80}", hint="`mmgen eval` writes results.json")
    interval = entry.get("interval")
    bounds = [number(bound) for bound in interval] if isinstance(interval, list) and len(interval) == 2 else [None]
    protocol = entry.get("protocol")
    return {
        "metric": entry["metric"],
        "category": str(entry.get("category") or ""),
        "split": str(entry.get("split") or ""),
        "control": str(entry["control"]) if entry.get("control") else None,
        "value": number(entry.get("value")),
        "interval": bounds if None not in bounds else None,
        "chance": number(entry.get("chance")),
        "n": number(entry.get("n")),
        "protocol": protocol if isinstance(protocol, dict) else {},
    }


def record_of(value: object) -> dict[str, Any]:
    """What can be used of a run's record: its command and other words as text, its inputs and tables as far as they are such."""
    if not isinstance(value, Mapping):
        return {}
    record: dict[str, Any] = {}
    for name, entry in value.items():
        if name in TABLES or name in ("inputs", "joined"):
            if name in TABLES and isinstance(entry, dict):
                record[name] = entry
            elif name not in TABLES and isinstance(entry, list):
                record[name] = [inner for inner in entry if isinstance(inner, dict)]
        elif name == "command":
            record[name] = [str(word) for word in entry] if isinstance(entry, list) else []
        elif name in ("stage", "importer", "started", "finished", "recipe", "git_commit"):
            if isinstance(entry, str):
                record[name] = entry
        else:
            record[name] = entry
    return record


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
    meta = path / ".mmgen" if inside(path, ".mmgen", "run.json") else path
    results = read_json(path / "results.json").get("results", [])
    if not isinstance(results, list):
        raise DataError(f"{path / 'results.json'}: results: expected a list, found {type(results).__name__}")
    rows = tuple(result_of(entry, f"{path / 'results.json'}: results") for entry in results)
    record, status, metrics = read_json(meta / "run.json"), read_json(meta / "status.json"), read_lines(meta / "metrics.jsonl")
    return Folder(path, kind, record_of(record), status, metrics, rows)


def holds_shards(path: Path) -> bool:
    """Whether a folder holds tars, or is the parent of splits that do."""
    return path.is_dir() and (any(path.glob("*.tar")) or any(path.glob("*/*.tar")))


def parsed(text: str) -> Any:
    """A JSON value in which numbers that are not finite are null."""

    def finite(digits: str) -> float | None:
        return value if math.isfinite(value := float(digits)) else None

    return json.loads(text, parse_float=finite, parse_constant=lambda name: None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty when the file is absent."""
    text = read_text_inside(path.parent, path.name)
    if text is None:
        return {}
    try:
        value = parsed(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected a JSON object, found {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_lines(path: Path) -> tuple[dict[str, Any], ...]:
    """The whole lines of a metrics.jsonl; the last one may have been cut by a kill."""
    lines = []
    for line in (read_text_inside(path.parent, path.name) or "").split("\n"):  # not splitlines: U+2028 may stand in a string
        try:
            lines.append(parsed(line))
        except (ValueError, RecursionError):
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
    known_depths: dict[str, int] = {}  # of folders whose own record was read: each is followed once, also where two name each other

    def visit(path: str, record: Mapping[str, Any], fingerprint: str, above: int = 0) -> int:
        depth = 0
        for entry in inputs_of(record) if above < MAX_CHAIN else ():
            place, nested = str(entry.get("path") or ""), record_of(entry.get("provenance"))
            own = record_at(place, made_before=record.get("started")) if not nested.get("command") else {}
            if own and place in known_depths:
                depth = max(depth, 1 + known_depths[place])
                continue
            if own:
                known_depths[place] = 0
            below = visit(place, own or nested, str(entry.get("fingerprint") or ""), above + 1)
            if own:
                known_depths[place] = below
            depth = max(depth, 1 + below)
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
                yield from inputs_of(inner) if isinstance(inner, Mapping) else ()
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
            try:
                record = record_of(read_json(file))
            except (OSError, DataError):  # no name of a file; or what lies there now, which is not part of this report
                continue
            if record and str(record.get("finished") or "9") <= str(made_before or "9"):
                return record
    return {}
