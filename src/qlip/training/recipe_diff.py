"""Where two recipes, as tables for JSON, first differ."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple


class Difference(NamedTuple):
    """The first key that differs, and what either has there; a missing key's value is None."""

    key: str
    old: Any
    new: Any


def first_difference(
    old: Any, new: Any, free: Collection[str] = (), *, shared_only: bool = False, key: str = ""
) -> Difference | None:
    """Walk through two tables, in the order of the old one.

    Args:
        old, new: tables, lists and plain values.
        free: dotted keys that may differ, with all below them.
        shared_only: compare only what both have: keys that one of them lacks may be anything, and lists of one length
            are walked through, place by place. Otherwise a list differs as a whole.
        key: where in the whole both are.
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
