"""The one error a person meets: a line that names the input, what was wrong with it, and what would be right."""

from __future__ import annotations

import importlib
from types import ModuleType


class QLIPError(ValueError):
    """Something the caller can put right. The message is one line; the command line prints it without a traceback."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra of the package brings it.

    Args:
        module: dotted name of the module, as in ``import module``.
        extra: the extra of ``pip install "qlip[extra]"`` that installs it.

    Raises:
        QLIPError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise  # the module is there; something it needs is not, and that is another story
        raise QLIPError(
            f'this needs the package {module.split(".")[0]!r}: pip install "qlip[{extra}]"'
        ) from None
