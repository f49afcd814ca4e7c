"""Named runs, package data: ``<model>/<stage>.yaml``."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def folder() -> Path:
    """Where the packaged recipes are."""
    return Path(str(resources.files(__name__)))


def path(name: str) -> Path | None:
    """File of a packaged recipe such as ``nano/stage1``, or None."""
    return (folder() / f"{name}.yaml") if name in names() else None


def names() -> list[str]:
    """Names of all packaged recipes."""
    return sorted(file.relative_to(folder()).with_suffix("").as_posix() for file in folder().rglob("*.yaml"))
