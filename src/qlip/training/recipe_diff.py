"""Differences between two recipes, given as nested dicts and lists, key by key."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

KEYS_SHOWN, VALUE_WIDTH = 8, 60


class Difference(NamedTuple):
    """A dotted key whose value differs, with both values; None for a missing key."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} ({_short(self.old)}, now {_short(self.new)})"


def differences(
    old: Any, new: Any, free: Collection[str] = (), *, shared_only: bool = False, key: str = ""
) -> Iterator[Difference]:
    """Find the keys whose values differ, in the order of ``old``; lists of equal length are compared by element.

    Args:
        old, new: nested dicts, lists and plain values.
        free: dotted keys that may differ, including all keys below them.
        shared_only: ignore keys that only one side has.
        key: dotted key of both values within the whole recipe; empty at the top.
    """
    if key in free or old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in old if name in new] if shared_only else dict.fromkeys([*old, *new])
        pairs = [(name, old.get(name), new.get(name)) for name in names]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(place, *pair) for place, pair in enumerate(zip(old, new, strict=True))]
    else:
        yield Difference(key, old, new)
        return
    for name, one, other in pairs:
        yield from differences(one, other, free, shared_only=shared_only, key=f"{key}.{name}".lstrip("."))


def listed(found: Sequence[Difference]) -> str:
    """Differences on one line, for an error."""
    more = f" and {len(found) - KEYS_SHOWN} more" if len(found) > KEYS_SHOWN else ""
    return ", ".join(map(str, found[:KEYS_SHOWN])) + more


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= VALUE_WIDTH else f"{text[: VALUE_WIDTH - 3]}..."
