"""Folder of a run: who may train in it, and the recipe that it belongs to.

One process at a time holds its lock. A recipe claims the folder once its data can be read: until then a corrected
recipe may still use the folder, and what the kind has made for the first one is made again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter

from qlip.errors import QLIPError
from qlip.files import locked, write_text
from qlip.training.job import Kind
from qlip.training.log.environment import record_session
from qlip.training.recipe_diff import differences, listed
from qlip.training.recipe_schema import RunRecipe, without_effect
from qlip.training.recipe_upgrade import upgrade

FOLDERS = ("checkpoints", "tensorboard", "wandb", "model")
FILES = ("sessions.json", "log.jsonl")
RECIPE = "recipe.yaml"
IDLE = ("name", "checkpoint", "log", "parallel", "validation", "threads")
"""Keys that do not affect the weights beyond rounding."""
LOCK = ".lock"
"""File in a run folder, locked by the process that trains there."""


@contextmanager
def reserved(folder: Path, recipe: RunRecipe, kind: Kind, restart: bool) -> Iterator[None]:
    """Hold a run folder for this process; made if absent.

    Args:
        folder: of the run.
        recipe: of the run.
        kind: knows the folders that it makes.
        restart: delete an earlier run first.

    Raises:
        QLIPError: another process trains here, or the folder was claimed by another recipe.
    """
    tried = (folder / LOCK).exists()
    with locked(folder / LOCK, f"{folder}: another process trains here; wait for it, or choose another folder"):
        if restart:
            _delete(folder, (*FOLDERS, *kind.folders))
            for name in (RECIPE, *FILES):
                (folder / name).unlink(missing_ok=True)
        elif (folder / RECIPE).exists():
            _compare(recipe, folder)
        elif tried:
            _delete(folder, kind.folders)
        yield


def claim(folder: Path, recipe: RunRecipe) -> None:
    """Store the resolved recipe and the environment; only this recipe can train here from now on."""
    write_text(folder / RECIPE, recipe.to_yaml())
    record_session(folder)


def stored_recipe(folder: Path, remedy: str = "") -> dict[str, Any]:
    """Values of the recipe that claimed a folder, with the current keys; not validated, so that old runs still count.

    Raises:
        QLIPError: it cannot be read; the error ends with the remedy, by default to delete the folder.
    """
    path = folder / RECIPE
    try:
        return upgrade(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))[0]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise QLIPError(
            f"{path}: cannot be read ({' '.join(str(error).split())}); {remedy or f'delete {folder}'}"
        ) from None


def is_finished(recipe: RunRecipe, folder: Path, free: tuple[str, ...] = ()) -> bool:
    """Return True if a folder holds the final model of a run of this recipe, up to settings that move no weight.

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
    free = (*IDLE, *free, *without_effect(recipe))
    found = list(differences(stored_recipe(folder), recipe.model_dump(mode="json"), free, shared_only=True))
    if found:
        raise QLIPError(
            f"{folder}: holds a model of another recipe: {listed(found)}; choose another folder, or delete this one"
        )
    return True


def read_log(folder: Path, remedy: str) -> list[dict[str, Any]]:
    """Lines of a run's ``log.jsonl``.

    Raises:
        QLIPError: it cannot be read; the error ends with the remedy.
    """
    path = folder / "log.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise QLIPError(f"{path}: cannot be read ({error}); {remedy}") from None


def _compare(recipe: RunRecipe, folder: Path) -> None:
    """Compare with the stored recipe, which is not validated: rules that are newer than a run do not end it."""
    stored, free = _with_defaults(stored_recipe(folder), recipe), (*recipe.FREE, *without_effect(recipe))
    found = list(differences(stored, recipe.model_dump(mode="json"), free))
    if found:
        raise QLIPError(
            f"{folder}: was started with another recipe: {listed(found)}; choose another folder, or delete this run"
        )


def _with_defaults(stored: Any, current: Any) -> Any:
    """Stored values, with the defaults of keys that did not exist when they were stored."""
    if isinstance(stored, list) and isinstance(current, list | tuple) and len(stored) == len(current):
        return [_with_defaults(*pair) for pair in zip(stored, current, strict=True)]
    if not isinstance(stored, dict) or not isinstance(current, BaseModel):
        return stored
    fields = type(current).model_fields
    found = {name: _with_defaults(value, getattr(current, name, None)) for name, value in stored.items()}
    missing = {name: field for name, field in fields.items() if name not in stored and not field.is_required()}
    defaults = {name: field.get_default(call_default_factory=True) for name, field in missing.items()}
    return found | TypeAdapter(dict[str, Any]).dump_python(defaults, mode="json")


def _delete(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
