"""Checks of --output before a measurement: it must not replace another result, nor lie among the measured images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from qlip.cli.console import usage_error

if TYPE_CHECKING:
    from qlip.evaluation.report.result import Result


def check_output(output: Path | None, measured: Iterable[str], is_same: Callable[[Result], bool]) -> None:
    """Refuse an output folder inside a measured folder, or one that holds another result.

    Args:
        output: None if there is none.
        measured: sets, as they are named on the command line.
        is_same: returns whether a result is of the measurement that begins.

    Raises:
        UsageError: says which folder to change.
    """
    from qlip.data.sources.base import printable
    from qlip.evaluation.report.bundle import RESULT
    from qlip.evaluation.report.result import Result

    if output is None:
        return
    inside = output.resolve()
    if (name := printable(str(inside))) != str(inside):  # safetensors cannot open files in it
        usage_error(f"--output {name}: is not UTF-8; choose a folder of another name")
    for name in measured:
        folder = Path(name.partition("#")[0])
        if folder.is_dir() and inside.is_relative_to(folder.resolve()):
            usage_error(f"--output {output}: lies in {folder}, whose images are measured; choose a folder outside")
    if (output / RESULT).is_file():
        stored = Result.load(output / RESULT)
        if not is_same(stored):
            sets = ", ".join(dict.fromkeys(one.data for one in stored.measured))
            usage_error(
                f"--output {output}: holds another result, of {stored.subject.get('name')} on {sets};"
                " choose another folder, or delete this one"
            )
