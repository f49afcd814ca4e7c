"""Runs that are done already: commands that train several of them skip these, and notice when they are others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qlip.errors import QLIPError
from qlip.training.recipe import Recipe

FREE = ("name", "checkpoint", "log", "parallel", "validation", "threads")
"""Keys that change no weight, or only their last digits."""


def is_finished(recipe: Recipe, folder: Path, free: tuple[str, ...] = ()) -> bool:
    """Whether a folder holds the model of a run of this recipe, trained to the end.

    Keys that only one of the two recipes has are not compared: a run of an earlier version stays a run.

    Args:
        recipe: that is wanted.
        folder: of the run; it need not exist.
        free: more dotted keys that may differ.

    Raises:
        QLIPError: the folder holds the model of another recipe, or its recipe cannot be read.
    """
    if not (folder / "model" / "config.json").is_file():
        return False
    path = folder / "recipe.yaml"
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise QLIPError(f"{path}: cannot be read ({' '.join(str(error).split())}); delete {folder}") from None
    changed = _difference(stored, recipe.model_dump(mode="json"), (*FREE, *free))
    if changed is not None:
        raise QLIPError(
            f"{folder}: holds a model of another recipe, {changed}; choose another folder, or delete that one"
        )
    return True


def _difference(old: Any, new: Any, free: tuple[str, ...], key: str = "") -> str | None:
    """The first key that both have and that differs, in words."""
    if key in free:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(f"{key}.{name}".lstrip("."), old[name], new[name]) for name in old if name in new]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{key}.{place}", *pair) for place, pair in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new else f"{key} {old!r} where {new!r} is wanted"
    return next((found for pair in pairs if (found := _difference(*pair[1:], free, pair[0])) is not None), None)
