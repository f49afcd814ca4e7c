"""First difference between two recipes, given as nested dicts and lists."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple


class Difference(NamedTuple):
    """A dotted key whose value differs, with both values; None for a missing key."""

    key: str
    old: Any
    new: Any


def first_difference(
    old: Any, new: Any, free: Collection[str] = (), *, shared_only: bool = False, key: str = ""
) -> Difference | None:
    """Find the first key whose value differs, in the order of ``old``.

    Args:
        old, new: nested dicts, lists and plain values.
        free: dotted keys that may differ, including all keys below them.
        shared_only: ignore keys that only one side has, and compare lists of equal length element by element; otherwise
            a list is compared as one value.
        key: dotted key of both values within the whole recipe; empty at the top.
    """
    if key in free or old == new:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in old if name in new] if shared_only else dict.fromkeys([*old, *new])
        pairs = [(name, old.get(name), new.get(name)) for name in names]
    elif shared_only and isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(place, *pair) for place, pair in enumerate(zip(old, new, strict=True))]
    else:
        return Difference(key, old, new)
    for name, one, other in pairs:
        inner = f"{key}.{name}".lstrip(".")
        if (found := first_difference(one, other, free, shared_only=shared_only, key=inner)) is not None:
            return found
    return None
