"""Upgrade of recipes of earlier versions to the current keys."""

from __future__ import annotations

import copy
from typing import Any

from qlip.errors import QLIPError

RENAMED = {
    "stage": "task",
    "data.broken_limit": "skip_limit",
    "log.pictures_every": "log.images_every",
    "log.pictures": "log.images",
}
"""Dotted keys of version 0.1 to their current names."""
_TASKS = {1: "stage1", 2: "stage2"}


def upgrade(values: object, where: str) -> tuple[dict[str, Any], list[str]]:
    """Upgrade the values of a recipe to the current keys.

    Version 0.1 had ``stage: 1`` or ``stage: 2``, with stage 1 as the default.

    Args:
        values: the recipe, parsed; not modified.
        where: name of the file, for notes and errors.

    Returns:
        The upgraded values, and one line per renamed key.

    Raises:
        QLIPError: it is no mapping, both an old key and its new name are given, ``stage`` is neither 1 nor 2, or
            ``task`` is no name.
    """
    if not isinstance(values, dict):
        raise QLIPError(f"{where}: a recipe must be a mapping of keys to values, got {type(values).__name__}")
    found, notes = copy.deepcopy(values), list[str]()
    for old, new in RENAMED.items():
        holder, _, key = old.rpartition(".")
        table = found.get(holder) if holder else found
        if not isinstance(table, dict) or key not in table:
            continue
        value = table.pop(key)
        if old == "stage":
            if not isinstance(value, int) or value not in _TASKS:
                raise QLIPError(
                    f"{where}: stage must be 1 or 2, got {value!r}; the current key is task: stage1 or task: stage2"
                )
            value = _TASKS[value]
        new_holder, _, new_key = new.rpartition(".")
        target = found[new_holder] if new_holder else found
        if new_key in target and target[new_key] != value:
            raise QLIPError(f"{where}: {old} is the old name of {new}, which is also given; remove {old}")
        target[new_key] = value
        notes.append(f"{where}: {old} was renamed to {new}; using {new}: {value}")
    found.setdefault("task", "stage1")
    if isinstance(found["task"], int) and found["task"] in _TASKS:  # an override such as stage=2
        found["task"] = _TASKS[found["task"]]
    if not isinstance(found["task"], str | int):
        raise QLIPError(f"{where}: task must be a name such as stage1, got {found['task']!r}")
    return found, notes
