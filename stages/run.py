"""The run folder: what every stage leaves behind besides its result, and how a second launch finds its way back.

A stage wraps its work in `with Run(out, ...) as run`. That writes three small files, beside the weights of a checkpoint or in
`.mmgen/` of a shard folder: `run.json` (command, resolved recipe, seed, inputs, versions, machine), `status.json` (where it
stands, or how it ended, with the exit code torchrun hides) and `metrics.jsonl` (one object a line). Every file is whole at any
moment; a launch that was killed says `running` in its status and is continued by the next one.

Entering decides what `out` is: empty or absent (a fresh run), the same run (resume, or already complete), another run (an error
that names the keys that differ), or something mmgen did not write (an error). Identity is what determines the result: stage,
seed, limit, resolved recipe and the fingerprints of the inputs. `--max-steps` and `--max-minutes` only say where to stop.

SIGTERM, SIGHUP and Ctrl-C end what is going on with an exception, see `stages/stop.py`; how the run ended is written on the way out.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from stages import stop
from stages.data.stream import SPOOL
from stages.documents import Document, parse_object, parse_toml, read_object
from stages.errors import DataError, MmgenError, Preempted, UsageError
from stages.files import write_atomic
from stages.options import RunOptions
from stages.progress import Progress
from stages.records import Record, ShardList, Status

State = Literal["running", "done", "stopped", "preempted", "failed"]

RUN_FILES = r"(run|status)\.json|(metrics|bad_samples|bad_batches)\.jsonl"
CHECKPOINT_FILES = r"model.*\.safetensors(\.index\.json)?|(config|tokenizer|tokenizer_config)\.json|recipe\.toml|state|tokenizers"
RESULTS = {"eval": r"results\.json|samples|controls", "sample": "files"}  # stage → what else it writes in the open
SHARD_FILES = r".+-\d{6,}\.tar"
STATUS_SECONDS, STATUS_SHARE = 1.0, 0.02  # status.json is renewed as often as this, and as costs no more of the time
UNFINISHED_FILES = r"\..+\.\d+\.tmp"  # what a kill leaves of a file being written, see stages/files.py
FAILURE = ".failure.{rank}.tmp"  # how another rank than the first failed, in the words of status.json; such names go with the next launch
SAME_ON_RANKS = ("parallel", "device", "dtype", "max_steps", "on_bad_sample", "max_bad_fraction")  # beside what makes a run's identity
PACKAGES = ["mmgen-cli", "torch", "torchvision", "numpy", "pillow", "safetensors", "tokenizers", "huggingface_hub"]


class Run(contextlib.AbstractContextManager["Run"]):
    """One run of one stage in one folder.

    out       the folder, or "-" when the result goes to stdout: then `meta` is a temporary folder and nothing is kept.
    kind      "shards": the run's own files go to `out/.mmgen`; "checkpoint": they lie beside the weights.
    identity  further facts that determine the result (an importer's arguments, say), as printable values.
    inputs    one dict per input: `path` as the user typed it, `fingerprint`, and `provenance` (the input's own run, nested).

    resuming  there is an unfinished run of the same identity to continue.
    complete  this very run is already done: the stage returns at once.
    `with` raises UsageError when `out` holds another run, is in use by another process, or is not mmgen's.
    Under torchrun only rank 0 writes; the others share its verdict.
    """

    def __init__(
        self,
        out: Path | str,
        *,
        stage: str,
        options: RunOptions,
        kind: Literal["shards", "checkpoint"],
        identity: Mapping[str, object] | None = None,
        resolved_recipe: str = "",
        inputs: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.streaming = str(out) == "-"
        self.out = Path(tempfile.mkdtemp(prefix="mmgen-")) if self.streaming else Path(out)
        self.meta = self.out / ".mmgen" if kind == "shards" else self.out
        self.stage, self.options, self.kind = stage, options, kind
        self.resolved_recipe = resolved_recipe
        self.inputs = [dict(entry) for entry in inputs]
        self.identity = run_identity(stage, options, resolved_recipe, self.inputs, identity or {})
        self.rank = int(os.environ.get("RANK", "0"))
        self.resuming = False
        self.complete = False
        self._status: dict[str, Any] = {"state": "running", "exit_code": None, "stage": stage, "step": 0, "of": None, "message": ""}
        self._record: dict[str, Any] = {}
        self._next_write = 0.0
        self._finished = False
        self._lock: int | None = None
        self._listening = contextlib.ExitStack()
        self._progress = Progress(stage, quiet=options.quiet or self.rank != 0)

    # entering and leaving

    def __enter__(self) -> Self:
        if (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1 and _group() is None:
            raise UsageError(f"{self.stage} is the work of one process, and {count} ranks were started", hint="run it without torchrun")
        self._listening.enter_context(stop.listening(self._announce))
        try:
            self._compare_ranks()
            with stop.deferred(then_stop=False):
                self._begin()
        except BaseException:
            self._release()
            raise
        try:
            stop.poll()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _begin(self) -> None:
        """The verdict of the first rank on `out`, on all of them."""
        verdict: dict[str, Any] = {}
        if self.rank == 0:
            try:
                self._claim()
            except MmgenError as error:
                verdict["error"] = error
            except OSError as error:
                verdict["error"] = UsageError(
                    f"--out {self.out} cannot be written: {error.strerror}", hint="name another folder with --out"
                )
        verdict |= {"resuming": self.resuming, "complete": self.complete}
        verdict = _shared_by_ranks(verdict)
        self.resuming, self.complete = verdict["resuming"], verdict["complete"]
        if "error" in verdict:
            raise verdict["error"]
        if self.resuming:
            self.say(f"continuing the {self.stage} run in {self.out}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        instead = stop.lost_rank(error) if error is not None else None
        ended = instead or error
        try:
            with stop.deferred(then_stop=ended is None):
                stopped_late = self._finished and isinstance(ended, Preempted | KeyboardInterrupt)
                if self.complete and ended is None:
                    self.say(f"{self.out} is already complete; nothing to do")
                elif ended is None and not self._finished:
                    self.finish()
                elif ended is not None and not self.complete and not stopped_late:
                    with contextlib.suppress(OSError):  # on a full disk this cannot be written either, and is not what to tell
                        self._end(*_ending(ended))
        finally:
            self._progress.close()
            self._release()
        if instead is not None:
            raise instead from error

    # while running

    def status(self, *, step: int | None = None, of: int | None = None, message: str | None = None) -> None:
        """Says where the run stands, on stderr and (at most once a second) in status.json. A stop that was asked for happens here, if not
        before."""
        if not stop.deferring():
            stop.poll()
        for name, value in (("step", step), ("of", of), ("message", message)):
            if value is not None:
                self._status[name] = value
        self._progress.update(self._status["step"], self._status["of"], self._status["message"])
        if time.monotonic() >= self._next_write:
            self._write_status()

    def say(self, message: str) -> None:
        """One line for the person watching, on stderr."""
        self._progress.say(message)

    def log(self, **numbers: object) -> None:
        """Appends one line to metrics.jsonl. A number that is not finite is written as null: JSON has no other word for it."""
        if self.rank != 0:
            return
        finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in numbers.items()}
        with open(self.meta / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Drops what metrics.jsonl says about steps after `step`: they are about to be made again. Lines without a step stay."""
        path = self.meta / "metrics.jsonl"
        if self.rank != 0 or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                reached = parse_object(line, path).get("step", 0)
            except DataError:  # the line a kill cut short
                continue
            if isinstance(reached, int | float) and reached <= step:
                kept.append(line + "\n")
        write_atomic(path, "".join(kept))

    def finish(self, state: Literal["done", "stopped"] = "done", message: str = "") -> None:
        """Ends the run well: `done`, or `stopped` early by --max-steps or --max-minutes. Leaving the `with` does it for `done`."""
        with stop.deferred(then_stop=False):
            self._end(state, 0, message)
        self._progress.close()
        self.say(f"{self.stage}: {state}" + (f", {message}" if message else ""))

    # the folder

    def _claim(self) -> None:
        """Makes `out` this run's: fresh, continued or complete. Raises UsageError when it belongs to somebody else."""
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"--out {self.out} is a file, expected a folder")
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock = _lock_folder(self.out)
        self._forget_failed()
        before = _read_own(self.meta / "run.json", Record)
        if before is None:
            ours = re.compile(rf"\.mmgen|{UNFINISHED_FILES}")
            there = sorted(path.name for path in self.out.iterdir() if not ours.fullmatch(path.name))
            if there:
                held = ", ".join(there[:4]) + (f" and {len(there) - 4} more" if len(there) > 4 else "")
                raise UsageError(f"--out {self.out} is not a run of mmgen: it holds {held}", hint="name a new folder with --out")
        elif self.options.overwrite:
            remove_run(self.out, keep_spool=any(entry.get("path") == "-" for entry in self.inputs))
            before = None
        else:
            ended = _read_own(self.meta / "status.json", Status) or {}
            differing = _differences(before.get("identity", {}), self.identity)
            if differing:
                raise UsageError(
                    f"--out {self.out} holds another run:",
                    details=differing,
                    hint="name a new folder with --out, or start again with --overwrite",
                )
            self.complete = ended.get("state") == "done"
            self.resuming = not self.complete
            self._status["step"], self._status["of"] = ended.get("step", 0), ended.get("of")
        if not self.complete:
            for path in self.out.rglob(".*.tmp"):
                if path.is_file() and re.fullmatch(UNFINISHED_FILES, path.name):
                    path.unlink()
            self.meta.mkdir(parents=True, exist_ok=True)
            self._record = self._describe(before)
            self._write_record()
            self._write_status()

    def _forget_failed(self) -> None:
        """Clears away the record of another run that failed before it made anything, on a mistake say: there is nothing to protect."""
        there = {path for path in self.out.rglob("*") if not path.is_dir()}
        for meta in (self.out, self.out / ".mmgen"):
            run, status = meta / "run.json", meta / "status.json"
            if there != {run, status} or (_read_own(status, Status) or {}).get("state") != "failed":
                continue
            if _differences((_read_own(run, Record) or {}).get("identity", {}), self.identity):
                run.unlink()
                status.unlink()

    def _describe(self, before: dict[str, Any] | None) -> dict[str, Any]:
        now = _now()
        launches = list(before.get("launches", [])) if before else []
        return {
            "stage": self.stage,
            "command": list(self.options.command),
            "seed": self.options.seed,
            "identity": self.identity,
            "recipe": self.resolved_recipe,
            "inputs": self.inputs,
            "versions": _versions(),
            "git_commit": _git_commit(),
            "machine": _machine(),
            "started": (before or {}).get("started") or now,
            "finished": None,
            "launches": [*launches, {"command": list(self.options.command), "started": now, "finished": None, "state": "running"}],
        }

    def _end(self, state: State, exit_code: int, message: str) -> None:
        self._finished = True
        self._status |= {"state": state, "exit_code": exit_code, "message": message}
        if self.rank != 0:
            if state == "failed":  # the first rank may know nothing of it
                write_atomic(self.meta / FAILURE.format(rank=self.rank), json.dumps(self._status))
            return
        if state in ("preempted", "stopped"):  # because another rank failed?
            self._status |= next((told for path in self.meta.glob(FAILURE.format(rank="*")) if (told := _read_own(path, Status))), {})
            state = self._status["state"]
        self._record["finished"] = _now()
        self._record["launches"][-1] |= {"finished": self._record["finished"], "state": state}
        readme = self.out / "README.md"
        self._record["readme"] = _sha256(readme) if readme.exists() else None
        self._write_record()
        self._write_status()

    def _write_record(self) -> None:
        write_atomic(self.meta / "run.json", json.dumps(self._record, indent=2) + "\n")

    def _write_status(self) -> None:
        began = time.monotonic()
        if self.rank == 0:
            write_atomic(self.meta / "status.json", json.dumps(self._status) + "\n")
        self._next_write = (ended := time.monotonic()) + max(STATUS_SECONDS, (ended - began) / STATUS_SHARE)

    # signals and ranks

    def _announce(self, text: str) -> None:
        """Says something from within a signal handler."""
        if not self.options.quiet and self.rank == 0:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{self.stage}: {text}\n".encode())

    def _compare_ranks(self) -> None:
        """Ranks that were started with different things would wait for each other for ever, or mix what they make."""
        if (group := _group()) is None:
            return
        flags = {f"--{name.replace('_', '-')}": str(getattr(self.options, name)) for name in SAME_ON_RANKS}
        everyone: list[Any] = [None] * group.get_world_size()
        group.all_gather_object(everyone, {"--out": str(self.out), **self.identity, **flags})
        for rank, other in enumerate(everyone):
            if differing := _differences(everyone[0], other, "rank 0", f"rank {rank}"):
                raise UsageError(
                    f"ranks 0 and {rank} were started with different things:",
                    details=differing,
                    hint="give every rank the same command, and the same data on every machine",
                )

    def _release(self) -> None:
        self._listening.close()
        if self._lock is not None:
            os.close(self._lock)
            _locks.discard(self._lock)
            self._lock = None
        if self.streaming:
            shutil.rmtree(self.out, ignore_errors=True)


def run_identity(
    stage: str, options: RunOptions, resolved_recipe: str, inputs: Sequence[Mapping[str, Any]], more: Mapping[str, object]
) -> dict[str, str]:
    """What determines a run's result, flat: address → printed value. Two runs of equal identity write equal bytes."""
    identity = {"stage": stage, "seed": str(options.seed), "limit": str(options.limit)}
    identity |= {f"recipe.{address}": value for address, value in _flat(parse_toml(resolved_recipe, "the resolved recipe"))}
    for number, entry in enumerate(inputs):
        identity[f"input {number + 1} ({entry.get('role', 'data')})"] = str(entry.get("fingerprint"))
    return identity | {name: str(value) for name, value in more.items()}


def remove_run(out: Path, *, keep_spool: bool = False) -> None:
    """Deletes what mmgen wrote in `out` and nothing else; for --overwrite. `keep_spool` spares what was just read from stdin.

    A shard folder loses the tars its index lists (without an index: those named like shards, left by a killed run) and `.mmgen`;
    a checkpoint folder the files of a checkpoint. README.md goes when it is still the one the run wrote. Unknown files stay;
    unknown tars raise UsageError before anything is deleted, because they would be read as part of the new data.
    """
    doomed = [path for path in _written_files(out) if not (keep_spool and path == out / ".mmgen" / SPOOL)]
    for path in doomed:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    for folder in sorted({path.parent for path in doomed} - {out}, reverse=True):  # children before parents
        if not any(folder.iterdir()):
            folder.rmdir()


def _written_files(out: Path) -> Iterator[Path]:
    record = _read_own(out / "run.json", Record) or _read_own(out / ".mmgen" / "run.json", Record) or {}
    readme = out / "README.md"
    if readme.is_file() and record.get("readme") == _sha256(readme):
        yield readme
    patterns = [RUN_FILES, CHECKPOINT_FILES] if (out / "run.json").exists() else []
    named = re.compile("|".join([*patterns, RESULTS.get(record.get("stage", ""), r"(?!)")]))
    yield from (path for path in out.iterdir() if named.fullmatch(path.name))
    for folder in [out, *(path for path in out.iterdir() if _is_split(path))]:
        index = _read_own(folder / ".mmgen" / "shardindex.json", ShardList)
        listed = {Path(shard["url"]).name for shard in index["shardlist"]} if index else None
        for path in folder.glob("*.tar"):
            if path.name in listed if listed is not None else re.fullmatch(SHARD_FILES, path.name):
                yield path
            else:
                raise UsageError(f"{path} is not of this run, but would be read with the new one", hint="move it away, or name a new --out")
        if (folder / ".mmgen").is_dir():
            yield from (folder / ".mmgen").iterdir()


def _is_split(folder: Path) -> bool:
    """Whether a folder holds the shards of one split, finished (an index) or cut short by a kill (nothing but tars named like ours)."""
    if not folder.is_dir() or folder.name.startswith("."):
        return False
    return (folder / ".mmgen").is_dir() or all(re.fullmatch(SHARD_FILES, path.name) for path in folder.iterdir())


def _differences(there: Mapping[str, str], here: Mapping[str, str], theirs: str = "there", ours: str = "here") -> list[str]:
    """One line per key whose value differs, at most ten."""
    keys = [key for key in [*here, *(key for key in there if key not in here)] if there.get(key) != here.get(key)]
    lines = [f"{key}: {theirs} {there.get(key, '(absent)')}, {ours} {here.get(key, '(absent)')}" for key in keys[:10]]
    return lines + ([f"and {len(keys) - 10} more"] if len(keys) > 10 else [])


def _flat(value: object, address: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{address}.{key}" if address else key)
    elif isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{address}.{number}")
    else:
        yield address, repr(value) if isinstance(value, str) else str(value)


def _ending(error: BaseException) -> tuple[State, int, str]:
    if isinstance(error, Preempted):
        return "preempted", error.exit_code, error.message
    if isinstance(error, MmgenError):
        return "failed", error.exit_code, error.message
    if isinstance(error, KeyboardInterrupt):
        return "stopped", 130, str(error) or "interrupted"
    return "failed", 1, f"{type(error).__name__}: {error}"


# Folders this process writes to. A flock belongs to the open file, which a forked data worker would keep open after its parent
# was killed; so children close theirs, and the next launch does not have to wait for orphans.
_locks: set[int] = set()


def _close_locks() -> None:
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_close_locks)


def _lock_folder(folder: Path) -> int | None:
    """Holds the folder until closed or until the process dies, without leaving a file. None where the file system cannot lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(f"another mmgen process is writing to {folder}", hint="wait for it, or name another --out") from None
    except OSError:
        os.close(descriptor)
        return None
    _locks.add(descriptor)
    return descriptor


def _group() -> Any:
    """torch.distributed, where ranks have joined (see stages/ranks.py); None for a process on its own, which may not have loaded torch."""
    torch = sys.modules.get("torch")
    return torch.distributed if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized() else None


def _shared_by_ranks(verdict: dict[str, Any]) -> dict[str, Any]:
    """Rank 0's verdict, on every rank."""
    if (group := _group()) is None:
        return verdict
    box = [verdict]
    group.broadcast_object_list(box, src=0)
    return box[0]


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _git_commit() -> str | None:
    """The commit of the checkout this code runs from, with `-dirty` when it was edited; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    quietly = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # reading must not get in the way of a commit, nor leave a lock when it is killed
    try:
        command = [
            "git",
            "status",
            "--porcelain=v2",
            "--branch",
            "--untracked-files=no",
        ]  # `describe --dirty` would take the lock all the same
        answer = subprocess.run(command, cwd=root, env=quietly, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.splitlines()
    commit = next((line.removeprefix("# branch.oid ") for line in lines if line.startswith("# branch.oid ")), None)
    edited = any(not line.startswith("#") for line in lines)
    return f"{commit}-dirty" if commit and edited else commit


def _machine() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    machine: dict[str, Any] = {"platform": platform.platform(), "processor": platform.machine(), "cpus": os.cpu_count()}
    machine["threads"] = torch.get_num_threads() if torch is not None else None
    if torch is not None and torch.cuda.is_available():
        machine["gpus"] = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return machine


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_own(path: Path, kind: type[Document]) -> dict[str, Any] | None:
    """What an earlier launch wrote, None where there is none. UsageError where that is not what it is."""
    return read_object(path, kind, error=UsageError, hint="name a new folder with --out") if path.exists() else None
