"""Recipes of earlier versions: one function turns their keys into today's."""

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
"""Dotted keys of version 0.1 and their names today."""
_TASKS = {1: "stage1", 2: "stage2"}


def upgrade(values: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Upgrade the table of a recipe to today's keys.

    Version 0.1 had ``stage: 1`` or ``stage: 2``, and stage 1 where it was not given.

    Args:
        values: the table; it stays as it is.
        where: the file, named in notes and errors.

    Returns:
        The upgraded table, and a line for each key that was renamed.

    Raises:
        QLIPError: an old key beside its new name, or a stage that never was.
    """
    found, notes = copy.deepcopy(values), list[str]()
    for old, new in RENAMED.items():
        holder, _, key = old.rpartition(".")
        table = found.get(holder) if holder else found
        if not isinstance(table, dict) or key not in table:
            continue
        value = table.pop(key)
        if old == "stage":
            if value not in _TASKS:
                raise QLIPError(f"{where}: stage is 1 or 2, got {value!r}; today's key is task: stage1 or task: stage2")
            value = _TASKS[value]
        new_holder, _, new_key = new.rpartition(".")
        target = found[new_holder] if new_holder else found
        if new_key in target and target[new_key] != value:
            raise QLIPError(f"{where}: {old} is the old name of {new}; give {new} alone")
        target[new_key] = value
        notes.append(f"{where}: {old} is {new} now; it is read as {new}: {value}")
    found.setdefault("task", "stage1")
    if isinstance(found["task"], int) and found["task"] in _TASKS:  # an override such as stage=2
        found["task"] = _TASKS[found["task"]]
    return found, notes
