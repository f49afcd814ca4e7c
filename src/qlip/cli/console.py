"""Output of the commands: results on stdout; progress, notes and errors, each in one line, on stderr.

Names and captions come from anyone's files, so control codes in them are printed as escapes (`qlip.files.escaped`).
Commands print only through this module; a test holds them to it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from qlip.errors import QLIPError, QLIPWarning
from qlip.files import escaped, json_values
from qlip.files import plural as plural
from qlip.runtime.progress import ProgressBar
from qlip.runtime.progress import progress as show_progress

if TYPE_CHECKING:
    from qlip.training import Outcome

USAGE, FAILURE, STOPPED = 2, 1, 130


_quiet = False


def set_verbosity(quiet: bool, verbose: bool) -> None:
    """Choose the output on stderr besides errors and warnings.

    Args:
        quiet: print neither progress nor notes.
        verbose: print log messages of libraries too, from level INFO.
    """
    global _quiet
    if quiet and verbose:
        usage_error("--quiet and --verbose exclude each other; give one")
    _quiet = quiet
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when huggingface_hub is imported, which is later
    if verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)


def is_quiet() -> bool:
    """Return whether progress and notes are switched off."""
    return _quiet


def note(message: str) -> None:
    """Print one line on stderr, unless the command is quiet."""
    if not _quiet:
        say(message)


def say(message: str) -> None:
    """Print one line on stderr; line breaks of the message become spaces."""
    print(escaped(" ".join(message.split())), file=sys.stderr, flush=True)


def show(text: str = "", end: str = "\n") -> None:
    """Print lines of a result on stdout; with another end, a piece of a line at once."""
    print(escaped(text), end=end, flush=end != "\n")


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Print a `QLIPWarning` as one line, and other warnings as Python does; see `warnings.showwarning`."""
    if issubclass(category, QLIPWarning):
        say(f"warning: {message}")
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
        print(escaped(text), end="", file=file or sys.stderr)


def show_traceback(error: BaseException) -> None:
    """Print an error with its traceback on stderr."""
    print(escaped("".join(traceback.format_exception(error))), end="", file=sys.stderr)


def stderr() -> Console:
    """Return a console for progress on stderr, silent if the command is quiet."""
    return Console(stderr=True, quiet=_quiet)


class UsageError(QLIPError):
    """Wrong usage of a command: exit code 2 instead of 1."""


def usage_error(message: str) -> NoReturn:
    """Raise `UsageError`."""
    raise UsageError(message)


def print_json(report: dict[str, Any]) -> None:
    """Print a command's whole report as one JSON object on stdout; non-finite numbers become strings."""
    show(json.dumps(json_values(report), indent=2, ensure_ascii=False, default=str, allow_nan=False))


def print_table(table: Table) -> None:
    """Print a table on stdout: as wide as the terminal, without line breaks if stdout is a file or a pipe."""
    terminal = sys.stdout.isatty()
    width = None if terminal else 10_000
    # file names may look like markup
    console = Console(file=sys.stdout, width=width, soft_wrap=not terminal, markup=False, emoji=False, highlight=False)
    console.print(table)


class _Rows(Table):
    """Table of one line per row, with control codes escaped."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(
            *(escaped(" ".join(cell.split("\n"))) if isinstance(cell, str) else cell for cell in cells), **options
        )


def new_table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """Return a plain table; the columns named in ``numbers`` are right-aligned."""
    table = _Rows(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def progress(description: str, total: int, unit: str | None = None) -> AbstractContextManager[ProgressBar]:
    """Show progress on stderr unless the command is quiet; see `qlip.runtime.progress.progress`."""
    return show_progress(description, total, unit, quiet=_quiet)


@dataclass
class Failures:
    """Errors of single inputs of a command that continues with the others."""

    found: list[dict[str, str]] = field(default_factory=list)

    def add(self, path: Path | str, error: Exception) -> None:
        """Print the error in one line that names the input, and record it."""
        text = " ".join(str(getattr(error, "strerror", None) or error).split())
        line = text if text.startswith(str(path)) else f"{path}: {text}"
        say(line)
        self.found.append({"input": str(path), "error": text})

    def finish(self, total: int, noun: str = "input") -> None:
        """Exit with code 1 after a summary, if anything failed."""
        if self.found:
            if total > 1:
                say(f"{len(self.found)} of {total} {noun}s failed; the others are done")
            raise typer.Exit(FAILURE)


@contextmanager
def stoppable(advice: str) -> Iterator[None]:
    """On Ctrl-C or SIGTERM inside, end the command with one line that ends in ``advice``, and exit code 130."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()  # other threads cannot set handlers
    before = signal.signal(signal.SIGTERM, stop) if in_main_thread else None
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped; {advice}")
        raise typer.Exit(STOPPED) from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def leave_if_stopped(outcome: Outcome) -> None:
    """If a training run was stopped, print one line and exit with the code that a shell gives to its signal."""
    if outcome.finished:
        return
    if outcome.first:
        say(f"stopped at step {outcome.step:,}, saved; run the same command to continue")
    raise typer.Exit(STOPPED if outcome.stopped_by is None else 128 + outcome.stopped_by)
