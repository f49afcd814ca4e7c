"""Evaluators by name: ours, and those that other packages register under the entry point ``qlip.evaluators``.

A package adds one with, in its ``pyproject.toml``::

    [project.entry-points."qlip.evaluators"]
    sharpness = "my_package.sharpness:Sharpness"

where the object is called without arguments and gives an :class:`~qlip.evaluation.evaluators.base.Evaluator`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from qlip.errors import QLIPError, nearest
from qlip.evaluation.evaluators.base import Evaluator

GROUP = "qlip.evaluators"
OURS: dict[str, str] = {
    "codebook": "codebook:Codebook",
    "reconstruction": "reconstruction:Reconstruction",
    "robustness": "robustness:Robustness",
    "sets": "set_distance:SetDistance",
    "sets_resnet50": "set_distance:ResNetSets",
    "sets_fid": "set_distance:InceptionSets",
    "zero_shot": "zero_shot:ZeroShot",
    "retrieval": "retrieval:Retrieval",
    "features": "probe:Features",
}
"""name -> ``module:class`` below ``qlip.evaluation.evaluators``, imported when it is asked for."""


def names() -> list[str]:
    """Of all evaluators, ours first."""
    return [*OURS, *sorted(point.name for point in entry_points(group=GROUP) if point.name not in OURS)]


def evaluator(name: str, **settings: Any) -> Evaluator:
    """A new evaluator.

    Args:
        name: of ours, or of one that another package registered.
        **settings: other than its defaults.

    Raises:
        QLIPError: no such name, no such setting, or what another package registered is none.
    """
    found: Callable[..., object] | None = None
    if name in OURS:
        module, _, attribute = OURS[name].partition(":")
        found = getattr(import_module(f"qlip.evaluation.evaluators.{module}"), attribute)
    else:
        found = next((point.load() for point in entry_points(group=GROUP) if point.name == name), None)
    if found is None:
        raise QLIPError(f"no evaluator is called {name}{nearest(name, names())}; there are {', '.join(names())}")
    try:
        made = found(**settings)
    except TypeError as error:
        raise QLIPError(f"{name}: {error}") from None
    if not isinstance(made, Evaluator):
        raise QLIPError(f"{name}: what its package registered under {GROUP} is no Evaluator")
    return made
