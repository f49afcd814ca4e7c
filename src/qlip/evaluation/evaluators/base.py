"""The two kinds of evaluation: an `Evaluator` sees every batch of a dataset, a `RunOnce` runs once.

- An `Evaluator` turns a `ModelBatch` into `Columns`, one row per image, and later summarises all `Rows` as a
  `MetricResult` of `MetricValue`s.
- Rows are stored in `Chunk`s. A killed evaluation therefore continues without computing an image twice, any number of
  processes give the same metrics, and intervals are drawn from the very numbers that were averaged.
- A `RunOnce` (throughput, probes) may ask for `DatasetPass`es, whose `PassResult`s it gets, and then does the rest.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qlip.data.loader.eval_set import EvalSet
from qlip.data.loader.transforms import EvalTransform
from qlip.data.sources.base import CaptionedImages
from qlip.errors import QLIPError
from qlip.evaluation.metrics.intervals import mean_interval, paired_difference, proportion_interval
from qlip.evaluation.models.base import EvalModel
from qlip.evaluation.models.batch import ModelBatch
from qlip.runtime.finite import require_finite

PER_IMAGE = "per_image/"
"""Prefix of the arrays (N,) float32 that hold a metric's value for each image, in the order of the dataset."""
Columns = dict[str, Tensor]
"""Values of each image of a batch by name, (B, ...) on the CPU."""
BROKEN = "the model's output is broken"
"""Remedy in the error for values that are not finite."""


@dataclass(frozen=True)
class MetricValue:
    """The value of a metric.

    Attributes:
        value: the number itself.
        low, high: bounds of its 95% interval; None if the metric has none.
        count: number of images that the value is over.
        unit: ``dB``, ``%``, ... or "".
        better: ``higher``, ``lower``, or "" if neither is better.
        part: the classes that the images are of, if not all; only values of equal parts may be compared.
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
    """Everything that an evaluator computed.

    Attributes:
        values: by metric; a name includes what the metric depends on beside dataset, count and preparation, such as
            ``fd_vgg16``.
        notes: caveats, one line each, by the name of what they are about.
        tables: longer than single values, such as accuracy per class: name -> list of JSON records.
        arrays: data of plots, such as a confusion matrix, and values of each image: name -> tensor on the CPU.
        keys: by array with `PER_IMAGE`, its images' keys; by default those of all images, see `keep_keys`.
    """

    values: dict[str, MetricValue]
    notes: dict[str, str] = field(default_factory=dict)
    tables: dict[str, list[dict[str, object]]] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)

    def keep_keys(self, keys: list[str]) -> None:
        """Set the images' keys of arrays that have none yet."""
        for name in self.arrays:
            if name.startswith(PER_IMAGE):
                self.keys.setdefault(name, keys)

    def add_mean(self, name: str, column: Tensor, **how: Any) -> None:
        """Add the mean of a column (N,), as :func:`mean` takes it, and keep the column for paired comparisons."""
        self.values[name] = mean(column, **how)
        self.arrays[PER_IMAGE + name] = column.float() * how.get("scale", 1.0)


@dataclass(frozen=True)
class Chunk:
    """Rows of consecutive positions of a dataset, in order.

    Attributes:
        start: the first position.
        columns: by name; all of one length.
        keys, labels, captions: from the dataset.
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
    """All rows of an evaluation, read chunk by chunk so that wide columns need not fit into memory at once.

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
        """Names of the columns; empty if there are no rows."""
        return next((list(chunk.columns) for chunk in self._chunks() if len(chunk)), [])

    def column(self, name: str) -> Tensor:
        """Return a whole column, (N, ...).

        Raises:
            QLIPError: there are no rows.
        """
        parts = [chunk.columns[name] for chunk in self._chunks() if len(chunk)]
        if not parts:
            raise QLIPError(f"{name}: no image could be read; look at one with qlip info")
        return torch.cat(parts)

    def stream(self, *names: str) -> Iterator[tuple[Tensor, ...]]:
        """Yield these columns chunk by chunk."""
        for chunk in self._chunks():
            if len(chunk):
                yield tuple(chunk.columns[name] for name in names)

    def finite(self, name: str) -> Iterator[Tensor]:
        """Yield a column chunk by chunk. Raises QLIPError, with the image's key, if a value is not finite."""
        for chunk in self._chunks():
            if len(chunk):
                require_finite(chunk.columns[name], f"values of {name}", BROKEN, chunk.keys)
                yield chunk.columns[name]


class Evaluator(ABC):
    """A measurement over the images of a dataset; it keeps no state between batches.

    Attributes:
        name: in results and options.
        needs: capabilities that a model must have.
        may_be_infinite: columns in which infinity has a meaning; in others it ends the evaluation, as NaN does.
        package: see `RunOnce`.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    may_be_infinite: ClassVar[frozenset[str]] = frozenset()
    package: ClassVar[tuple[str, str] | None] = None

    @abstractmethod
    def rows(self, batch: ModelBatch) -> Columns:
        """Return one row per image; a row must not depend on the other images of the batch.

        Args:
            batch: at least one image; its model is in eval mode, gradients are off.
        """

    @abstractmethod
    def summarize(self, model: EvalModel, rows: Rows) -> MetricResult:
        """Compute the metrics from all rows, of which there is at least one."""

    def settings(self) -> Mapping[str, object]:
        """JSON of everything that the metrics depend on beside model and dataset; a part of the result."""
        return {}

    def check(self, model: EvalModel) -> None:
        """Refuse a model without the capabilities that are needed.

        Raises:
            QLIPError: naming those that it lacks.
        """
        if missing := sorted(self.needs - model.capabilities):
            lacking = " or ".join(missing).replace("_", " ")
            raise QLIPError(f"{self.name}: {model.name} cannot {lacking}; leave this evaluator out")


@dataclass(frozen=True)
class DatasetPass:
    """One pass over a dataset, shared by several evaluators.

    Attributes:
        data: dataset and split, or a path.
        limit: number of images; None takes all.
        evaluators: each with a name of its own.
        drawn: see `EvalSet`.
    """

    data: str
    limit: int | None
    evaluators: tuple[Evaluator, ...]
    drawn: bool = True

    @property
    def slug(self) -> str:
        """Name of the folder of its rows."""
        settings = json.dumps([dict(one.settings()) for one in self.evaluators], sort_keys=True)
        parts = [self.data, "all" if self.limit is None else str(self.limit), *(one.name for one in self.evaluators)]
        readable = re.sub(r"[^A-Za-z0-9_.]+", "-", "-".join(parts))[-120:].strip("-")
        return f"{readable}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"

    def prepared(self, model: EvalModel, source: CaptionedImages) -> EvalSet:
        """Return the images, preprocessed for a model."""
        return EvalSet(source, EvalTransform(model.preprocessing), self.limit, self.drawn)


@dataclass(frozen=True)
class PassResult:
    """The outcome of a pass.

    Attributes:
        metric_results: by evaluator's name.
        count: number of images measured.
        broken: (key, reason) of those that could not be read.
        digest: SHA-256 (hex) of all images' files and keys, in order.
    """

    metric_results: dict[str, MetricResult]
    count: int
    broken: list[tuple[str, str]]
    digest: str


class RunOnce(ABC):
    """A measurement that runs once, on the first rank, after all evaluators have seen their datasets.

    Attributes:
        name: in results and options.
        repeatable: False if another run gives other values, so that verification leaves it out.
        package: module that is imported when it runs, and the extra that installs it; None needs the core alone.
    """

    name: ClassVar[str]
    repeatable: ClassVar[bool] = True
    package: ClassVar[tuple[str, str] | None] = None

    @abstractmethod
    def check(self, model: EvalModel) -> None:
        """Refuse a model, or settings, that cannot be measured. Raises QLIPError."""

    def passes(self, data: str, limit: int | None) -> tuple[DatasetPass, ...]:
        """Return the passes over datasets that are needed first."""
        del data, limit
        return ()

    @abstractmethod
    def run(self, model: EvalModel, results: Sequence[PassResult]) -> tuple[dict[str, object], PassResult]:
        """Measure.

        Args:
            model: in eval mode.
            results: one for each of :meth:`passes`, in order.

        Returns:
            The settings that the metrics depend on; and under :attr:`name` the metrics, with the images they are over.
        """


def mean(
    values: Tensor, *, unit: str = "", better: str = "", seed: int = 0, resamples: int = 1000, scale: float = 1.0
) -> MetricValue:
    """Mean of a per-image metric with its 95% interval; see :mod:`qlip.evaluation.metrics.intervals`.

    Infinite values, such as the PSNR of equal images, are left out, and ``count`` is that of the others; only if
    there is no other value is the mean infinite.

    Args:
        values: (N,) of any type; bool makes it a proportion, with Wilson's interval.
        scale: multiplies all, e.g. 100 for percent.

    Raises:
        QLIPError: a value is not a number.
    """
    numbers = values.double().numpy() * scale
    if np.isnan(numbers).any():
        raise QLIPError("a metric of an image is not a number (NaN); the model's output is broken")
    if (finite := np.isfinite(numbers)).any():
        numbers = numbers[finite]
    if values.dtype == torch.bool:
        low, high = (None if bound is None else scale * bound for bound in proportion_interval(numbers / scale))
    else:
        low, high = mean_interval(numbers, seed, resamples)
    return MetricValue(float(numbers.mean()), low, high, len(numbers), unit, better)


def share_difference(first: Tensor, second: Tensor) -> MetricValue | None:
    """Share of hits in ``first`` minus that in ``second``, in points, with the interval of pairs; higher is better.

    Args:
        first, second: (N,) bool, of the same images in the same order.

    Returns:
        None for fewer than two images.
    """
    found = paired_difference(100 * first.double().numpy(), 100 * second.double().numpy())
    if found is None:
        return None
    return MetricValue(found.difference, found.low, found.high, found.images, "points", "higher")


def check_evaluators(evaluators: Sequence[Evaluator], model: EvalModel) -> None:
    """Refuse evaluators that the model cannot serve, and two of one name."""
    for one in evaluators:
        one.check(model)
    names = [one.name for one in evaluators]
    if len(set(names)) < len(names):
        raise QLIPError(f"evaluators {', '.join(names)}: two have the same name")
