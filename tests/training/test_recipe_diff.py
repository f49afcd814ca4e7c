"""The first difference of two recipes."""

from __future__ import annotations

from typing import Any

import pytest

from qlip.training.recipe_diff import Difference, first_difference

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
            ("data.sources", [{"path": "x", "flip": 0.5}], [{"path": "x", "flip": 0}]),
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
def test_the_first_difference(new: Any, whole: Any, shared: Any) -> None:
    assert first_difference(OLD, new, ["data.store"]) == (whole and Difference(*whole))
    assert first_difference(OLD, new, ["data.store"], shared_only=True) == (shared and Difference(*shared))
