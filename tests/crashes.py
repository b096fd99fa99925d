"""Runs that die: a stage in a process of its own, killed without warning just before or just after one of its steps on the disk.

What a kill can tear apart is the order in which files appear. So every rename, deletion, new folder and flush to the disk is a place to
die at; `durable_steps` counts them, and `dies_at` kills the process at one. A fork costs nothing, the imports are done.
"""

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from mmgen_cli.door import Invocation, exit_code_of
from stages import stop

STEPS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")
OK, FAILED = 0, 77


def durable_steps(work: Callable[[], object]) -> int:
    """How many steps on the disk the work takes, when nobody kills it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        counts = [0]
        _watch(lambda after: counts.__setitem__(0, counts[0] + 1))
        code = _attempt(work)
        os.write(writing, str(counts[0]).encode())
        os._exit(code)
    _, status = os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        count = pipe.read()
    assert os.waitstatus_to_exitcode(status) == OK, "the work fails by itself"
    return int(count) // 2


def dies_at(work: Callable[[], object], step: int, *, after: bool = False) -> None:
    """Do the work in a process that is killed just before its `step`-th step on the disk (from 0), or just after."""
    child = os.fork()
    if child == 0:
        counts = {False: 0, True: 0}

        def kill(passed: bool) -> None:
            if passed == after and counts[passed] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            counts[passed] += 1

        _watch(kill)
        os._exit(_attempt(work))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (-signal.SIGKILL, OK), f"the work failed by itself ({code})"


def stopped_at(work: Callable[[], object], step: int, number: int) -> tuple[int, str]:
    """Do the work as the command line does, in a process group that gets a signal just before its `step`-th step on the disk.

    Exit code, and what it said on stderr.
    """
    with tempfile.TemporaryFile("w+") as told:
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(told.fileno(), 2)
            sys.stderr = told
            counts = [0]

            def send(passed: bool) -> None:
                if not passed:
                    counts[0] += 1  # before the signal, which raises here
                    if counts[0] == step + 1:
                        os.killpg(0, number)

            def run() -> None:
                work()

            with stop.listening():
                _watch(send)
                code = exit_code_of(run, Invocation(()))
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        told.seek(0)
        return os.waitstatus_to_exitcode(status), told.read()


def completes(work: Callable[[], object]) -> None:
    """Do the work in a process that nobody kills."""
    child = os.fork()
    if child == 0:
        os._exit(_attempt(work))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == OK, "the same command again did not get through"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is a result: tars with their indexes, weights, scores, cards; not what tells how and when they came about."""
    told = {"run.json", "status.json", "metrics.jsonl", "written.jsonl"}
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in told and "state" not in path.relative_to(folder).parts
    }


def _attempt(work: Callable[[], object]) -> int:
    try:
        work()
    except BaseException:
        traceback.print_exc()
        return FAILED
    return OK


def _watch(tell: Callable[[bool], None]) -> None:
    """Call `tell(False)` before and `tell(True)` after every step on the disk, in this process, for good."""

    def watched(function: Callable[..., object]) -> Callable[..., object]:
        def step(*args: object, **keys: object) -> object:
            tell(False)
            result = function(*args, **keys)
            tell(True)
            return result

        return step

    for name in STEPS:
        setattr(os, name, watched(getattr(os, name)))
