"""Packaged recipes: training runs in ``<model>/<stage>.yaml``, and ablations of many runs in ``studies/<name>.yaml``.

`names` lists the recipes and `path` finds the file of one; `studies` and `study_path` do the same for ablations.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

STUDIES = "studies"


def folder() -> Path:
    """Return the folder of the packaged recipes."""
    return Path(str(resources.files(__name__)))


def path(name: str) -> Path | None:
    """Return the file of a packaged recipe such as ``nano/stage1``, or None."""
    return (folder() / f"{name}.yaml") if name in names() else None


def names() -> list[str]:
    """List the names of all packaged recipes."""
    return [name for name in _all() if not name.startswith(f"{STUDIES}/")]


def study_path(name: str) -> Path | None:
    """Return the file of a packaged ablation such as ``both-objectives`` or ``studies/both-objectives``, or None."""
    name = name.removeprefix(f"{STUDIES}/")
    return (folder() / STUDIES / f"{name}.yaml") if name in studies() else None


def studies() -> list[str]:
    """List the names of all packaged ablations."""
    return [name.removeprefix(f"{STUDIES}/") for name in _all() if name.startswith(f"{STUDIES}/")]


def _all() -> list[str]:
    return sorted(file.relative_to(folder()).with_suffix("").as_posix() for file in folder().rglob("*.yaml"))
