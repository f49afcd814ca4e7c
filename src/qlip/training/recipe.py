"""Loading recipes: one YAML file that describes a run. Strict: an unused key is an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from qlip import recipes
from qlip.errors import QLIPError, nearest, validate
from qlip.training.job import find_kind
from qlip.training.recipe_schema import RunRecipe
from qlip.training.recipe_upgrade import RENAMED, upgrade

Recipe = TypeVar("Recipe", bound=RunRecipe)


def load_recipe(
    name_or_path: str, overrides: list[str] | None = None, on_note: Callable[[str], None] | None = None
) -> RunRecipe:
    """Load, override and validate a recipe.

    Args:
        name_or_path: name of a packaged recipe such as ``nano/stage1``, or path of a YAML file.
        overrides: ``key=value`` with dotted keys and YAML values, e.g. ``schedule.steps=100``.
        on_note: called with one line for each key of an earlier version in the file or the overrides.

    Raises:
        QLIPError: no such recipe, invalid YAML, an unknown or missing key, or a wrong type.
    """
    path = _find(name_or_path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise QLIPError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    except OSError as error:
        raise QLIPError(f"{path}: cannot be read ({error.strerror})") from None
    values, notes = upgrade(values, str(name_or_path))
    for override in overrides or []:
        apply_override(values, override)
    values, later = upgrade(values, "override")
    for note in (*notes, *later):
        if on_note is not None:
            on_note(note)
    return check_recipe(values, str(name_or_path))


def check_recipe(values: dict[str, Any], where: str) -> RunRecipe:
    """Validate the values of a recipe, of this version or an earlier one, against the schema of its task.

    Args:
        values: the recipe as a dict.
        where: name of the file, for errors.

    Raises:
        QLIPError: no such task, an unknown or missing key, a wrong type, or incompatible keys.
    """
    values, _ = upgrade(values, where)
    return validate(find_kind(values["task"], where).Recipe, values, where)


def changed(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return a recipe with other values at dotted keys.

    Raises:
        QLIPError: the changed recipe is not valid.
    """
    found = recipe.model_dump(mode="json")
    for key, value in values.items():
        *sections, last = key.split(".")
        section = found
        for one in sections:
            section = section[one]
        section[last] = value
    return validate(type(recipe), found, recipe.name)


def _find(name_or_path: str) -> Path:
    packaged = recipes.path(name_or_path)
    if packaged is not None:
        return packaged
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    names = recipes.names()
    raise QLIPError(
        f"{name_or_path}: no such recipe or file{nearest(name_or_path, names)}; packaged recipes: {', '.join(names)}"
    )


def apply_override(values: dict[str, Any], override: str) -> None:
    """Change a value of a recipe in place.

    Args:
        values: of the recipe.
        override: ``key=value`` with a dotted key and a YAML value.

    Raises:
        QLIPError: of another form, or a key below a single value.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise QLIPError(f"{override!r}: an override must be key=value, such as schedule.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise QLIPError(f"{override!r}: {text!r} is not a YAML value; quote it") from None
    *parents, last = RENAMED.get(key, key).split(".")
    current: Any = values
    for parent in parents:
        current = _child(current, parent, override)
    if isinstance(current, list):
        current[_position(current, last, override)] = value
    elif isinstance(current, dict):
        current[last] = value
    else:
        raise QLIPError(f"{override!r}: {'.'.join(parents)} is a single value and has no keys")


def _child(current: Any, key: str, override: str) -> Any:
    if isinstance(current, list):
        return current[_position(current, key, override)]
    if isinstance(current, dict):
        if current.get(key) is None:
            current[key] = {}
        return current[key]
    raise QLIPError(f"{override!r}: {key!r} is looked up in a single value, which has no keys")


def _position(values: list[Any], key: str, override: str) -> int:
    if not key.isdecimal() or int(key) >= len(values):
        raise QLIPError(f"{override!r}: {key!r} is not a position in a list of {len(values)} (0 to {len(values) - 1})")
    return int(key)
