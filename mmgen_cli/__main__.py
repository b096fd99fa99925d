"""`mmgen` and `python -m mmgen_cli` (which is what torchrun starts)."""

import os
import signal
import sys
import warnings
from types import FrameType

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if __name__ == "__main__" and not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()) and os.path.realpath(sys.path[0]) != ROOT:
    del sys.path[0]  # `python -m` looks in the user's folder first, where `stages` or `numpy` may be something else


def _preempted(number: int, frame: FrameType | None) -> None:
    from stages.errors import Preempted

    raise Preempted("stopped by SIGTERM before there was anything to save", hint="run the same command again")


def main() -> None:
    """The entry point. Before a run begins and after it ends, SIGTERM means exit code 75 as well.

    Threads that wait spin for a moment and then sleep, unless the environment says otherwise: sleeping at once slows training on an idle
    machine (two cores, show-o small: 7,000 tokens a second instead of 8,600), spinning long stalls it beside a busy neighbour (400 instead
    of 4,000, with GOMP_SPINCOUNT=100000). It must be said before torch is imported, so here.
    """
    if any(option.startswith("error") for option in sys.warnoptions):
        warnings.simplefilter("default")  # a remark of a library is no reason to lose a run
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch remarks on every network whose ports a batch may lack
    signal.signal(signal.SIGTERM, _preempted)
    try:
        from mmgen_cli.app import app
    except KeyboardInterrupt:
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
