"""The run folder: what every stage leaves behind besides its result, and how a second launch finds its way back.

A stage wraps its work in `with Run(out, ...) as run`. That writes three small files, beside the weights of a checkpoint or in
`.mmgen/` of a shard folder: `run.json` (command, resolved recipe, seed, inputs, versions, machine), `status.json` (where it
stands, or how it ended, with the exit code torchrun hides) and `metrics.jsonl` (one object a line). Every file is whole at any
moment; a launch that was killed says `running` in its status and is continued by the next one.

Which files are the run's stands in `.mmgen/written.jsonl` (`stages/written.py`): `--overwrite` deletes these and nothing else.

Entering decides what `out` is: empty or absent (a fresh run), the same run (resume, or already complete), another run (an error
that names the keys that differ), or something mmgen did not write (an error). Identity is what determines the result: stage,
seed, limit, resolved recipe and the fingerprints of the inputs. `--max-steps` and `--max-minutes` only say where to stop.

SIGTERM, SIGHUP and Ctrl-C end what is going on with an exception, see `stages/stop.py`; how the run ended is written on the way out.
"""

import contextlib
import fcntl
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
from stages.data.index import INDEX, META, ShardEntry, read_index
from stages.data.shards import UNFINISHED
from stages.data.stream import SPOOL
from stages.documents import Document, parse_object, parse_toml, read_object
from stages.errors import DataError, MmgenError, Preempted, UsageError
from stages.files import append_line, make_folder, remove_file, write_atomic
from stages.inputs import refuse_overlap
from stages.options import RunOptions
from stages.progress import Progress
from stages.records import Record, Status
from stages.written import LIST, Content, Written, begin, content_of, files_below

State = Literal["running", "done", "stopped", "preempted", "failed"]

RUN_FILES = ("run.json", "status.json", "metrics.jsonl", "bad_samples.jsonl", "bad_batches.jsonl")
STATUS_SECONDS, STATUS_SHARE = 1.0, 0.02  # status.json is renewed as often as this, and as costs no more of the time
UNFINISHED_FILES = r"\..+\.\d+\.tmp"  # what a kill leaves of a file being written, see stages/files.py
FAILURE = ".failure.{rank}.tmp"  # how another rank than the first failed, in the words of status.json; such names go with the next launch
KEPT = f"{META}/{SPOOL}"
SAME_ON_RANKS = ("parallel", "device", "dtype", "max_steps", "on_bad_sample", "max_bad_fraction")  # beside what makes a run's identity
PACKAGES = ["mmgen-cli", "torch", "torchvision", "numpy", "pillow", "safetensors", "tokenizers", "huggingface_hub"]


class Run(contextlib.AbstractContextManager["Run"]):
    """One run of one stage in one folder.

    out       the folder, or "-" when the result goes to stdout: then `meta` is a temporary folder and nothing is kept.
    kind      "shards": the run's own files go to `out/.mmgen`; "checkpoint": they lie beside the weights.
    identity  further facts that determine the result (an importer's arguments, say), as printable values.
    inputs    one dict per input: `path` as the user typed it, `fingerprint`, and `provenance` (the input's own run, nested).
    reads     what else is read and is no part of the record, as it was typed. No input may be lost to --out: see stages/inputs.py.
    writes    the names, as glob patterns in `out`, that the run will give. What has one of them and is not of the run is an error
              at once, and not when the name is needed.

    resuming  there is an unfinished run of the same identity to continue.
    complete  this very run is already done: the stage returns at once.
    `with` raises UsageError when `out` holds another run, is in use by another process, is not mmgen's, or holds an input.
    With --overwrite all that is checked at once, and the old run is deleted when the new one writes its first file: one that fails
    before that, on a mistake in the recipe say, has taken nothing away.
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
        reads: Sequence[str | Path | None] = (),
        writes: Sequence[str] = (),
    ) -> None:
        self.streaming = str(out) == "-"
        self.out = Path(tempfile.mkdtemp(prefix="mmgen-")) if self.streaming else Path(out)
        self.meta = self.out / META if kind == "shards" else self.out
        self.stage, self.options, self.kind = stage, options, kind
        self.resolved_recipe = resolved_recipe
        self.inputs = [dict(entry) for entry in inputs]
        self.reads = [*(entry.get("path") for entry in self.inputs), *reads]
        self.writes = [*writes, *((self.meta / name).relative_to(self.out).as_posix() for name in RUN_FILES)]
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
        self._written: Written | None = None
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
        if not self.complete and self.rank != 0 and not self.streaming:
            self._written = Written(self.out, self.rank)
            self._written.read()
            self._written.attach()
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
        append_line(self.meta / "metrics.jsonl", json.dumps(finite))

    def cut_metrics(self, step: int) -> None:
        """Drops what metrics.jsonl says about steps after `step`: they are about to be made again. Lines without a step stay."""
        path = self.meta / "metrics.jsonl"
        if self.rank != 0 or self._to_begin or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                reached = parse_object(line, path).get("step", 0)
            except DataError:  # the line a kill cut short
                continue
            if isinstance(reached, int | float) and reached <= step:
                kept.append(line + "\n")
        write_atomic(path, "".join(kept), rewritten=True)

    def finish(self, state: Literal["done", "stopped"] = "done", message: str = "") -> None:
        """Ends the run well: `done`, or `stopped` early by --max-steps or --max-minutes. Leaving the `with` does it for `done`."""
        with stop.deferred(then_stop=False):
            self._end(state, 0, message)
        self._progress.close()
        self.say(f"{self.stage}: {state}" + (f", {message}" if message else ""))

    def begin(self) -> None:
        """Where the run replaces another: delete that now, and not when the first file is written."""
        begin(self.meta / "run.json")

    # the folder

    def _claim(self) -> None:
        """Makes `out` this run's: fresh, continued or complete. Raises UsageError when it belongs to somebody else."""
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"--out {self.out} is a file, expected a folder")
        if self.out.name == META:
            raise UsageError(f"--out {self.out}: {META} is where mmgen keeps its own files", hint="name another folder with --out")
        refuse_overlap(self.out, [*self.reads, self._recipe_file()], adds_tars=self.kind == "shards")
        begin(self.out)
        make_folder(self.out)
        self._lock = _lock_folder(self.out)
        written = self._written = Written(self.out)
        written.read()
        self._forget_failed(written)
        before = _read_own(self.meta / "run.json", Record)
        replaces = before is not None and self.options.overwrite
        if before is None:
            ours = re.compile(rf"{re.escape(META)}|{UNFINISHED_FILES}")
            there = sorted(path.name for path in self.out.iterdir() if not ours.fullmatch(path.name) and not written.lists(path))
            if there:
                held = ", ".join(there[:4]) + (f" and {len(there) - 4} more" if len(there) > 4 else "")
                raise UsageError(f"--out {self.out} is not a run of mmgen: it holds {held}", hint="name a new folder with --out")
            left = written.doomed(keep=KEPT, scratch=False)
            replaces = bool(left)
            if left and not self.options.overwrite:
                raise UsageError(
                    f"--out {self.out} holds what is left of a run that was being deleted, such as {left[0]}",
                    hint="name a new folder with --out, or delete it with --overwrite",
                )
        elif not self.options.overwrite:
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
        if self.complete:
            return
        if before is not None and not written.lists(self.meta / "run.json"):
            adopt(written, self.meta, self.writes if self.resuming else None)
        self._check_names(written)
        if replaces:
            written.doomed(keep=self._kept)
            written.before_first_write = self._replace
            written.attach()
        else:
            self._start(before)

    @property
    def _kept(self) -> str | None:
        """What was just read from stdin is not deleted."""
        return KEPT if any(entry.get("path") == "-" for entry in self.inputs) else None

    @property
    def _to_begin(self) -> bool:
        return self._written is not None and self._written.before_first_write is not None

    def _recipe_file(self) -> str | None:
        """The recipe where it is a file and this run may delete one; a run that goes on may well be given its own."""
        if not (self.options.overwrite and self.options.recipe):
            return None
        from stages.recipe import recipe_names

        return None if self.options.recipe in recipe_names() else self.options.recipe

    def _check_names(self, written: Written) -> None:
        """Raises UsageError where something that is not of the run has a name that it will give, or is a tar among its tars."""
        taken = [path for pattern in self.writes for path in self.out.glob(pattern)]
        taken += [inner for path in taken if path.is_dir() for inner in files_below(path)]
        if self.options.overwrite:
            folders = {
                path.parent for path in written.doomed() if path.suffix == ".tar" and META not in path.relative_to(written.root).parts
            }
            taken += [path for folder in sorted(folders) for path in folder.glob("*.tar")]
        for path in taken:
            if not written.lists(path):
                raise UsageError(f"{path} is not of this run, which is about to write there", hint="move it away, or name another --out")

    def _replace(self) -> None:
        assert self._written is not None
        self._check_names(self._written)
        self._written.delete(first=[self.meta / "status.json", self.meta / "run.json"], keep=self._kept)
        self._start(None)

    def _start(self, before: dict[str, Any] | None) -> None:
        assert self._written is not None
        self._written.tidy()
        self._written.attach()
        make_folder(self.meta)
        for path in self.meta.glob(FAILURE.format(rank="*")):  # of an earlier launch
            remove_file(path)
        self._record = self._describe(before)
        self._write_record()
        self._write_status()

    def _forget_failed(self, written: Written) -> None:
        """Clears away the record of another run that failed before it made anything, on a mistake say: there is nothing to protect."""
        for meta in (self.out, self.out / META):
            run, status = meta / "run.json", meta / "status.json"
            if (_read_own(status, Status) or {}).get("state") != "failed":
                continue
            there = {path for path in files_below(self.out) if path.parent != self.out / META or not LIST.fullmatch(path.name)}
            if there == {run, status} and _differences((_read_own(run, Record) or {}).get("identity", {}), self.identity):
                for path in (run, status):
                    path.unlink()
                    written.forget(path)

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
        if self._to_begin and exit_code:
            return  # nothing was written, and what is there is another run's
        self.begin()
        self._status |= {"state": state, "exit_code": exit_code, "message": message}
        if self.rank != 0:
            if state == "failed":  # the first rank may know nothing of it
                write_atomic(self.meta / FAILURE.format(rank=self.rank), json.dumps(self._status))
            return
        if state in ("preempted", "stopped"):  # because another rank failed?
            self._status |= next((told for path in self.meta.glob(FAILURE.format(rank="*")) if (told := _read_own(path, Status))), {})
            state = self._status["state"]
        assert self._written is not None
        self._written.rewrite()  # before the state says `done`: a run that is complete is not touched again
        self._record["finished"] = _now()
        self._record["launches"][-1] |= {"finished": self._record["finished"], "state": state}
        self._write_record()
        self._write_status()

    def _write_record(self) -> None:
        write_atomic(self.meta / "run.json", json.dumps(self._record, indent=2) + "\n", rewritten=True)

    def _write_status(self) -> None:
        began = time.monotonic()
        if self.rank == 0 and not self._to_begin:
            write_atomic(self.meta / "status.json", json.dumps(self._status) + "\n", rewritten=True)
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
        if self._written is not None:
            self._written.detach()
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


def adopt(written: Written, meta: Path, names: Sequence[str] | None) -> None:
    """Lists what an earlier version wrote, which kept no list: that which it recorded the hash of, and its own records.

    names: what a run that goes on will write; what has one of these names is taken to be of the run. None: the run is to be deleted,
    and a file that nothing is recorded of raises UsageError.
    """
    out, ours = written.root, [Path(os.path.abspath(meta))]
    known: dict[Path, Content | None] = {}
    for folder in [out, *(path for path in out.iterdir() if path.is_dir() and not path.is_symlink())]:
        own, entries = folder / META, []
        with contextlib.suppress(MmgenError):
            index = read_index(folder)
            entries = index.shardlist if index else []
        for path in own.glob(f"{UNFINISHED}/*.json"):
            with contextlib.suppress(ValueError, LookupError, TypeError, OSError):
                entries.append(ShardEntry.model_validate(json.loads(path.read_bytes())["entry"]))
        known |= {folder / entry.name: (entry.bytes, entry.sha256) for entry in entries}
        ours += [own] if entries else []
    known |= {folder / name: None for folder in ours for name in (INDEX, *RUN_FILES)}
    readme = out / "README.md"
    if readme.is_file() and (_read_own(meta / "run.json", Record) or {}).get("readme") == content_of(readme)[1]:
        known[readme] = content_of(readme)
    if names is not None:
        named = {path for name in names for path in out.glob(name) if path.suffix != ".tar" and path != readme}
        for path in files_below(out):
            if (
                path not in known
                and path.is_file()
                and (not named.isdisjoint([path, *path.parents]) or path.parent.name == META or META in path.parts)
            ):
                known[path] = content_of(path)
    for path in files_below(out):
        if path in known:
            written.adopt(path, known[path])
        elif names is None:
            raise UsageError(
                f"--out {out} was written by an earlier version of mmgen, which did not list its files; {path.relative_to(out)} may not be one of them",
                hint="delete the folder yourself, or name another --out",
            )


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


def _read_own(path: Path, kind: type[Document]) -> dict[str, Any] | None:
    """What an earlier launch wrote, None where there is none. UsageError where that is not what it is."""
    return read_object(path, kind, error=UsageError, hint="name a new folder with --out") if path.exists() else None
