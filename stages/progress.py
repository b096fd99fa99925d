"""Progress for the person watching, always on stderr: a bar on a terminal, a plain line now and then elsewhere, nothing when quiet."""

import sys
import time
from typing import TYPE_CHECKING

from stages.escape import visible
from stages.terminal import tell

if TYPE_CHECKING:
    import rich.progress

PLAIN_SECONDS = 10.0  # between two plain lines: a log file wants to be read, not scrolled


class Progress:
    """Where one stage stands. `update` is cheap to call at every step."""

    def __init__(self, stage: str, *, quiet: bool = False) -> None:
        self.stage = stage
        self.quiet = quiet
        self.on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._bar: rich.progress.Progress | None = None
        self._last_line = time.monotonic()

    def update(self, step: int, of: int | None, message: str = "") -> None:
        """Shows `step` of `of` (None: no end known) and a short message."""
        if self.quiet:
            return
        if self.on_terminal:
            bar = self._bar or self._open_bar()
            bar.update(bar.task_ids[0], completed=step, total=of, message=visible(message))
        elif time.monotonic() - self._last_line >= PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"{self.stage}: {step}" + (f"/{of}" if of else "") + (f"  {message}" if message else ""))

    def say(self, message: str) -> None:
        """One whole line, whatever the message holds; above the bar if there is one."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(visible(message), markup=False, emoji=False, highlight=False, soft_wrap=True)
        else:
            tell(visible(message))

    def close(self) -> None:
        """Takes the bar away. Saying something afterwards is fine."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _open_bar(self) -> "rich.progress.Progress":
        from rich.console import Console  # imported here: rich costs 50 ms, and only a terminal needs it
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[message]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.add_task(self.stage, total=None, message="")
        self._bar.start()
        return self._bar
