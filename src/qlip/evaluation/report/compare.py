"""Compare results: only metrics of the same evaluator, dataset and settings share a table.

The same means equal evaluator, settings, set, images (by digest), count and preparation. What differs in one of
them goes into a table of its own and says so; different preparations are refused unless they are asked for. What
models were trained on may differ: notes say it, and a metric over the classes that training named, or did not, is
held only against those over the same classes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
from torch import Tensor

from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import PER_IMAGE, MetricValue
from qlip.evaluation.metrics.intervals import Paired, paired_difference
from qlip.evaluation.report.bundle import Bundle
from qlip.evaluation.report.result import EvalResult, Result

Arrays = Mapping[str, Tensor]
TITLES = {
    "psnr": "PSNR",
    "psnr_exact": "exact",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "l1": "L1",
    "lpips_vgg": "LPIPS (VGG)",
    "lpips_alex": "LPIPS (Alex)",
    "rfid": "rFID",
    "kid": "KID",
    "fd_vgg16": "FD-VGG16",
    "fd_resnet50": "FD-ResNet50",
    "kd_vgg16": "KD-VGG16",
    "kd_resnet50": "KD-ResNet50",
    "precision_vgg16_relu5": "precision (VGG16 relu5)",
    "precision_resnet50": "precision (ResNet50)",
    "recall_vgg16_relu5": "recall (VGG16 relu5)",
    "recall_resnet50": "recall (ResNet50)",
    "bits_per_pixel": "bits/pixel",
    "compression_ratio": "ratio",
    "zero_shot_top1": "zero-shot top-1",
    "zero_shot_top5": "zero-shot top-5",
    "prompt_top1": "prompt top-1",
    "prompt_top5": "prompt top-5",
    "trained_top1": "trained top-1",
    "trained_top5": "trained top-5",
    "shrink_psnr": "PSNR if shrunk",
    "shrink_ssim": "SSIM if shrunk",
    "clean_psnr": "PSNR, clean",
}
"""Titles of metrics in tables; other metrics go by their own names, with spaces for underscores."""


def titled(name: str) -> str:
    """Title of a metric."""
    if name in TITLES:
        return TITLES[name]
    name = re.sub(r"_top(\d+)", r" top-\1", re.sub(r"_r(\d+)", r" R@\1", name)).replace("_", " ")
    return re.sub(r"\b(psnr|jpeg)\b", lambda one: one[0].upper(), name)


@dataclass(frozen=True)
class Column:
    """A metric that several subjects have.

    Attributes:
        name: of the metric.
        unit, better: as in `MetricValue`.
    """

    name: str
    unit: str
    better: str

    @property
    def title(self) -> str:
        """In words, with an arrow to the better side."""
        arrow = {"higher": " \u2191", "lower": " \u2193"}.get(self.better, "")
        unit = f", {self.unit}" if self.unit else ""
        return f"{titled(self.name)}{unit}{arrow}"


@dataclass
class Row:
    """A model.

    Attributes:
        model: its name in tables.
        metrics: by column's name.
        preparation: of its images.
        marks: numbers of the table's notes that are about it.
        per_image: values (N,) of each image by column's name, where the result's folder has them.
    """

    model: str
    metrics: dict[str, MetricValue]
    preparation: str
    marks: list[int] = field(default_factory=list)
    per_image: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Table:
    """Metrics that may be compared with each other.

    Attributes:
        evaluator, data, count: of all of them.
        title: e.g. ``small photographs``.
        preparation: of all of them, or "" where rows differ.
        columns: metrics, in the order in which evaluators give them.
        rows: subjects, in the order in which they were given.
        notes: what to keep in mind.
    """

    evaluator: str
    data: str
    count: int
    title: str
    preparation: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    @property
    def caption(self) -> str:
        """Evaluator, dataset, count and preparation, e.g. ``codebook on cifar10:test (n=500; 64x64, bicubic)``."""
        prepared = f"; {self.preparation}" if self.preparation else "; preparations differ"
        return f"{self.evaluator.replace('_', ' ')} on {self.data} (n={self.count:,}{prepared})"

    def best(self, column: str) -> set[str]:
        """Models that are marked as best; none where there is no better side, one row, or an infinite value.

        These are the best value as it is written and those that a paired comparison over the same images does not
        tell from it with 95% confidence. Nor is there a best of metrics that are over different classes.
        """
        better = next(one.better for one in self.columns if one.name == column)
        rows = {row.model: row for row in self.rows if column in row.metrics}
        known = {model: row.metrics[column] for model, row in rows.items()}
        if not better or len(known) < 2 or not self.preparation or len(self.parts(column)) > 1:
            return set()
        if not all(math.isfinite(one.value) for one in known.values()):
            return set()
        choose = max if better == "higher" else min
        first = choose(known, key=lambda model: known[model].value)
        found = {model for model, one in known.items() if written(one) == written(known[first])}
        for model, row in rows.items():
            paired = None if model == first else paired_rows(rows[first], row, column)
            if paired is not None:
                (found.discard if paired.low > 0 or paired.high < 0 else found.add)(model)
        return found

    def parts(self, column: str) -> list[str]:
        """The distinct parts (`MetricValue.part`) of a column; values may be compared if there is one."""
        return list(dict.fromkeys(row.metrics[column].part for row in self.rows if column in row.metrics))


def paired_rows(first: Row, second: Row, column: str) -> Paired | None:
    """Compare two models of a table image by image; None if a result's folder has no values of each image."""
    both = [row.per_image.get(column) for row in (first, second)]
    if both[0] is None or both[1] is None or both[0].shape != both[1].shape:
        return None
    return paired_difference(both[0], both[1])


def compare(results: Sequence[Result | Bundle], *, mixed: bool = False) -> list[Table]:
    """Tables of all metrics, each of what may be compared.

    Args:
        results: of one model each; two of one model fill the same row. Folders (`Bundle`) have values of each image,
            over which models are compared in pairs.
        mixed: put subjects of different preparation into one table; each then says its own, and none is best.

    Raises:
        QLIPError: fewer than one result; subjects whose images were prepared differently, without ``mixed``; or one
            metric of one model with two values.
    """
    if not results:
        raise QLIPError("nothing to compare; give result files that qlip eval --output wrote")
    bundles = [one if isinstance(one, Bundle) else Bundle(one, []) for one in results]
    bare = [one.result for one in bundles]
    names = names_of(bare)
    groups: dict[str, list[tuple[str, EvalResult, Arrays]]] = {}
    for name, bundle in zip(names, bundles, strict=True):
        for one, metric_result in zip_longest(bundle.result.measured, bundle.metric_results):
            arrays = {} if metric_result is None else metric_result.arrays
            groups.setdefault(_key(one, mixed), []).append((name, one, arrays))
    if not mixed:
        _refuse_mixed(names, bare)
    tables = [_table(group) for group in groups.values()]
    _say_what_differs(tables, list(groups.values()))
    return tables


def names_of(results: Sequence[Result]) -> list[str]:
    """Name of each result's model in tables: its own; of two of one name, with the fingerprint's first digits.

    Of a path as much of its end as tells them apart; the results have it whole.
    """
    prints: dict[str, set[str]] = {}
    for one in results:
        prints.setdefault(one.subject.get("name", "?"), set()).add(one.subject.get("fingerprint", ""))
    # as many digits as it takes: those of models with one encoder begin alike
    digits = {
        name: next((n for n in range(8, 65) if len({one[:n] for one in found}) == len(found)), 64)
        for name, found in prints.items()
    }
    short = _without_folders(list(prints))
    found = [(one.subject.get("name", "?"), one.subject.get("fingerprint", "")) for one in results]
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
    settings = json.dumps(one.settings, sort_keys=True)
    prepared = "" if mixed else one.prepared
    return json.dumps([one.evaluator, one.data, one.count, one.digest, prepared, settings])


def _refuse_mixed(names: Sequence[str], results: Sequence[Result]) -> None:
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for name, result in zip(names, results, strict=True):
        for one in result.measured:
            place = one.evaluator, one.data
            other, prepared = seen.setdefault(place, (name, one.prepared))
            if prepared != one.prepared:
                raise QLIPError(
                    f"{one.evaluator} on {one.data}: {other} was measured at {prepared}, {name} at {one.prepared};"
                    " measure both at one size, or give --mixed to see them side by side all the same"
                )


def _table(group: Sequence[tuple[str, EvalResult, Arrays]]) -> Table:
    first = group[0][1]
    preparations = list(dict.fromkeys(one.prepared for _, one, _ in group))
    table = Table(first.evaluator, first.data, first.count, first.title, preparations[0], [], [])
    if len(preparations) > 1:
        table.preparation = ""
        table.notes.append("images were prepared differently: metrics are no comparison, and none is marked as best")
    rows: dict[tuple[str, str], Row] = {}  # a model at two sizes has two, where that is asked for
    columns: dict[str, Column] = {}
    for name, one, arrays in group:
        row = rows.setdefault((name, one.prepared), Row(name, {}, one.prepared))
        for value, metric in one.values.items():
            if value in row.metrics and row.metrics[value].value != metric.value:
                raise QLIPError(
                    f"{one.full_name(value)} of {name} is {row.metrics[value].value:.6g} in one result and"
                    f" {metric.value:.6g} in another; give one of them"
                )
            row.metrics[value] = metric
            columns.setdefault(value, Column(value, metric.unit, metric.better))
            if PER_IMAGE + value in arrays:
                row.per_image[value] = arrays[PER_IMAGE + value].numpy().astype(float)
        _mark(table, row, one)
    table.columns, table.rows = list(columns.values()), list(rows.values())
    _say_other_classes(table)
    say_pairs(table)
    return table


BOLD = "bold: the best, and models that a paired comparison over the same images does not tell from it (95%)"


def say_pairs(table: Table) -> None:
    """Note what bold means where images were compared in pairs, with the differences of two models in its columns."""
    table.notes = [note for note in table.notes if not note.startswith(BOLD)]
    told = [
        column for column in table.columns if column.better and sum(column.name in r.per_image for r in table.rows) > 1
    ]
    if not told or not table.preparation:
        return
    note = BOLD
    if len(table.rows) == 2:
        differences = []
        for column in told:
            if (
                len(table.parts(column.name)) == 1
                and (paired := paired_rows(table.rows[0], table.rows[1], column.name)) is not None
            ):
                bounds = ", ".join(f"{_number(one, column.unit)}" for one in (paired.low, paired.high))
                unit = f" {column.unit}" if column.unit else ""
                differences.append(f"{titled(column.name)} {_number(paired.difference, column.unit)} [{bounds}]{unit}")
        note += f"; {table.rows[0].model} minus {table.rows[1].model}: {'; '.join(differences)}" if differences else ""
    table.notes.append(note)


def _say_other_classes(table: Table) -> None:
    different: dict[str, list[str]] = {}
    for column in table.columns:
        if column.better and len(parts := table.parts(column.name)) > 1:
            different.setdefault("; ".join(part or "all classes" for part in parts), []).append(titled(column.name))
    for classes, titles in different.items():
        table.notes.append(f"{', '.join(titles)}: over different classes ({classes}), so none is marked as best")


def _mark(table: Table, row: Row, one: EvalResult) -> None:
    """Notes on metrics that stand in the table, by number, said once."""
    notes = [f"{name}: {note}" for name, note in one.notes.items()]
    if one.broken:
        notes.append(f"{len(one.broken)} images could not be read and are not counted")
    for note in notes:
        if note not in table.notes:
            table.notes.append(note)
        number = table.notes.index(note) + 1
        if number not in row.marks:
            row.marks = sorted([*row.marks, number])


def _say_what_differs(tables: Sequence[Table], groups: Sequence[Sequence[tuple[str, EvalResult, Arrays]]]) -> None:
    """A table whose evaluator and set another has too says why it stands apart."""
    firsts = [group[0][1] for group in groups]
    for at, one in enumerate(firsts):
        for other in firsts[:at]:
            if (one.evaluator, one.data) == (other.evaluator, other.data):
                differing = [
                    word
                    for word, first, second in (
                        ("count", other.count, one.count),
                        ("images", other.digest, one.digest),
                        ("preparation", other.prepared, one.prepared),
                        ("settings", other.settings, one.settings),
                    )
                    if first != second
                ]
                tables[at].notes.append(
                    f"not comparable with an earlier table of this set: {', '.join(differing)} differ"
                )
                break


def written(metric: MetricValue, intervals: bool = False) -> str:
    """A metric as a table has it: dB and percent with two and one decimals, counts whole, else four digits."""
    text = _number(metric.value, metric.unit)
    if intervals and metric.low is not None and metric.high is not None:
        text += f" [{_number(metric.low, metric.unit)}, {_number(metric.high, metric.unit)}]"
    return text


def _number(value: float, unit: str) -> str:
    if unit == "dB":
        return f"{value:.2f}"
    if unit == "%":
        return f"{value:.1f}"
    if abs(value) < 1e15 and value == int(value):
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
