"""Pieces that the models for evaluation harnesses, lm-eval and lmms-eval, have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qlip.errors import QLIPError, check_integer


def batch_size_of(given: int | str) -> int:
    """Return a batch size, which a harness may give as text. Raises QLIPError: it is no number, or smaller than 1."""
    if isinstance(given, str) and not given.isdecimal():
        raise QLIPError(f"batch_size {given!r}: give a number; sizes are not found by trying")
    return check_integer("batch_size", int(given))


def batches(settings: Sequence[Mapping[str, Any]], batch_size: int) -> list[list[int]]:
    """Numbers of requests in batches of equal settings.

    Args:
        settings: of each request.
        batch_size: requests in a batch, at most.
    """
    groups: dict[str, list[int]] = {}
    for number, one in enumerate(settings):
        groups.setdefault(json.dumps(one, sort_keys=True, default=str), []).append(number)
    return [some[first : first + batch_size] for some in groups.values() for first in range(0, len(some), batch_size)]


def stops_of(settings: Mapping[str, Any]) -> list[str]:
    """Texts that end an answer: ``until`` of a task's settings, without empty ones."""
    until = settings.get("until") or []
    return [one for one in ([until] if isinstance(until, str) else until) if one]


def cut(text: str, stops: Sequence[str]) -> str:
    """Text before the first of the texts that end it."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places, default=len(text))]
