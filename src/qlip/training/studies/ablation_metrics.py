"""Metrics of an ablation's run: the results of ``qlip eval`` for its model, in one file next to it.

``results.json`` is an ordinary result file that can be verified and compared. It also stores a fingerprint of the
model's files, so that metrics of different weights are never attributed to this model.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qlip.data.public import read_manifest
from qlip.data.sources.training_text import TrainingText
from qlip.errors import QLIPError
from qlip.evaluation.models.base import QLIPEvalModel
from qlip.evaluation.networks import VGG16Features
from qlip.evaluation.report.result import EvalResult, Result
from qlip.evaluation.run import evaluate as running
from qlip.evaluation.run.evaluate import EvalSpec
from qlip.modeling import QLIPModel, QLIPProcessor
from qlip.runtime.machine import package_versions

RESULTS, ROWS = "results.json", "rows"
FILES = "files"
"""Key in the result's subject: SHA-256 of the model's files."""


def measure(place: Path, items: Sequence[EvalSpec], name: str, say: Callable[[str], None] = lambda line: None) -> None:
    """Run the missing measurements of a run's model, in one pass per dataset; resumes if interrupted.

    Metrics that need the LPIPS weights are left out while these are not in the cache.

    Args:
        place: folder of a finished run.
        items: measurements.
        name: name of the model in its result.
        say: called with each progress line.

    Raises:
        QLIPError: no such dataset, an unsuitable model, or earlier results cannot be read.
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
    rows = rows if made_alike else []  # one result file is for one device type and one set of package versions
    wanted = _missing(items, rows)
    say(f"measuring {name}: {', '.join(f'{one.evaluator} of {one.data}' for one in wanted)}")
    network, processor = QLIPModel.from_pretrained(model).to(device), QLIPProcessor.from_pretrained(model)
    subject = QLIPEvalModel(network, processor, name, training_text=TrainingText.read(model))

    def save(outcome: running.Outcome) -> None:
        found = outcome.result
        both = _chosen(items, [*found.measured, *rows])
        finished = not _missing(items, both)
        whole = {"subject": found.subject | {FILES: files}, "measured": both, "complete": finished}
        found.model_copy(update=whole).save(path)

    # intermediate rows of different weights would be rejected, hence a folder per fingerprint
    running.run_specs(subject, wanted, work=place / ROWS / files[:16], on_saved=save)
    shutil.rmtree(place / ROWS)


def known(place: Path, items: Sequence[EvalSpec]) -> list[EvalResult]:
    """Results for the current model of a run, in the order of the items; may be incomplete.

    Raises:
        QLIPError: results cannot be read.
    """
    stored = _stored(place / RESULTS, _fingerprint(place / "model"))
    return [] if stored is None else _chosen(items, stored.measured)


def lpips_is_missing() -> str | None:
    """Message that tells how to download the LPIPS weights, or None if they are in the cache."""
    if read_manifest("lpips") is not None:
        return None
    return "lpips_vgg and fd_vgg16 are left out: their weights are not in the cache; get them with qlip data get lpips"


def needs_lpips(item: EvalSpec) -> bool:
    """Return True if a measurement, or one of its metrics, uses a network of LPIPS."""
    return _without_lpips(item) != item


def _without_lpips(item: EvalSpec) -> EvalSpec | None:
    """Reduce a measurement to what needs no LPIPS weights: unchanged, with fewer metrics, or None."""
    if item.evaluator == "sets" and item.settings.get("network", VGG16Features.name) == VGG16Features.name:
        return None
    if item.evaluator == "reconstruction":
        return replace(item, settings={name: one for name, one in item.settings.items() if name != "lpips"})
    return item


def _missing(items: Iterable[EvalSpec], rows: Sequence[EvalResult]) -> list[EvalSpec]:
    """Measurements without a row, reduced to what the cached weights allow."""
    found = []
    for item in items:
        can_be = _without_lpips(item) if lpips_is_missing() else item
        if can_be is not None and _row(item, rows) is None and _row(can_be, rows) is None:
            found.append(can_be)
    return found


def _chosen(items: Iterable[EvalSpec], rows: Sequence[EvalResult]) -> list[EvalResult]:
    """Choose one row per item: the full one if it exists, else the one without LPIPS."""
    found = []
    for item in items:
        less = _without_lpips(item)
        row = _row(item, rows) or (None if less is None else _row(less, rows))
        found += [] if row is None else [row]
    return found


def _row(item: EvalSpec, rows: Iterable[EvalResult]) -> EvalResult | None:
    wanted = item.evaluator, item.data, item.limit, item.drawn and item.limit is not None, item.settings
    return next((one for one in rows if (one.evaluator, one.data, one.limit, one.drawn, one.options) == wanted), None)


def _stored(path: Path, files: str) -> Result | None:
    """Load earlier results; None if there are none or they are for different model files."""
    if not path.is_file():
        return None
    try:
        found = Result.load(path)
    except QLIPError:
        raise QLIPError(f"{path}: not a valid result file of this version; delete it to measure again") from None
    return found if found.subject.get(FILES) == files else None


def _fingerprint(folder: Path) -> str:
    """SHA-256 of all files of a model: weights, configuration, preprocessing and vocabulary."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
