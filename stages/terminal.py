"""The two ways a text of mmgen reaches the person or the program outside: results on stdout, everything else on stderr.

What is printed may hold names, keys and messages from outside, so what a terminal would obey is made visible here, once for all. Line
breaks and tabs pass: a text of several lines is put together by `escape.lines_of`, which writes out those inside of what it is given.
"""

import sys
from contextlib import suppress

from stages.escape import visible


def put(text: str, end: str = "\n") -> None:
    """A result, on stdout."""
    print(visible(text, keep="\n\t"), end=end)


def tell(text: str, label: str = "") -> None:
    """A message, on stderr; lost where that cannot be written. label: what stands before it, written as it is (it may be coloured)."""
    with suppress(OSError, ValueError):  # whoever watched is gone, or the disk of the log is full: the work goes on
        print(label + visible(text, keep="\n\t"), file=sys.stderr, flush=True)
