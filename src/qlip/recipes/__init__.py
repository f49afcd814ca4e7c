"""Named runs, package data: ``<model>/<stage>.yaml``; and studies of many runs: ``studies/<name>.yaml``."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

STUDIES = "studies"


def folder() -> Path:
    """Folder of the packaged recipes."""
    return Path(str(resources.files(__name__)))


def path(name: str) -> Path | None:
    """File of a packaged recipe such as ``nano/stage1``, or None."""
    return (folder() / f"{name}.yaml") if name in names() else None


def names() -> list[str]:
    """Names of all packaged recipes."""
    return [name for name in _all() if not name.startswith(f"{STUDIES}/")]


def study_path(name: str) -> Path | None:
    """File of a packaged study such as ``both-objectives`` or ``studies/both-objectives``, or None."""
    name = name.removeprefix(f"{STUDIES}/")
    return (folder() / STUDIES / f"{name}.yaml") if name in studies() else None


def studies() -> list[str]:
    """Names of all packaged studies."""
    return [name.removeprefix(f"{STUDIES}/") for name in _all() if name.startswith(f"{STUDIES}/")]


def _all() -> list[str]:
    return sorted(file.relative_to(folder()).with_suffix("").as_posix() for file in folder().rglob("*.yaml"))
