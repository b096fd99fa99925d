"""`mmgen` and `python -m mmgen_cli` (which is what torchrun starts)."""

import os
import sys
import warnings

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if __name__ == "__main__" and not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()) and os.path.realpath(sys.path[0]) != ROOT:
    del sys.path[0]  # `python -m` looks in the user's folder first, where `stages` or `numpy` may be something else

from stages import stop  # noqa: E402  (found in the right folder from here on)
from stages.errors import Preempted  # noqa: E402
from stages.terminal import tell  # noqa: E402


def main() -> None:
    """The entry point. Signals are heard from here on, before the imports, which take longest.

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
    with stop.listening():
        try:
            from mmgen_cli.app import app

            app()
        except (Preempted, KeyboardInterrupt) as stopped:  # before the door was open, or after it was shut
            tell(f"error: {stopped or 'interrupted'}")
            sys.exit(75 if isinstance(stopped, Preempted) else 130)


if __name__ == "__main__":
    main()
