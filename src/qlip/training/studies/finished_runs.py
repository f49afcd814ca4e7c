"""Detection of finished runs, so that commands that train several runs skip them or report a different recipe."""

from __future__ import annotations

from pathlib import Path

from qlip.errors import QLIPError
from qlip.training.recipe_diff import differences, listed
from qlip.training.recipe_schema import RunRecipe
from qlip.training.run_folder import stored_recipe

FREE = ("name", "checkpoint", "log", "parallel", "validation", "threads")
"""Keys that do not affect the weights beyond rounding."""


def is_finished(recipe: RunRecipe, folder: Path, free: tuple[str, ...] = ()) -> bool:
    """Return True if a folder holds the final model of a run of this recipe.

    Keys that only one of the two recipes has are not compared, so that runs of earlier versions still count.

    Args:
        recipe: the expected recipe.
        folder: folder of the run; it need not exist.
        free: further dotted keys that may differ.

    Raises:
        QLIPError: the folder holds the model of a different recipe, or its recipe cannot be read.
    """
    if not (folder / "model" / "config.json").is_file():
        return False
    stored = stored_recipe(folder)
    found = list(differences(stored, recipe.model_dump(mode="json"), (*FREE, *free), shared_only=True))
    if found:
        raise QLIPError(
            f"{folder}: holds a model of another recipe: {listed(found)}; choose another folder, or delete this one"
        )
    return True
