"""Evaluate a model: from a list of `EvalSpec`s to a `Result`.

`run_specs` groups the evaluators by dataset into `DatasetPass`es, so that each dataset is read once, then runs what
runs once (`RunOnce`: probes, throughput). An `Outcome` is the JSON result together with the arrays that plots need.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qlip.data.sources.base import CaptionedImages
from qlip.errors import QLIPError, require
from qlip.evaluation.evaluators import registry
from qlip.evaluation.evaluators.base import DatasetPass, Evaluator, MetricResult, PassResult, RunOnce
from qlip.evaluation.models.base import EvalModel
from qlip.evaluation.report.result import EvalResult, Result
from qlip.evaluation.run.datasets import open_set, preparation
from qlip.evaluation.run.evaluate_dataset import evaluate_dataset
from qlip.runtime.machine import describe_machine, package_versions

PACKAGES = ("qlip", "torch", "numpy", "pillow", "safetensors", "tokenizers", "torchmetrics", "scikit-learn", "scipy")
"""Packages whose versions a result lists."""
REMOVED = frozenset({"robustness"})
"""Evaluators of version 0.1 that are gone; their rows in old results are shown but not verified."""
OpenImages = Callable[[str], CaptionedImages]
"""Opens the images of a dataset by its name."""


@dataclass(frozen=True)
class EvalSpec:
    """One evaluator on one dataset.

    Attributes:
        title: name of the row in tables.
        data: dataset and split, or a path.
        evaluator: its name.
        settings: those that differ from its defaults.
        limit: number of images, drawn at random by `EvalSet`; None takes all.
        drawn: False takes the first images of the set instead, as version 0.1 did.
    """

    title: str
    data: str
    evaluator: str
    settings: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    drawn: bool = True


@dataclass(frozen=True)
class Ranks:
    """This process among those that share an evaluation.

    Attributes:
        rank, world: number of this process, and how many there are.
        barrier: returns when all processes have called it.
    """

    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Outcome:
    """A result, with the arrays that are too large for its JSON.

    Attributes:
        result: metrics and everything they depend on.
        metric_results: one for each of ``result.measured``, in order.
    """

    result: Result
    metric_results: list[MetricResult]


def run_specs(
    model: EvalModel,
    specs: Sequence[EvalSpec],
    *,
    work: Path | None = None,
    ranks: Ranks = Ranks(),
    batch_size: int = 64,
    num_workers: int = 0,
    open_images: OpenImages = open_set,
    on_progress: Callable[[int], None] = lambda done: None,
    on_saved: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome | None:
    """Evaluate everything, with one pass per dataset.

    Args:
        model: in eval mode.
        specs: those of one dataset and limit share a pass.
        work: folder of rows, from which a killed run continues; None keeps them in memory.
        ranks: processes that share the work.
        batch_size, num_workers: of the passes.
        open_images: by default public datasets and paths.
        on_progress: called with the number of images done since the last call.
        on_saved: called on the first rank with the outcome so far, after each pass.

    Returns:
        The outcome; None on all ranks but the first.

    Raises:
        QLIPError: no such dataset or evaluator, or a model that cannot serve it; before anything is evaluated.
    """
    run = _Run(model, work, ranks, batch_size, num_workers, cache(open_images), on_progress)
    evaluators = [make_evaluator(spec) for spec in specs]
    for spec, evaluator in zip(specs, evaluators, strict=True):
        evaluator.check(model)
        for one in _passes_of(spec, evaluator):
            run.open_images(one.data)
    rows: dict[int, tuple[EvalResult, MetricResult]] = {}

    def keep(number: int, settings: dict[str, Any], found: PassResult) -> None:
        metrics = found.metric_results[evaluators[number].name]
        rows[number] = run.row(specs[number], settings, found, metrics), metrics

    for one, numbers in _shared_passes(specs, evaluators):
        found = run.evaluate(one)
        if found is not None:
            for number, evaluator in zip(numbers, one.evaluators, strict=True):
                keep(number, dict(evaluator.settings()), found)
            on_saved(_outcome(model, rows, complete=len(rows) == len(specs)))
    once = [(number, one) for number, one in enumerate(evaluators) if isinstance(one, RunOnce)]
    # without passes last: throughput wants the other processes to be idle
    for number, benchmark in sorted(once, key=lambda pair: not _passes_of(specs[pair[0]], pair[1])):
        results = [run.evaluate(one) for one in _passes_of(specs[number], benchmark)]
        if not ranks.rank:
            keep(number, *benchmark.run(model, [one for one in results if one is not None]))
            on_saved(_outcome(model, rows, complete=len(rows) == len(specs)))
    return None if ranks.rank else _outcome(model, rows, complete=True)


def make_evaluator(spec: EvalSpec) -> Evaluator | RunOnce:
    """Make the evaluator of a spec.

    Raises:
        QLIPError: no such evaluator, or a setting that it does not have.
    """
    return registry.evaluator(spec.evaluator, **spec.settings)


def require_packages(specs: Sequence[EvalSpec]) -> None:
    """Refuse specs whose evaluators need a package that is not installed. Raises QLIPError."""
    for package in (make_evaluator(spec).package for spec in specs):
        if package is not None:
            require(package[0], extra=package[1])


def count_images(specs: Sequence[EvalSpec], open_images: OpenImages) -> int:
    """Number of images of all passes, for a progress bar.

    Raises:
        QLIPError: no such dataset, or it is not in the cache.
    """
    evaluators = [make_evaluator(spec) for spec in specs]
    passes = [one for one, _ in _shared_passes(specs, evaluators)]
    for spec, evaluator in zip(specs, evaluators, strict=True):
        passes += _passes_of(spec, evaluator) if isinstance(evaluator, RunOnce) else ()
    lengths = [(len(open_images(one.data)), one.limit) for one in passes]
    return sum(length if limit is None else min(limit, length) for length, limit in lengths)


def repeatable(result: Result) -> Result:
    """Return a result without rows that no other run reproduces: timings, and those of removed evaluators.

    Raises:
        QLIPError: no row is left.
    """
    kept = [one for one, spec in zip(result.measured, specs_of(result), strict=True) if _is_repeatable(spec)]
    if not kept:
        raise QLIPError("the result holds only timings, or rows of removed evaluators; there is nothing to verify")
    return result.model_copy(update={"measured": kept})


def specs_of(result: Result) -> list[EvalSpec]:
    """Return what has to be evaluated to verify a result."""
    return [
        EvalSpec(one.title, one.data, one.evaluator, dict(one.options), one.limit, one.drawn) for one in result.measured
    ]


def new_result(
    model: dict[str, str], rows: Sequence[EvalResult], device: torch.device, complete: bool = True
) -> Result:
    """Make a result with command, time, package versions and machine of this process.

    Args:
        model: :func:`describe_model` of what was evaluated.
        rows: in order.
        device: that computed.
        complete: False if rows are missing.
    """
    return Result(
        subject=model,
        measured=list(rows),
        command=shlex.join(["qlip", *sys.argv[1:]]),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        packages=package_versions(PACKAGES),
        machine=describe_machine(device),
        complete=complete,
    )


def describe_model(model: EvalModel) -> dict[str, str]:
    """Name, kind, fingerprint, device and data type, as a result has them."""
    dtype = getattr(getattr(model, "model", None), "dtype", torch.float32)
    return {
        "name": model.name,
        "kind": model.kind or type(model).__name__,
        "fingerprint": model.fingerprint,
        "device": model.device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }


@dataclass
class _Run:
    """The arguments that all passes share."""

    model: EvalModel
    work: Path | None
    ranks: Ranks
    batch_size: int
    num_workers: int
    open_images: OpenImages
    on_progress: Callable[[int], None]

    def evaluate(self, one: DatasetPass) -> PassResult | None:
        """Run a pass; None on all ranks but the first."""
        return evaluate_dataset(
            self.model,
            one.prepared(self.model, self.open_images(one.data)),
            one.evaluators,
            folder=None if self.work is None else self.work / one.slug,
            rank=self.ranks.rank,
            world=self.ranks.world,
            barrier=self.ranks.barrier,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            on_progress=self.on_progress,
        )

    def row(self, spec: EvalSpec, settings: dict[str, Any], found: PassResult, metrics: MetricResult) -> EvalResult:
        """Return the metrics with everything they depend on."""
        return EvalResult(
            evaluator=spec.evaluator,
            options=spec.settings,
            settings=settings,
            title=spec.title,
            data=spec.data,
            count=found.count,
            limit=spec.limit,
            drawn=spec.drawn and spec.limit is not None,
            broken=found.broken,
            preparation=preparation(self.model.preprocessing),
            as_shipped=self.model.as_shipped,
            digest=found.digest,
            values=metrics.values,
            notes=metrics.notes,
            tables=metrics.tables,
        )


def _is_repeatable(spec: EvalSpec) -> bool:
    if spec.evaluator in REMOVED:
        return False
    made = registry.EVALUATORS.get(spec.evaluator)
    return bool(getattr(made, "repeatable", True))


def _outcome(model: EvalModel, rows: dict[int, tuple[EvalResult, MetricResult]], complete: bool) -> Outcome:
    found = [rows[number] for number in sorted(rows)]
    result = new_result(describe_model(model), [row for row, _ in found], model.device, complete)
    return Outcome(result, [metrics for _, metrics in found])


def _passes_of(spec: EvalSpec, evaluator: Evaluator | RunOnce) -> tuple[DatasetPass, ...]:
    if isinstance(evaluator, RunOnce):
        return tuple(replace(one, drawn=spec.drawn) for one in evaluator.passes(spec.data, spec.limit))
    return (DatasetPass(spec.data, spec.limit, (evaluator,), spec.drawn),)


def _shared_passes(
    specs: Sequence[EvalSpec], evaluators: Sequence[Evaluator | RunOnce]
) -> list[tuple[DatasetPass, list[int]]]:
    """Passes with the numbers of their specs: evaluators of one dataset and limit share one, unless they have one name.

    Datasets are in the order in which specs first name them.
    """
    groups: dict[tuple[str, int | None, bool], list[dict[int, Evaluator]]] = {}
    for number, (spec, evaluator) in enumerate(zip(specs, evaluators, strict=True)):
        if isinstance(evaluator, RunOnce):
            continue
        of_dataset = groups.setdefault((spec.data, spec.limit, spec.drawn), [])
        for group in of_dataset:
            if all(one.name != evaluator.name for one in group.values()):
                group[number] = evaluator
                break
        else:
            of_dataset.append({number: evaluator})
    return [
        (DatasetPass(data, limit, tuple(group.values()), drawn), list(group))
        for (data, limit, drawn), of_dataset in groups.items()
        for group in of_dataset
    ]
