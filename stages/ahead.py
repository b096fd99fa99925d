"""Work done ahead: in a thread, while the caller is busy with something that leaves Python alone, or in processes."""

import contextlib
import copy
import os
import queue
import signal
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from stages import stop
from stages.errors import MmgenError

T = TypeVar("T")
_END: Any = object()
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 2.0  # how long a killed process may take to end: one that waits for a broken disk does not


def ahead(items: Iterator[T], depth: int = 2) -> Generator[T]:
    """The same items in the same order, made in another thread, up to `depth` of them before they are asked for.

    What `items` raises comes out where its next item would have. Close the iterator (`contextlib.closing`) where it may be left early:
    then nothing more is made, and when `close` returns the thread has ended.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        made = deque(thread.submit(next, items, _END) for _ in range(depth))
        while (item := made.popleft().result()) is not _END:
            made.append(thread.submit(next, items, _END))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


def aside(work: Callable[[], T]) -> T:
    """`work()`, done in a thread: for a call that is away from Python for long, so that a signal gets through. Then nobody waits for it."""
    results: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def attempt() -> None:
        try:
            results.put((True, work()))
        except BaseException as error:
            results.put((False, error))

    threading.Thread(target=attempt, daemon=True).start()
    made, value = results.get()
    if not made:
        raise value
    return value


class Workers(Iterator[T]):
    """`work(item)` for each of `items`, in their order, made by `count` forked processes, each up to `depth` results ahead and what fits a pipe.

    `begin` is called once in each of them. What `work` raises comes out where its result would have; a worker that is killed is an
    MmgenError. Workers leave signals to their parent, die with it, and are killed when this object is dropped or the process exits,
    whatever they are doing. While the caller waits for one it polls for a stop (`stages.stop`).
    """

    def __init__(
        self, work: Callable[[Any], T], items: Iterator[Any], count: int, depth: int, begin: Callable[[], object] = lambda: None
    ) -> None:
        self._results: list[queue.Queue[tuple[bool, Any]]] = []
        self._turn = 0
        parent, over = os.getpid(), threading.Event()
        processes: list[int] = []
        pipes: list[int] = []
        weakref.finalize(self, _kill, processes, over)
        for number in range(count):
            reading, writing = os.pipe()
            with stop.signals_blocked():
                process = os.fork()
                if process == 0:
                    try:
                        stop.leave_to_parent(parent)
                        for pipe in [*pipes, reading]:
                            os.close(pipe)
                        begin()
                        _labour(work, islice(items, number, None, count), Connection(writing, readable=False), parent)
                    finally:
                        os._exit(0)
            os.close(writing)
            processes.append(process)
            pipes.append(reading)
        for process, reading in zip(processes, pipes, strict=True):
            results: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
            self._results.append(results)
            threading.Thread(target=_receive, args=(process, reading, results, over), daemon=True).start()

    def __next__(self) -> T:
        results = self._results[self._turn]
        while True:
            with contextlib.suppress(queue.Empty):
                made, value = results.get(timeout=POLL_SECONDS)
                break
            stop.poll()
        if not made:
            raise value
        self._turn = (self._turn + 1) % len(self._results)
        return value


def _labour(work: Callable[[Any], Any], items: Iterator[Any], pipe: Connection, parent: int) -> None:
    """The life of a worker. It waits in `send` while enough results lie ready; a parent that is gone breaks the pipe."""
    for item in items:
        if os.getppid() != parent:
            return
        try:
            pipe.send((True, work(item)))
        except BrokenPipeError:
            return
        except Exception as error:
            pipe.send((False, _portable(error)))
    pipe.send((False, StopIteration()))


def _portable(error: Exception) -> Exception:
    """The error, if it can be made again at the other end of a pipe, else what it says."""
    try:
        copy.copy(error)
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


def _receive(process: int, reading: int, results: "queue.Queue[tuple[bool, Any]]", over: threading.Event) -> None:
    """A thread of the parent: puts what one worker sends where the caller waits for it, until there is no more."""

    def put(made: bool, value: Any) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                return results.put((made, value), timeout=POLL_SECONDS)

    with Connection(reading, writable=False) as pipe:
        try:
            while not over.is_set():
                put(*pipe.recv())
        except (EOFError, OSError):
            put(False, MmgenError(f"process {process}, which reads ahead, was killed", hint="out of memory? fewer --workers need less"))
        except Exception as error:  # what was sent cannot be put together again
            put(False, error)


def _kill(processes: list[int], over: threading.Event) -> None:
    """End the workers for good; SIGKILL also ends one that is stopped (SIGSTOP)."""
    over.set()
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_SECONDS
    for process in processes:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(process, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
                time.sleep(0.005)
