"""What the commands say: results on stdout; progress, notes and errors, each in one line, on stderr."""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from qlip.errors import QLIPError
from qlip.runtime.progress import ProgressBar
from qlip.runtime.progress import progress as show_progress

if TYPE_CHECKING:
    from qlip.training import Outcome

USAGE, FAILURE, STOPPED = 2, 1, 130


_quiet = False


def set_verbosity(quiet: bool, verbose: bool) -> None:
    """Choose what goes to stderr beside errors.

    Args:
        quiet: neither progress nor notes.
        verbose: log messages of libraries too, from level INFO.
    """
    global _quiet
    if quiet and verbose:
        usage_error("--quiet and --verbose exclude each other; give one")
    _quiet = quiet
    if verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)


def note(message: str) -> None:
    """Print one line on stderr, unless the command is quiet."""
    if not _quiet:
        say(message)


def say(message: str) -> None:
    """Print one line on stderr; line breaks of the message become spaces."""
    print(" ".join(message.split()), file=sys.stderr, flush=True)


def stderr() -> Console:
    """Return a console for progress on stderr, silent if the command is quiet."""
    return Console(stderr=True, quiet=_quiet)


class UsageError(QLIPError):
    """The command was typed wrong: exit code 2, where other errors have 1."""


def usage_error(message: str) -> NoReturn:
    """The command was typed wrong."""
    raise UsageError(message)


def print_json(report: dict[str, Any]) -> None:
    """A command's whole report as one JSON object on stdout; numbers that JSON has not are "Infinity" and "NaN"."""
    print(json.dumps(_strict(report), indent=2, ensure_ascii=False, default=str, allow_nan=False))


def _strict(value: Any) -> Any:
    """The same with strings for numbers that JSON has not, as result files have them."""
    if isinstance(value, Mapping):
        return {key: _strict(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def print_table(table: Table) -> None:
    """A table on stdout: as wide as the terminal, unbroken when the output goes to a file or a pipe."""
    terminal = sys.stdout.isatty()
    width = None if terminal else 10_000
    # file names are no markup
    console = Console(file=sys.stdout, width=width, soft_wrap=not terminal, markup=False, emoji=False, highlight=False)
    console.print(table)


def new_table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """A plain table; the columns named in ``numbers`` are set flush right."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def progress(description: str, total: int, unit: str | None = None) -> AbstractContextManager[ProgressBar]:
    """Show progress on stderr unless the command is quiet; see `qlip.runtime.progress.progress`."""
    return show_progress(description, total, unit, quiet=_quiet)


@dataclass
class Failures:
    """What went wrong with single inputs while the rest went on."""

    found: list[dict[str, str]] = field(default_factory=list)

    def add(self, path: Path | str, error: Exception) -> None:
        """Say it in one line that names the input, and remember it."""
        text = " ".join(str(getattr(error, "strerror", None) or error).split())
        line = text if text.startswith(str(path)) else f"{path}: {text}"
        say(line)
        self.found.append({"input": str(path), "error": text})

    def finish(self, total: int, what: str = "input") -> None:
        """Exit with code 1 after a summary, if anything failed."""
        if self.found:
            if total > 1:
                say(f"{len(self.found)} of {total} {what}s failed; the rest is done")
            raise typer.Exit(FAILURE)


@contextmanager
def stoppable(advice: str) -> Iterator[None]:
    """Ctrl-C inside, or a scheduler's SIGTERM, ends the command with one line and exit code 130."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise KeyboardInterrupt

    heard = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
    before = signal.signal(signal.SIGTERM, stop) if heard else None
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped; {advice}")
        raise typer.Exit(STOPPED) from None
    finally:
        if heard:
            signal.signal(signal.SIGTERM, before)


def leave_if_stopped(outcome: Outcome) -> None:
    """End the command where a run was asked to stop: one line, and the exit code that a shell gives its signal."""
    if outcome.finished:
        return
    if outcome.first:
        say(f"stopped at step {outcome.step:,}, saved; the same command goes on from there")
    raise typer.Exit(STOPPED if outcome.stopped_by is None else 128 + outcome.stopped_by)


def plural(count: int, what: str) -> str:
    """``1 picture``, ``12 pictures``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
