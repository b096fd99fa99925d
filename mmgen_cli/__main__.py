"""`mmgen` and `python -m mmgen_cli` (which is what torchrun starts)."""

import os
import signal
from types import FrameType

from mmgen_cli.app import app
from stages.errors import Preempted


def _preempted(number: int, frame: FrameType | None) -> None:
    raise Preempted("stopped by SIGTERM before there was anything to save", hint="run the same command again")


def main() -> None:
    """The entry point. Before a run begins and after it ends, SIGTERM means exit code 75 as well.

    Threads that wait sleep instead of spinning, unless the environment says otherwise: beside a busy neighbour spinning made training
    a hundred times slower. It must be said before torch is imported, so here.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, _preempted)
    app()


if __name__ == "__main__":
    main()
