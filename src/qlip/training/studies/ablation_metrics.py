"""The figures of a study's run: what ``qlip eval`` says of its model, in one result beside it.

``results.json`` is a result as any other, and can be verified and compared; it also carries a fingerprint of the
model's files, so that figures of other weights are never taken for this model's.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qlip.data.public import read_manifest
from qlip.errors import QLIPError
from qlip.evaluation.evaluators.seen_classes import training_sources
from qlip.evaluation.models.base import QLIPEvalModel
from qlip.evaluation.networks import VGG16Features
from qlip.evaluation.report.result import EvalResult, Result
from qlip.evaluation.run import evaluate as running
from qlip.evaluation.run.evaluate import EvalSpec
from qlip.evaluation.run.suites import with_training_sources
from qlip.modeling import QLIPModel, QLIPProcessor
from qlip.runtime.machine import package_versions

RESULTS, ROWS = "results.json", "rows"
FILES = "files"
"""In the result's subject: SHA-256 of the model's files."""


def measure(place: Path, items: Sequence[EvalSpec], name: str, say: Callable[[str], None] = lambda line: None) -> None:
    """Measure what is not known of a run's model yet, a pass a set; what was stopped goes on.

    Without LPIPS' weights in the cache, what needs them is left out; it is measured when they are there.

    Args:
        place: of a finished run.
        items: what to measure.
        name: of the model, in its result.
        say: takes a line about what is going on.

    Raises:
        QLIPError: no such set, a model that cannot serve, or earlier results that cannot be read.
    """
    model, path = place / "model", place / RESULTS
    files = _fingerprint(model)
    earlier = _stored(path, files)
    rows = [] if earlier is None else earlier.measured
    if not _missing(items, rows):
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made_alike = earlier is not None and (earlier.packages, earlier.subject.get("device")) == (
        package_versions(running.PACKAGES),
        device.type,
    )
    rows = rows if made_alike else []  # one result is of one machine's packages
    wanted = with_training_sources(_missing(items, rows), training_sources(str(model)))
    say(f"measuring {name}: {', '.join(f'{one.evaluator} of {one.data}' for one in wanted)}")
    subject = QLIPEvalModel(QLIPModel.from_pretrained(model).to(device), QLIPProcessor.from_pretrained(model), name)

    def save(outcome: running.Outcome) -> None:
        found = outcome.result
        both = _chosen(items, [*found.measured, *rows])
        finished = not _missing(items, both)
        whole = {"subject": found.subject | {FILES: files}, "measured": both, "complete": finished}
        found.model_copy(update=whole).save(path)

    # rows of other weights would be refused, so each have a folder
    running.run_specs(subject, wanted, work=place / ROWS / files[:16], on_saved=save)
    shutil.rmtree(place / ROWS)


def known(place: Path, items: Sequence[EvalSpec]) -> list[EvalResult]:
    """What was measured of a run's model as it is, in the order of the items; may be incomplete.

    Raises:
        QLIPError: results that cannot be read.
    """
    stored = _stored(place / RESULTS, _fingerprint(place / "model"))
    return [] if stored is None else _chosen(items, stored.measured)


def lpips_is_missing() -> str | None:
    """A line that says how to get LPIPS' weights, where they are not in the cache."""
    if read_manifest("lpips") is not None:
        return None
    return "lpips_vgg and fd_vgg16 are left out: their weights are not in the cache; get them with qlip data get lpips"


def needs_lpips(item: EvalSpec) -> bool:
    """Whether an item, or a figure of it, is over one of LPIPS' networks."""
    return _without_lpips(item) != item


def _without_lpips(item: EvalSpec) -> EvalSpec | None:
    """What can be measured without LPIPS' weights: the same, the same with fewer figures, or nothing."""
    if item.evaluator == "sets" and item.settings.get("network", VGG16Features.name) == VGG16Features.name:
        return None
    if item.evaluator == "reconstruction":
        return replace(item, settings={name: one for name, one in item.settings.items() if name != "lpips"})
    return item


def _missing(items: Iterable[EvalSpec], rows: Sequence[EvalResult]) -> list[EvalSpec]:
    """Items that are to be measured, as they can be."""
    found = []
    for item in items:
        can_be = _without_lpips(item) if lpips_is_missing() else item
        if can_be is not None and _row(item, rows) is None and _row(can_be, rows) is None:
            found.append(can_be)
    return found


def _chosen(items: Iterable[EvalSpec], rows: Sequence[EvalResult]) -> list[EvalResult]:
    """A row an item: its own, or where that is not there the one without LPIPS."""
    found = []
    for item in items:
        less = _without_lpips(item)
        row = _row(item, rows) or (None if less is None else _row(less, rows))
        found += [] if row is None else [row]
    return found


def _row(item: EvalSpec, rows: Iterable[EvalResult]) -> EvalResult | None:
    wanted = item.evaluator, item.data, item.limit, item.settings
    return next(
        (one for one in rows if (one.evaluator, one.data, one.limit, _asked(one.options, item)) == wanted), None
    )


def _asked(options: dict[str, Any], item: EvalSpec) -> dict[str, Any]:
    """A row's settings but for what training named, which is looked up and not asked for."""
    return {name: one for name, one in options.items() if name != "trained" or name in item.settings}


def _stored(path: Path, files: str) -> Result | None:
    """Earlier results, if they are of these very files."""
    if not path.is_file():
        return None
    try:
        found = Result.load(path)
    except QLIPError:
        raise QLIPError(f"{path}: cannot be read as a result of this qlip; delete it to measure again") from None
    return found if found.subject.get(FILES) == files else None


def _fingerprint(folder: Path) -> str:
    """SHA-256 of all that a model's figures depend on: weights, configuration, preprocessing, vocabulary."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
