"""From a list of things to measure to a result: one pass a set, whatever number of evaluators looks at it."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qlip.data.loader.eval_set import EvalSet
from qlip.data.loader.transforms import EvalTransform
from qlip.data.sources.base import CaptionedImages
from qlip.errors import QLIPError
from qlip.evaluation.evaluators import registry
from qlip.evaluation.evaluators.base import Evaluator, MetricResult
from qlip.evaluation.evaluators.probe import Features, FeatureSet, run_probes
from qlip.evaluation.evaluators.throughput import THROUGHPUT, can_be_timed, timed
from qlip.evaluation.models.base import EvalModel
from qlip.evaluation.report.result import EvalResult, Result
from qlip.evaluation.run.datasets import open_set, preparation
from qlip.evaluation.run.evaluate_dataset import PassResult, measure
from qlip.runtime.machine import describe_machine, package_versions

PACKAGES = ("qlip", "torch", "numpy", "pillow", "safetensors", "tokenizers", "torchmetrics", "scikit-learn", "scipy")
PROBE = "probe"
"""An evaluator of two sets: ``train`` in its settings, and ``train_limit``; see
:mod:`qlip.evaluation.evaluators.probe`."""
ALONE = (PROBE, THROUGHPUT)
"""What shares no pass with others: the one takes two of its own, the other none."""


@dataclass(frozen=True)
class EvalSpec:
    """One evaluator on one set.

    Attributes:
        title: what tables call it.
        data: set and split, or a path.
        evaluator: its name.
        settings: of it, other than its defaults.
        limit: the first so many images of the set; None takes all.
    """

    title: str
    data: str
    evaluator: str
    settings: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a measurement.

    Attributes:
        rank, world: this one's number, and how many there are.
        barrier: returns when all have come to it.
    """

    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class DatasetPass:
    """One pass over a set.

    Attributes:
        data: set and split, or a path.
        limit: the first so many images of it; None takes all.
        evaluators: that look at it together.
    """

    data: str
    limit: int | None
    evaluators: tuple[Evaluator, ...]

    @property
    def slug(self) -> str:
        """What the folder of its rows is called."""
        settings = json.dumps([dict(one.settings()) for one in self.evaluators], sort_keys=True)
        parts = [self.data, "all" if self.limit is None else str(self.limit), *(one.name for one in self.evaluators)]
        readable = re.sub(r"[^A-Za-z0-9_.]+", "-", "-".join(parts))[-120:].strip("-")
        return f"{readable}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"

    def prepared(self, model: EvalModel, source: CaptionedImages) -> EvalSet:
        """Its images as a model wants them."""
        return EvalSet(source, EvalTransform(model.preprocessing), self.limit)


@dataclass(frozen=True)
class Outcome:
    """A result, and what is too large for its JSON.

    Attributes:
        result: figures and what they depend on.
        metric_results: one for each of ``result.measured``, in order.
    """

    result: Result
    metric_results: list[MetricResult]


def run_specs(
    model: EvalModel,
    items: Sequence[EvalSpec],
    *,
    work: Path | None = None,
    ranks: Ranks = Ranks(),
    batch_size: int = 64,
    num_workers: int = 0,
    opened: Callable[[str], CaptionedImages] = open_set,
    advance: Callable[[int], None] = lambda done: None,
    saved: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome | None:
    """Measure everything, a pass for each set.

    Args:
        model: in eval mode.
        items: what to measure; those of one set and limit share a pass.
        work: keeps rows, so that a killed run goes on; None keeps them in memory.
        ranks: of the processes that share the work.
        batch_size, num_workers: of the passes.
        opened: a set's images by its name; by default public sets and paths.
        advance: called with the number of images done.
        saved: called with what there is after each pass, on the first rank.

    Returns:
        The result; None on all ranks but the first.

    Raises:
        QLIPError: no such set or evaluator, or a model that cannot serve it; before anything is measured.
    """
    run = _Run(model, work, ranks, batch_size, num_workers, cache(opened), advance)
    made = {number: evaluator_of(item) for number, item in enumerate(items) if item.evaluator != THROUGHPUT}
    for number, item in enumerate(items):
        if item.evaluator == THROUGHPUT:
            can_be_timed(model, item.settings)
            continue
        made[number].check(model)
        run.opened(item.data)
        if item.evaluator == PROBE:
            run.opened(str(item.settings["train"]))
    measured: dict[int, tuple[EvalResult, MetricResult]] = {}
    for data, limit, numbers in _passes(items):
        for group in _groups(items, numbers):
            found = run.look(DatasetPass(data, limit, tuple(made[number] for number in group)))
            if found is None:
                continue
            for number in group:
                metric_result = found.metric_results[made[number].name]
                measured[number] = (
                    run.row(items[number], dict(made[number].settings()), found, metric_result),
                    metric_result,
                )
            saved(_outcome(model, measured, complete=len(measured) == len(items)))
    for number, item in enumerate(items):
        if item.evaluator == PROBE and (probed := _probed(run, item)) is not None:
            measured[number] = probed
            saved(_outcome(model, measured, complete=len(measured) == len(items)))
    for number, item in enumerate(items):
        if item.evaluator == THROUGHPUT and not ranks.rank:  # at the end, when other processes have nothing to do
            measured[number] = _timed(run, item)
    return None if ranks.rank else _outcome(model, measured, complete=True)


def evaluator_of(item: EvalSpec) -> Evaluator:
    """A new evaluator as an item wants it; of a probe, that of the features of both its sets.

    Raises:
        QLIPError: no such evaluator, or a setting that it does not have.
    """
    if item.evaluator != PROBE:
        return registry.evaluator(item.evaluator, **item.settings)
    if "train" not in item.settings or (unknown := sorted(set(item.settings) - {"train", "train_limit"})):
        fault = f"has no setting {unknown[0]}" if "train" in item.settings else "needs a set to train on"
        raise QLIPError(f"{PROBE}: {fault}; it takes train, and train_limit")
    return Features()


def _probed(run: _Run, item: EvalSpec) -> tuple[EvalResult, MetricResult] | None:
    """Features of both sets, a pass each, and all probes on them."""
    known, asked = (run.look(look) for look in _both_sets(item))
    if known is None or asked is None:
        return None
    trained, tested = (FeatureSet.of(one.metric_results[Features.name]) for one in (known, asked))
    metric_result = run_probes(trained, tested)
    settings = {"train": item.settings["train"], "train_count": known.count, "train_digest": known.digest}
    return run.row(item, settings, asked, metric_result), metric_result


def _timed(run: _Run, item: EvalSpec) -> tuple[EvalResult, MetricResult]:
    settings, metric_result = timed(run.model, item.settings)
    return run.row(
        item, settings, PassResult({}, int(str(settings["batch_size"])), [], ""), metric_result
    ), metric_result


def _both_sets(item: EvalSpec) -> tuple[DatasetPass, DatasetPass]:
    """Of a probe: what it is trained on, and what it is tested on."""
    train = DatasetPass(str(item.settings["train"]), item.settings.get("train_limit"), (Features(),))
    return train, DatasetPass(item.data, item.limit, (Features(),))


def looks(items: Sequence[EvalSpec]) -> list[DatasetPass]:
    """All passes that items take, each once.

    Raises:
        QLIPError: no such evaluator, or a setting that it does not have.
    """
    found = [
        DatasetPass(data, limit, tuple(evaluator_of(items[number]) for number in group))
        for data, limit, numbers in _passes(items)
        for group in _groups(items, numbers)
    ]
    found += [look for item in items if item.evaluator == PROBE for look in _both_sets(item)]
    return list({look.slug: look for look in found}.values())


@dataclass
class _Run:
    """What all passes of a measurement share."""

    model: EvalModel
    work: Path | None
    ranks: Ranks
    batch_size: int
    num_workers: int
    opened: Callable[[str], CaptionedImages]
    advance: Callable[[int], None]

    def look(self, look: DatasetPass) -> PassResult | None:
        """One pass; None on all ranks but the first."""
        return measure(
            self.model,
            look.prepared(self.model, self.opened(look.data)),
            look.evaluators,
            folder=None if self.work is None else self.work / look.slug,
            rank=self.ranks.rank,
            world=self.ranks.world,
            barrier=self.ranks.barrier,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            advance=self.advance,
        )

    def row(
        self, item: EvalSpec, settings: dict[str, Any], found: PassResult, metric_result: MetricResult
    ) -> EvalResult:
        """A metric_result with all that it depends on."""
        return EvalResult(
            evaluator=item.evaluator,
            options=item.settings,
            settings=settings,
            title=item.title,
            data=item.data,
            count=found.count,
            limit=item.limit,
            broken=found.broken,
            preparation=preparation(self.model.preprocessing),
            as_shipped=self.model.as_shipped,
            digest=found.digest,
            values=metric_result.values,
            notes=metric_result.notes,
            tables=metric_result.tables,
        )


def total(items: Sequence[EvalSpec], opened: Callable[[str], CaptionedImages]) -> int:
    """Images of all passes, for a progress bar.

    Args:
        items: to measure.
        opened: a set's images by its name, the same each time.

    Raises:
        QLIPError: no such set, or it is not in the cache.
    """

    def length(data: str, limit: int | None) -> int:
        whole = len(opened(data))
        return whole if limit is None else min(limit, whole)

    count = sum(length(data, limit) * len(_groups(items, numbers)) for data, limit, numbers in _passes(items))
    for item in items:
        if item.evaluator == PROBE:
            count += sum(length(look.data, look.limit) for look in _both_sets(item))
    return count


def verifiable(result: Result) -> Result:
    """The same without timings, which never come out again.

    Raises:
        QLIPError: nothing is left.
    """
    kept = [one for one in result.measured if one.evaluator != THROUGHPUT]
    if not kept:
        raise QLIPError("the result holds nothing but timings, which do not come out again; there is nothing to verify")
    return result.model_copy(update={"measured": kept})


def specs_of(result: Result) -> list[EvalSpec]:
    """What has to be measured to verify a result."""
    return [EvalSpec(one.title, one.data, one.evaluator, dict(one.options), one.limit) for one in result.measured]


def _outcome(model: EvalModel, measured: dict[int, tuple[EvalResult, MetricResult]], complete: bool) -> Outcome:
    rows = [measured[number] for number in sorted(measured)]
    result = new_result(describe_model(model), [row for row, _ in rows], model.device, complete)
    return Outcome(result, [metric_result for _, metric_result in rows])


def new_result(
    model: dict[str, str], rows: Sequence[EvalResult], device: torch.device, complete: bool = True
) -> Result:
    """A result of now and here: with command, time, versions and machine.

    Args:
        model: as :func:`describe_model` says it.
        rows: what was found.
        device: that computed.
        complete: nothing is missing.
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
    """Name, kind, fingerprint and device, as a result has them."""
    dtype = getattr(getattr(model, "model", None), "dtype", torch.float32)
    return {
        "name": model.name,
        "kind": model.kind or type(model).__name__,
        "fingerprint": model.fingerprint,
        "device": model.device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _passes(items: Sequence[EvalSpec]) -> Iterable[tuple[str, int | None, list[int]]]:
    """Sets with their limits, in the order in which they are first named, and the numbers of items that share them."""
    found: dict[tuple[str, int | None], list[int]] = {}
    for number, item in enumerate(items):
        if item.evaluator not in ALONE:
            found.setdefault((item.data, item.limit), []).append(number)
    return [(data, limit, numbers) for (data, limit), numbers in found.items()]


def _groups(items: Sequence[EvalSpec], numbers: Sequence[int]) -> list[list[int]]:
    """Numbers of items that share a pass: two evaluators of one name with other settings take two."""
    groups: list[list[int]] = []
    for number in numbers:
        name = items[number].evaluator
        home = next((group for group in groups if all(items[other].evaluator != name for other in group)), None)
        if home is None:
            groups.append([number])
        else:
            home.append(number)
    return groups
