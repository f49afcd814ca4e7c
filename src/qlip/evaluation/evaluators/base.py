"""An evaluator: what one batch gives, a row an image, and what all rows together say.

Rows are what is stored, so a killed measurement goes on without seeing an image twice, any number of processes give
the same figures, and intervals can be drawn from the very numbers that were averaged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from qlip.data.loader.eval_set import EvalBatch
from qlip.errors import QLIPError
from qlip.evaluation.models.base import EvalModel

Columns = dict[str, Tensor]
"""By name, (B, ...) on the CPU: what is known of each image of a batch."""


@dataclass(frozen=True)
class MetricValue:
    """A figure.

    Attributes:
        value: the figure itself.
        low, high: bounds of its 95% bootstrap interval over images; None where none can be had that way.
        count: images it is over.
        unit: ``dB``, ``%``, ... or "".
        better: ``higher``, ``lower``, or "" where neither is.
        part: of the images, where it is over those of some classes alone: figures of equal ones may be held against
            each other.
    """

    value: float
    low: float | None = None
    high: float | None = None
    count: int = 0
    unit: str = ""
    better: str = ""
    part: str = ""

    __pydantic_config__: ClassVar = {"extra": "forbid", "ser_json_inf_nan": "strings"}  # as a part of result.json


@dataclass
class MetricResult:
    """What an evaluator found.

    Attributes:
        values: figures by name; a name says what it depends on beside set, count and preparation, e.g. ``fd_vgg16``.
        notes: what to keep in mind, one line each, by the name it is about.
        tables: rows too long for figures, e.g. accuracy a class: name -> list of records that are JSON.
        arrays: what an image is drawn from, e.g. a confusion matrix: name -> tensor on the CPU.
    """

    values: dict[str, MetricValue]
    notes: dict[str, str] = field(default_factory=dict)
    tables: dict[str, list[dict[str, object]]] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk:
    """Rows of consecutive positions of a set, in order.

    Attributes:
        start: the first position.
        columns: by name; all of one length.
        keys, labels, captions: as the set gives them.
        broken: (key, reason) of images that could not be read; they have no row.
        digest: SHA-256 (hex) of the images' files and keys.
    """

    start: int
    columns: Columns
    keys: list[str]
    labels: list[str | None]
    captions: list[tuple[str, ...]]
    broken: list[tuple[str, str]]
    digest: str

    def __len__(self) -> int:
        return len(self.keys)


class Rows:
    """All rows of a measurement, chunk by chunk, so that what is long need not lie in memory at once.

    Args:
        chunks: called for a new iterator over them, in order.
    """

    def __init__(self, chunks: Callable[[], Iterator[Chunk]]) -> None:
        self._chunks = chunks
        self.labels: list[str | None] = []
        self.captions: list[tuple[str, ...]] = []
        self.keys: list[str] = []
        for chunk in chunks():
            self.labels += chunk.labels
            self.captions += chunk.captions
            self.keys += chunk.keys

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def names(self) -> list[str]:
        """Of the columns; none where there is no row."""
        return next((list(chunk.columns) for chunk in self._chunks() if len(chunk)), [])

    def column(self, name: str) -> Tensor:
        """All of a column, (N, ...).

        Raises:
            QLIPError: there is no row at all.
        """
        parts = [chunk.columns[name] for chunk in self._chunks() if len(chunk)]
        if not parts:
            raise QLIPError(f"{name}: not one picture could be read; look at one with qlip info")
        return torch.cat(parts)

    def stream(self, *names: str) -> Iterator[tuple[Tensor, ...]]:
        """Columns of a chunk after the other."""
        for chunk in self._chunks():
            if len(chunk):
                yield tuple(chunk.columns[name] for name in names)


class Evaluator(ABC):
    """One thing to measure, during training as from the command line; it keeps no state between batches.

    Attributes:
        name: what results and options call it.
        needs: what a model must be able to do.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]

    @abstractmethod
    def rows(self, model: EvalModel, batch: EvalBatch) -> Columns:
        """What is known of each image of a batch; it must not depend on what else is in the batch.

        Args:
            model: in eval mode; gradients are off.
            batch: at least one image, ``pixel_values`` on the model's device.
        """

    @abstractmethod
    def summarize(self, model: EvalModel, rows: Rows) -> MetricResult:
        """What all rows say; at least one is there."""

    def settings(self) -> Mapping[str, object]:
        """What the figures depend on beside model and set: JSON, part of the result."""
        return {}

    def check(self, model: EvalModel) -> None:
        """Refuse a model that cannot do what is needed.

        Raises:
            QLIPError: naming what it lacks.
        """
        if missing := sorted(self.needs - model.capabilities):
            raise QLIPError(
                f"{self.name}: {model.name} cannot {' or '.join(missing).replace('_', ' ')}; leave this evaluator out"
            )


def mean(
    values: Tensor, *, unit: str = "", better: str = "", seed: int = 0, resamples: int = 1000, scale: float = 1.0
) -> MetricValue:
    """The mean of a figure an image, with its 95% percentile bootstrap interval (Efron, 1979).

    Args:
        values: (N,) of any type.
        scale: multiplies all, e.g. 100 for percent.

    Raises:
        QLIPError: a value is not a number.
    """
    numbers = values.double().numpy() * scale
    if np.isnan(numbers).any():
        raise QLIPError("a figure of a picture is not a number (NaN); the model's output is broken")
    low, high = interval(numbers, seed, resamples)
    return MetricValue(float(numbers.mean()), low, high, len(numbers), unit, better)


def interval(
    numbers: np.ndarray, seed: int = 0, resamples: int = 1000, sizes: np.ndarray | None = None
) -> tuple[float | None, float | None]:
    """Bounds of the 95% bootstrap interval of a mean; None for fewer than two numbers or infinite ones.

    Args:
        numbers: (N,) one an image, each drawn again or not.
        sizes: (N,) where an image counts more than once: the interval is of sum(numbers) / sum(sizes).
    """
    if len(numbers) < 2 or not np.isfinite(numbers).all():
        return None, None
    draw, means = np.random.default_rng(seed), np.empty(resamples)
    per_turn = max(1, 4_000_000 // len(numbers))
    for start in range(0, resamples, per_turn):
        stop = min(resamples, start + per_turn)
        chosen = draw.integers(0, len(numbers), (stop - start, len(numbers)))
        drawn = numbers[chosen]
        means[start:stop] = drawn.mean(1) if sizes is None else drawn.sum(1) / sizes[chosen].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def checked(evaluators: Sequence[Evaluator], model: EvalModel) -> None:
    """Refuse what the model cannot do, and two evaluators of one name."""
    for one in evaluators:
        one.check(model)
    names = [one.name for one in evaluators]
    if len(set(names)) < len(names):
        raise QLIPError(f"evaluators {', '.join(names)}: two have one name")
