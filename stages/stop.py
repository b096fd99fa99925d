"""A stop asked for from outside: SIGTERM and SIGHUP (exit code 75), SIGINT (130).

It comes as an exception, wherever in Python the main thread is, and no `except Exception` takes it for something else: every file is
whole at any moment, so nothing has to be tidied up first. Only where a state is to be saved first, inside `deferred()`, it waits: that
code polls for it. The first signal counts; of those that follow, only a second Ctrl-C does anything: it aborts at once.

A signal that was ignored when the process began (`nohup`, a shell's background job) stays ignored.
"""

import contextlib
import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn, ParamSpec, TypeVar

from stages.errors import Preempted

P = ParamSpec("P")
T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
CONTINUE = "run the same command again to continue"
_PR_SET_PDEATHSIG = 1
# what gloo, NCCL and the store say when the process at the other end is gone
_LOST = re.compile(r"by peer|broken pipe|timed? ?out|socket closed|remote process exited|failed to recv|connection was likely closed", re.I)


class Asked(Exception):
    """Raised by `poll` inside `deferred()`: a stop was asked for. Whoever deferred it saves the state, then calls `now`."""


_asked: signal.Signals | None = None
_deferring: list[object] = []
_listening = False
_handlers: dict[int, Any] = {}  # those that were there before
_announce: Callable[[str], object] = str  # that is: to nobody


def asked() -> signal.Signals | None:
    """The signal that asked this process to stop, None so far."""
    return _asked


def deferring() -> bool:
    return bool(_deferring)


def now(message: str = "") -> NoReturn:
    """Stop: KeyboardInterrupt (exit code 130) after SIGINT, else Preempted (75): SIGTERM, SIGHUP, or another rank's signal."""
    told = (f"stopped by {_asked.name}" if _asked else "another rank was told to stop") + (f", {message}" if message else "")
    if _asked == signal.SIGINT:
        raise KeyboardInterrupt(told)
    raise Preempted(told, hint=CONTINUE)


def poll() -> None:
    """Stop here if that was asked for. Long loops under `deferred()` call it; elsewhere the signal itself has raised already."""
    if _asked is not None:
        if _deferring:
            raise Asked
        now()


@contextlib.contextmanager
def deferred(*, then_stop: bool = True) -> Iterator[None]:
    """While inside, a signal is only noted. On leaving well the stop happens (`then_stop`), unless an outer block defers it too."""
    own = object()
    _deferring.append(own)
    try:
        yield
    finally:
        if own in _deferring:
            _deferring.remove(own)
    if then_stop and not _deferring:
        poll()


def deferred_throughout(generator: Callable[P, Iterator[T]]) -> Callable[P, Iterator[T]]:
    """For a generator function: `deferred()` from its first item until it has ended, also while its items are looked at."""

    @functools.wraps(generator)
    def wrapped(*arguments: P.args, **keywords: P.kwargs) -> Iterator[T]:
        with deferred():
            yield from generator(*arguments, **keywords)

    return wrapped


@contextlib.contextmanager
def listening(announce: Callable[[str], object] | None = None) -> Iterator[None]:
    """Catch the signals; handlers are put back on leaving. Inside another `listening`, and outside the main thread, only announces.

    announce: is told, in a signal handler, of a stop that has to wait; what it raises as an OSError does not matter.
    """
    global _announce, _asked, _listening, _handlers
    before, _announce = _announce, announce or _announce
    mine = not _listening and threading.current_thread() is threading.main_thread()  # Python allows handlers nowhere else
    if mine:
        _listening = True
        inherited = {number: signal.getsignal(number) for number in SIGNALS}
        heard = [number for number in SIGNALS if number == signal.SIGTERM or inherited[number] != signal.SIG_IGN]
        _handlers = {number: signal.signal(number, _on_signal) for number in heard}
    try:
        yield
    finally:
        _announce = before
        if mine:
            for number, handler in _handlers.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
            _handlers = {}
            _asked, _listening = None, False
            _deferring.clear()


def over() -> None:
    """All is done and told: from here on signals must not change how the process ends, though Ctrl-C still ends it."""
    for number in _handlers:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
    _handlers.clear()


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _asked
    again = number == signal.SIGINT and _asked == signal.SIGINT
    if _asked is not None and not again:
        return
    _asked = signal.Signals(number)
    if again or not _deferring:
        now()
    with contextlib.suppress(OSError):  # the terminal may be gone: that is what SIGHUP says
        more = "; Ctrl-C again aborts at once" if number == signal.SIGINT else ""
        _announce(f"{_asked.name}: stopping as soon as the state is saved{more}")


def lost_rank(error: BaseException) -> BaseException | None:
    """What to raise instead of an error that says another rank is gone: the stop that was asked for, or Preempted. None for other errors."""
    if not isinstance(error, RuntimeError) or int(os.environ.get("WORLD_SIZE", "1")) == 1 or not _LOST.search(str(error)):
        return None
    if _asked is not None:
        try:
            now("and so were other ranks")
        except (Preempted, KeyboardInterrupt) as stopped:
            return stopped
    first = str(error).strip().splitlines()[0]
    return Preempted(f"another rank ended without a word: it was killed, or its machine is gone ({first})", hint=CONTINUE)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Around a fork: the child decides what signals mean to it before it gets one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(parent: int) -> None:
    """For a forked helper: the parent handles the signals that a whole group gets, and the helper does not outlive it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if sys.platform == "linux":
        import ctypes  # here, because the command line has no use for it

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended in between
        os._exit(1)
