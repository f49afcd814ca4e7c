"""Runs that are done already: commands that train several of them skip these, and notice when they are others."""

from __future__ import annotations

from pathlib import Path

import yaml

from qlip.errors import QLIPError
from qlip.training.recipe_diff import first_difference
from qlip.training.recipe_schema import RunRecipe
from qlip.training.recipe_upgrade import upgrade

FREE = ("name", "checkpoint", "log", "parallel", "validation", "threads")
"""Keys that change no weight, or only their last digits."""


def is_finished(recipe: RunRecipe, folder: Path, free: tuple[str, ...] = ()) -> bool:
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
        stored, _ = upgrade(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise QLIPError(f"{path}: cannot be read ({' '.join(str(error).split())}); delete {folder}") from None
    changed = first_difference(stored, recipe.model_dump(mode="json"), (*FREE, *free), shared_only=True)
    if changed is not None:
        raise QLIPError(
            f"{folder}: holds a model of another recipe, {changed.key} {changed.old!r} where {changed.new!r} is wanted;"
            " choose another folder, or delete that one"
        )
    return True
