"""`mmgen` and `python -m mmgen_cli` (which is what torchrun starts)."""

import os
import sys
from typing import Any

from stages import stop
from stages.errors import Preempted


class Unfailing:
    """Stands in for sys.stderr: a reader or a terminal that is gone (which is what SIGHUP says) must not end what is being done."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Any, *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError:  # from now on nowhere, also what Python still holds back and would fail to write at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main() -> None:
    """The entry point. Signals are heard from here on, before the imports, which take longest.

    Threads that wait spin for a moment and then sleep, unless the environment says otherwise: sleeping at once slows training on an idle
    machine (two cores, show-o small: 7,000 tokens a second instead of 8,600), spinning long stalls it beside a busy neighbour (400 instead
    of 4,000, with GOMP_SPINCOUNT=100000). It must be said before torch is imported, so here.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch remarks on every network whose ports a batch may lack
    sys.stderr = Unfailing(sys.stderr if sys.stderr is not None else open(os.devnull, "w"))  # noqa: SIM115
    with stop.listening():
        try:
            from mmgen_cli.app import app

            app()
        except (Preempted, KeyboardInterrupt) as stopped:  # before the door was open, or after it was shut
            print(f"error: {stopped}", file=sys.stderr, flush=True)
            sys.exit(75 if isinstance(stopped, Preempted) else 130)


if __name__ == "__main__":
    main()
