"""Differences of two recipes, key by key."""

from __future__ import annotations

from typing import Any

import pytest

from qlip.training.recipe_diff import KEYS_SHOWN, Difference, differences, listed

OLD = {"name": "a", "data": {"sources": [{"path": "x", "flip": 0.5}], "store": {"cache": 1}}, "ema": None}


@pytest.mark.parametrize(
    ("new", "whole", "shared"),
    [
        (OLD, None, None),
        (OLD | {"name": "b"}, ("name", "a", "b"), ("name", "a", "b")),
        (OLD | {"ema": {"decay": 0.9}}, ("ema", None, {"decay": 0.9}), ("ema", None, {"decay": 0.9})),
        # a key that only one of them has
        (OLD | {"seed": 1}, ("seed", None, 1), None),
        ({"name": "a"}, ("data", OLD["data"], None), None),
        (OLD | {"seed": None}, None, None),
        # lists
        (
            OLD | {"data": {"sources": [{"path": "x", "flip": 0}], "store": {"cache": 1}}},
            ("data.sources.0.flip", 0.5, 0),
            ("data.sources.0.flip", 0.5, 0),
        ),
        (
            OLD | {"data": {"sources": []}},
            ("data.sources", [{"path": "x", "flip": 0.5}], []),
            ("data.sources", [{"path": "x", "flip": 0.5}], []),
        ),
        # what may differ, with all below it
        (OLD | {"data": {"sources": [{"path": "x", "flip": 0.5}], "store": {"cache": 2}}}, None, None),
    ],
)
def test_differences__one_key(new: Any, whole: Any, shared: Any) -> None:
    assert list(differences(OLD, new, ["data.store"])) == ([] if whole is None else [Difference(*whole)])
    shared_only = list(differences(OLD, new, ["data.store"], shared_only=True))
    assert shared_only == ([] if shared is None else [Difference(*shared)])


def test_listed__names_each_key_and_shortens_long_values() -> None:
    found = list(differences(OLD, {**OLD, "name": "b", "data": {"sources": list(range(100)), "store": {"cache": 2}}}))
    line = listed(found)
    assert line.startswith("name ('a', now 'b'), data.sources ([{'path': 'x', 'flip': 0.5}], now [0, 1, 2,")
    assert line.endswith("data.store.cache (1, now 2)") and len(line) < 200
    many = [Difference(str(number), 0, 1) for number in range(KEYS_SHOWN + 3)]
    assert listed(many).endswith("7 (0, now 1) and 3 more")
