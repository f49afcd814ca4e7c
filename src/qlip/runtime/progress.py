"""Progress of long tasks: one callback type, a bar on a terminal, and a line per minute if stderr is not a terminal.

A library function takes `on_progress: OnProgress = no_progress` and calls it with the number of steps since the last
call. A command opens `progress(...)` and passes on the `advance` of the `ProgressBar` that it yields.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from qlip.files import escaped
from qlip.runtime.ranks import is_first_rank

OnProgress = Callable[[int], None]
"""Called with the number of steps done since the last call."""
SECONDS_PER_LINE = 60


def no_progress(steps: int) -> None:
    """No-op `OnProgress`."""


@contextmanager
def progress(
    description: str,
    total: int | None,
    unit: str | None = None,
    *,
    console: Console | None = None,
    quiet: bool = False,
) -> Iterator[ProgressBar]:
    """Show a progress bar on stderr, or print a line per minute if stderr is not a terminal.

    Silent for a single step, and on ranks other than the first.

    Args:
        description: shown before the bar.
        total: number of steps; None if it is unknown.
        unit: noun for steps; shows percentage and rate too.
        console: used instead of stderr.
        quiet: show nothing.
    """
    console, description = console or Console(file=sys.stderr), escaped(description)
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    ]
    if unit is not None:
        columns[3:3] = [TaskProgressColumn(), _Rate(unit)]
    silent = quiet or console.quiet or not is_first_rank()
    hidden = silent or not console.is_terminal or (total is not None and total < 2)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        lines = _Lines(description, total, unit) if hidden and not silent else None
        yield ProgressBar(bar, bar.add_task(description, total=total), lines)


@dataclass
class ProgressBar:
    """Progress of one task, on a terminal or in a log."""

    bar: Progress
    task: TaskID
    lines: _Lines | None

    def advance(self, steps: int = 1, speed: str = "") -> None:
        """Count completed steps; `speed` is shown in the lines of a log."""
        self.bar.advance(self.task, steps)
        if self.lines is not None:
            self.lines.advance(steps, speed)


def print_line(console: Console, line: str) -> None:
    """Print a line verbatim, with control codes escaped."""
    console.print(escaped(line), markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours, such as ``12 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass
class _Lines:
    """Progress as lines of a log. The first call does not count for the speed: it may be an earlier run's."""

    description: str
    total: int | None
    unit: str | None
    done: int = 0
    first: int = 0
    started: float = 0
    printed: float = 0

    def advance(self, steps: int, speed: str) -> None:
        now, self.done = time.monotonic(), self.done + steps
        if not self.started:
            self.started, self.first = now, self.done
        if now - (self.printed or self.started) > SECONDS_PER_LINE:
            self.printed = now
            print(self._line(now, speed), file=sys.stderr, flush=True)

    def _line(self, now: float, speed: str) -> str:
        if self.total is None:
            return f"{self.description}: {self.done:,}"
        left = (self.total - self.done) / max(self.done - self.first, 1) * (now - self.started)
        count = f"{self.done:,} of {self.total:,}"
        count = f"{self.description}: {count}" if self.unit is None else f"{count} {self.unit}"
        speed = f"{speed}, " if speed else ""
        return f"{count} ({self.done / self.total:.0%}), {speed}{duration(left)} left"


class _Rate(ProgressColumn):
    """Steps per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """Return the rate, or nothing until it is known."""
        return Text("" if task.speed is None else f"{task.speed:,.0f} {self.unit}/s")
