"""What the small files of run and checkpoint folders hold, as far as it is read again: the types that `stages.documents` checks."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from stages.documents import Document, Int, parse_toml, sound


class Input(Document):
    """One input of a run."""

    path: str | None = None
    fingerprint: str | None = None
    provenance: dict[str, Any] | None = None


class Machine(Document):
    """Where a run ran."""

    platform: str | None = None
    processor: str | None = None
    cpus: Int | None = None
    threads: Int | None = None
    gpus: list[str] | None = None


class Record(Document):
    """run.json, and the part of it that travels as provenance."""

    stage: str = ""
    command: list[str] | None = None
    seed: Int | None = None
    identity: dict[str, str] = Field(default={})
    recipe: str | None = None
    inputs: list[Input] = Field(default=[])
    versions: dict[str, str] | None = None
    git_commit: str | None = None
    machine: Machine | None = None
    started: str | None = None
    finished: str | None = None
    launches: list[dict[str, Any]] = Field(default=[])
    readme: str | None = None
    importer: str | None = None
    arguments: dict[str, Any] | None = None


class Status(Document):
    """status.json."""

    state: str = ""
    exit_code: Int | None = None
    stage: str = ""
    step: Int = 0
    of: Int | None = None
    message: str = ""


class MetricsLine(Document):
    """A line of metrics.jsonl: when, and how fast; any other number is a curve."""

    step: Int | float | None = None
    seconds: float | None = None
    encode_per_second: float | None = None
    decode_per_second: float | None = None
    height: Int | None = None
    width: Int | None = None


class Protocol(Document):
    """How a number was measured."""

    sampling: dict[str, Any] = Field(default={})


class ResultRow(Document):
    """One number of results.json."""

    metric: str
    category: str
    split: str
    n: Int
    value: float | None
    control: str | None
    interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    chance: float | None = None
    protocol: Protocol = Protocol()


class Results(Document):
    """results.json."""

    results: list[ResultRow] = Field(default=[])


class Shard(Document):
    """A tar that an index lists."""

    url: str


class ShardList(Document):
    """As much of shardindex.json as says which tars are its own."""

    shardlist: list[Shard]


class CheckpointConfig(Document):
    """config.json of a checkpoint of ours."""

    tokenizers: dict[str, str] = Field(default={})
    picture_size: Annotated[list[Int], Field(min_length=2, max_length=2)] | None = None
    grids: dict[str, list[Int]] = Field(default={})


class RecipeTables(Document):
    """What is read of a resolved recipe without loading it."""

    name: str = ""
    size: str = ""
    paper: dict[str, Any] = Field(default={})
    tasks: dict[str, Any] = Field(default={})
    sample: dict[str, Any] = Field(default={})


def recipe_tables(record: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved recipe that a run keeps as text, as plain tables; empty for runs without one. Raises DataError where it is no TOML."""
    return sound(parse_toml(record.get("recipe") or "", "run.json: recipe"), RecipeTables)
