"""The errors a person can cause or meet, each with the exit code the command line gives it."""

import difflib
from collections.abc import Iterable

from stages.escape import visible

SHOWN = 16  # choices listed in an error message


class MmgenError(Exception):
    """An error that is explained in one screen, without a traceback. `exit_code` follows the table in `mmgen --help`.

    `message` is one line, whatever the names and values it quotes hold; `details` are lines of their own, indented, below it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", details: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.message = "\n  ".join([visible(message), *map(visible, details)])
        self.hint = visible(hint)  # the next command, or the nearest valid choice

    def __str__(self) -> str:
        return self.message


class UsageError(MmgenError):
    """A wrong flag, a missing file, an --out that holds something else."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be read, or that says something impossible."""


class DataError(MmgenError):
    """Shards or files that are damaged, empty or not what they claim to be."""

    exit_code = 3


class GuardError(MmgenError):
    """A guard stopped the run: a non-finite loss, a dead codebook, a batch without supervised tokens."""

    exit_code = 4


class Preempted(BaseException):
    """SIGTERM, SIGHUP or a lost rank ended the work, the same command continues. Like KeyboardInterrupt it is no Exception: it may come
    anywhere, and must not be taken for a fault of what it interrupts."""

    exit_code = 75

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def nearest(word: str, choices: Iterable[str]) -> str:
    """`did you mean 'x'?` or the list of choices, to end an error message with."""
    options = sorted(choices)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    shown = ", ".join(options[:SHOWN]) + (f" and {len(options) - SHOWN} more" if len(options) > SHOWN else "")
    return f"choose one of: {shown}" if options else "there are none"
