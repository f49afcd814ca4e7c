"""Evaluators by name: those of this package, and those that others register under the entry point ``qlip.evaluators``.

A package adds one with, in its ``pyproject.toml``::

    [project.entry-points."qlip.evaluators"]
    sharpness = "my_package.sharpness:Sharpness"

where the object is called with the settings and makes an `Evaluator` or a `RunOnce` of
`qlip.evaluation.evaluators.base`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import Evaluator, RunOnce
from qlip.registry import Registry, unknown_name

GROUP = "qlip.evaluators"
EVALUATORS = Registry[Callable[..., object]](
    "evaluator",
    {
        "codebook": "qlip.evaluation.evaluators.codebook:Codebook",
        "reconstruction": "qlip.evaluation.evaluators.reconstruction:Reconstruction",
        "sets": "qlip.evaluation.evaluators.set_distance:SetDistance",
        "sets_resnet50": "qlip.evaluation.evaluators.set_distance:ResNetSets",
        "sets_fid": "qlip.evaluation.evaluators.set_distance:InceptionSets",
        "scenes": "qlip.evaluation.evaluators.scenes:ScenesRight",
        "zero_shot": "qlip.evaluation.evaluators.zero_shot:ZeroShot",
        "retrieval": "qlip.evaluation.evaluators.retrieval:Retrieval",
        "features": "qlip.evaluation.evaluators.probe:Features",
        "probe": "qlip.evaluation.evaluators.probe:Probe",
        "throughput": "qlip.evaluation.evaluators.throughput:ThroughputBenchmark",
    },
    group=GROUP,
)


def evaluator(name: str, **settings: Any) -> Evaluator | RunOnce:
    """Make an evaluator.

    Args:
        name: in `EVALUATORS`.
        **settings: arguments that differ from its defaults.

    Raises:
        QLIPError: no such name or setting, a value of another type, or another package registered something that is
            neither kind.
    """
    found = EVALUATORS.find(name)
    if settings:
        _check_settings(name, found, settings)
    try:
        made = found(**settings)
    except TypeError as error:
        raise QLIPError(f"{name}: {error}") from None
    if not isinstance(made, Evaluator | RunOnce):
        raise QLIPError(f"{name}: its package registered a {type(made).__name__} under {GROUP}, which is no Evaluator")
    return made


def _check_settings(name: str, make: Callable[..., object], settings: Mapping[str, Any]) -> None:
    """Refuse unknown settings and values of another type, by the annotations of the evaluator's arguments."""
    parameters = signature(make).parameters
    if any(one.kind is Parameter.VAR_KEYWORD for one in parameters.values()):
        return
    made: Any = make
    try:
        hints = get_type_hints(made.__init__ if isinstance(make, type) else made)
    except (NameError, TypeError):
        hints = {}  # annotations that only a type checker can resolve
    for key, value in settings.items():
        if key not in parameters:
            raise unknown_name(f"{name}.{key}", "setting", [f"{name}.{one}" for one in parameters])
        try:
            TypeAdapter(hints.get(key, Any), config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            raise QLIPError(f"{name}.{key}: {first['msg']}, got {value!r}") from None
