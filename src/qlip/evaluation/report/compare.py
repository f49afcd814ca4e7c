"""Compare results: only metrics of the same evaluator, dataset and settings share a table.

The same means equal evaluator, settings, set, images (by digest), count and preparation. What differs in one of
them goes into a table of its own and says so; different preparations are refused unless they are asked for. What
models were trained on may differ: notes say it, and a metric over the classes that training named, or did not, is
held only against those over the same classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
from torch import Tensor

from qlip.data.sources.base import printable
from qlip.errors import QLIPError, nearest
from qlip.evaluation.evaluators.base import PER_IMAGE, MetricValue
from qlip.evaluation.metrics.intervals import Paired, paired_difference
from qlip.evaluation.report.bundle import Bundle
from qlip.evaluation.report.result import EvalResult, Result
from qlip.evaluation.report.table import MISSING, Cell, Table, heading, interval, number, titled

BOLD = "bold: the best, and models that a paired comparison over the same images does not tell from it (95%)"


class PreparationError(QLIPError):
    """Results over images that were prepared differently."""


@dataclass
class Row:
    """A model.

    Attributes:
        model: its name in tables.
        kind: of its subject, e.g. ``CodecSubject``.
        preparation: of its images.
        metrics: by name.
        notes: numbers of the table's notes that are about it.
        per_image: values (N,) of each image by metric, where the result's folder has them.
    """

    model: str
    kind: str | None
    preparation: str
    metrics: dict[str, MetricValue] = field(default_factory=dict)
    notes: list[int] = field(default_factory=list)
    per_image: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Comparison:
    """Metrics that may be compared with each other.

    Attributes:
        first: the first result; evaluator, set, images, count and settings are those of all.
        preparation: of all rows, or "" where they differ.
        columns: by metric a value that has its unit and better side, in the order in which evaluators give them.
        rows: models, in the order in which they were given.
        notes: what to keep in mind.
    """

    first: EvalResult
    preparation: str
    columns: dict[str, MetricValue] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def caption(self) -> str:
        """Evaluator, dataset, count and preparation, e.g. ``codebook on cifar10:test (n=500; 64x64, bicubic)``."""
        prepared = self.preparation or "preparations differ"
        evaluator = self.first.evaluator.replace("_", " ")
        return f"{evaluator} on {printable(self.first.data)} (n={self.first.count:,}; {prepared})"

    def best(self, column: str) -> set[str]:
        """Models that are marked as best; none where there is no better side, one row, or an infinite value.

        These are the best value as it is written and those that a paired comparison over the same images does not
        tell from it with 95% confidence. Nor is there a best of metrics that are over different classes.
        """
        better, unit = self.columns[column].better, self.columns[column].unit
        rows = {row.model: row for row in self.rows if column in row.metrics}
        values = {model: row.metrics[column].value for model, row in rows.items()}
        if not better or len(values) < 2 or not self.preparation or len(self.parts(column)) > 1:
            return set()
        if not all(math.isfinite(one) for one in values.values()):
            return set()
        first = (max if better == "higher" else min)(values, key=lambda model: values[model])
        found = {model for model, one in values.items() if number(one, unit) == number(values[first], unit)}
        for model, row in rows.items():
            paired = None if model == first else paired_rows(rows[first], row, column)
            if paired is not None:
                (found.discard if paired.low > 0 or paired.high < 0 else found.add)(model)
        return found

    def parts(self, column: str) -> list[str]:
        """The distinct parts (`MetricValue.part`) of a column; values may be compared if there is one."""
        return list(dict.fromkeys(row.metrics[column].part for row in self.rows if column in row.metrics))

    def table(self, intervals: bool = False) -> Table:
        """Return it as text, with 95% intervals where wanted; a column has the preparations where they differ."""
        best = {name: self.best(name) for name in self.columns}
        head = [heading(name, metric) for name, metric in self.columns.items()]
        rows = []
        for row in self.rows:
            cells = [Cell(row.model, notes=row.notes), *([] if self.preparation else [Cell(row.preparation)])]
            for name in self.columns:
                metric = row.metrics.get(name)
                text = MISSING if metric is None else number(metric.value, metric.unit)
                behind = interval(metric) if intervals and metric is not None else ""
                cells.append(Cell(text, behind, row.model in best[name]))
            rows.append(cells)
        title = "" if self.first.title in ("", self.first.data) else f"{self.first.title}: "
        head = ["", *([] if self.preparation else ["preparation"]), *head]
        return Table(title + self.caption, head, rows, self.notes)


def paired_rows(first: Row, second: Row, column: str) -> Paired | None:
    """Compare two models image by image; None if a result's folder has no values of each image."""
    both = [row.per_image.get(column) for row in (first, second)]
    if both[0] is None or both[1] is None or both[0].shape != both[1].shape:
        return None
    return paired_difference(both[0], both[1])


@dataclass(frozen=True)
class _Entry:
    """One row of a result, with its model's name and arrays."""

    model: str
    kind: str | None
    measured: EvalResult
    arrays: Mapping[str, Tensor]


def compare(results: Sequence[Result | Bundle], *, mixed: bool = False, only: Sequence[str] = ()) -> list[Comparison]:
    """Compare all metrics, in a table for each group that may be compared.

    Args:
        results: of one model each; two of one model fill the same row. Folders (`Bundle`) have values of each image,
            over which models are compared in pairs.
        mixed: put models of different preparation into one table; each then says its own, and none is best.
        only: these metrics, in this order; all where none is named.

    Raises:
        PreparationError: models whose images were prepared differently, without ``mixed``.
        QLIPError: fewer than one result, one metric of one model with two values, or no such metric.
    """
    if not results:
        raise QLIPError("nothing to compare; give result files that qlip eval --output wrote")
    bundles = [one if isinstance(one, Bundle) else Bundle(one, []) for one in results]
    entries = []
    for name, bundle in zip(names_of([one.result for one in bundles]), bundles, strict=True):
        for one, metric_result in zip_longest(bundle.result.measured, bundle.metric_results):
            arrays = {} if metric_result is None else metric_result.arrays
            entries.append(_Entry(name, bundle.result.subject.get("kind"), one, arrays))
    if not mixed:
        _refuse_mixed(entries)
    _refuse_unknown(entries, only)
    groups: dict[str, list[_Entry]] = {}
    for entry in entries:
        groups.setdefault(_key(entry.measured, mixed), []).append(entry)
    found = [_comparison(group, only) for group in groups.values()]
    _note_what_differs(found)
    return [one for one in found if one.columns or not only]


def names_of(results: Sequence[Result]) -> list[str]:
    """Name of each result's model in tables: its own; of two of one name, with the fingerprint's first digits.

    Of a path as much of its end as tells them apart; the results have it whole.
    """
    found = [(printable(one.subject.get("name", "?")), one.subject.get("fingerprint", "")) for one in results]
    prints: dict[str, set[str]] = {}
    for name, fingerprint in found:
        prints.setdefault(name, set()).add(fingerprint)
    # as many digits as it takes: those of models with one encoder begin alike
    digits = {
        name: next((n for n in range(8, 65) if len({one[:n] for one in some}) == len(some)), 64)
        for name, some in prints.items()
    }
    short = _without_folders(list(prints))
    return [
        short[name] if len(prints[name]) == 1 else f"{short[name]} ({fingerprint[: digits[name]]})"
        for name, fingerprint in found
    ]


def _without_folders(names: Sequence[str]) -> dict[str, str]:
    """Each path without folders that all the others can do without, and without a run's ``model`` at its end.

    Two parts stay: it may be ``owner/model``. An adapter's name, which has a colon, is no path.
    """
    parts = {name: tuple(name.removesuffix("/model").split("/")) for name in names}
    for count in range(2, max(map(len, parts.values()), default=1) + 1):
        short = {
            name: "/".join(some[-count:]) if len(name.split("/")) > 2 and ":" not in name else name
            for name, some in parts.items()
        }
        if len(set(short.values())) == len(names):
            return short
    return {name: name for name in names}


def _key(one: EvalResult, mixed: bool) -> str:
    prepared = "" if mixed else one.prepared
    return json.dumps([one.evaluator, one.data, one.count, one.digest, prepared, one.settings], sort_keys=True)


def _refuse_mixed(entries: Sequence[_Entry]) -> None:
    seen: dict[tuple[str, str], _Entry] = {}
    for entry in entries:
        one = entry.measured
        other = seen.setdefault((one.evaluator, one.data), entry)
        if other.measured.prepared != one.prepared:
            raise PreparationError(
                f"{one.evaluator} on {one.data}: {other.model} was measured at {other.measured.prepared},"
                f" {entry.model} at {one.prepared}; measure both at one size, or compare them as mixed, each under"
                " its own preparation"
            )


def _refuse_unknown(entries: Sequence[_Entry], names: Sequence[str]) -> None:
    known = list(dict.fromkeys(name for entry in entries for name in entry.measured.values))
    for name in names:
        if name not in known:
            raise QLIPError(f"no result has a metric {name}{nearest(name, known)}; there are {', '.join(known)}")


def _comparison(group: Sequence[_Entry], only: Sequence[str]) -> Comparison:
    preparations = list(dict.fromkeys(entry.measured.prepared for entry in group))
    found = Comparison(group[0].measured, preparations[0])
    if len(preparations) > 1:
        found.preparation = ""
        found.notes.append("images were prepared differently: metrics are no comparison, and none is marked as best")
    rows: dict[tuple[str, str], Row] = {}  # a model at two sizes has two, where that is asked for
    columns: dict[str, MetricValue] = {}
    for entry in group:
        one = entry.measured
        row = rows.setdefault((entry.model, one.prepared), Row(entry.model, entry.kind, one.prepared))
        for name, metric in one.values.items():
            if name in row.metrics and row.metrics[name].value != metric.value:
                raise QLIPError(
                    f"{one.full_name(name)} of {row.model} is {row.metrics[name].value:.6g} in one result and"
                    f" {metric.value:.6g} in another; give one of them"
                )
            row.metrics[name] = metric
            columns.setdefault(name, metric)
            if PER_IMAGE + name in entry.arrays:
                row.per_image[name] = entry.arrays[PER_IMAGE + name].numpy().astype(float)
        _note(found, row, one)
    found.columns = {name: columns[name] for name in only or columns if name in columns}
    found.rows = list(rows.values())
    _note_other_classes(found)
    _note_pairs(found)
    return found


def _note(found: Comparison, row: Row, one: EvalResult) -> None:
    """Add the notes of a result, each once, and their numbers to its row."""
    notes = [f"{name}: {note}" for name, note in one.notes.items()]
    if one.broken:
        many = f"{len(one.broken):,} images could not be read and are"
        images = "1 image could not be read and is" if len(one.broken) == 1 else many
        notes.append(f"{images} not counted")
    found.notes += [note for note in notes if note not in found.notes]
    row.notes = sorted({*row.notes, *(found.notes.index(note) + 1 for note in notes)})


def _note_other_classes(found: Comparison) -> None:
    different: dict[str, list[str]] = {}
    for name, metric in found.columns.items():
        if metric.better and len(parts := found.parts(name)) > 1:
            different.setdefault("; ".join(part or "all classes" for part in parts), []).append(titled(name))
    for classes, titles in different.items():
        found.notes.append(f"{', '.join(titles)}: over different classes ({classes}), so none is marked as best")


def _note_pairs(found: Comparison) -> None:
    """Note what bold means where pairs of images decided on it, and the differences of two models."""
    names = [
        name
        for name, metric in found.columns.items()
        if metric.better and sum(name in row.per_image for row in found.rows) > 1
    ]
    if not names or not found.preparation:
        return
    differences = []
    if len(found.rows) == 2:
        for name in names:
            paired = paired_rows(found.rows[0], found.rows[1], name)
            if paired is not None and len(found.parts(name)) == 1:
                unit = found.columns[name].unit
                difference, low, high = (number(one, unit) for one in (paired.difference, paired.low, paired.high))
                differences.append(f"{titled(name)} {difference} [{low}, {high}]{unit and f' {unit}'}")
    said = [BOLD] if any(map(found.best, names)) else []
    if differences:
        said.append(f"{found.rows[0].model} minus {found.rows[1].model}: {'; '.join(differences)}")
    if said:
        found.notes.append("; ".join(said))


def _note_what_differs(found: Sequence[Comparison]) -> None:
    """Note why a table stands apart from an earlier one of its evaluator and set."""
    names = {"count": "count", "digest": "images", "prepared": "preparation", "settings": "settings"}
    for place, this in enumerate(found):
        for earlier in (one.first for one in found[:place]):
            if (this.first.evaluator, this.first.data) == (earlier.evaluator, earlier.data):
                differing = [name for at, name in names.items() if getattr(this.first, at) != getattr(earlier, at)]
                this.notes.append(f"not comparable with an earlier table of this set: {', '.join(differing)} differ")
                break
