"""What a figure must carry: the set it was measured on, how many pictures, and how they were prepared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qlip.data.config import open_path
from qlip.data.datasets import DATASETS, open_named
from qlip.data.evalset import EvalSet
from qlip.data.sources import CaptionedImages
from qlip.data.transforms import EvalTransform
from qlip.modeling import QLIPProcessor
from qlip.modeling.processor import RESAMPLING


@dataclass(frozen=True)
class Measurement:
    """Values and what they depend on.

    Attributes:
        protocol: what was measured, e.g. ``reconstruction``.
        data: name of the set and split, or its path.
        count: pictures that were measured.
        broken: pictures that could not be read; they are in no figure.
        preparation: size, filter and crop, from the checkpoint.
        values: by name.
    """

    protocol: str
    data: str
    count: int
    broken: int
    preparation: str
    values: dict[str, float]
    notes: dict[str, Any] = field(default_factory=dict)


def open_evaluation(name: str, processor: QLIPProcessor, limit: int | None = None) -> EvalSet:
    """A set to measure on, prepared as the checkpoint says.

    Args:
        name: a public set and split such as ``cifar10:test``, or a path to a folder or tar shards.
        processor: of the checkpoint that is measured.
        limit: only the first so many pictures.

    Raises:
        QLIPError: no such set or path.
    """
    return EvalSet(_open(name), EvalTransform(processor.preprocessing), limit)


def _open(name: str) -> CaptionedImages:
    return open_named(name) if name.partition(":")[0] in DATASETS else open_path(name)


def preparation(processor: QLIPProcessor) -> str:
    """Size, filter and crop in words, as they stand in a result."""
    height, width = processor.size
    crop = "centre crop" if processor.preprocessing.shortest_edge is not None else "no crop"
    return f"{width}x{height}, {RESAMPLING[processor.preprocessing.resample].name.lower()}, {crop}"
