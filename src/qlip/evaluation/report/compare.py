"""Compare results: only metrics of the same evaluator, dataset and settings share a table.

The same means equal evaluator, settings, set, images (by digest), count and preparation. What differs in one of
them goes into a table of its own and says so; different preparations are refused unless they are asked for. What
models were trained on may differ: notes say it, and a metric over the classes that training named, or did not, is
held only against those over the same classes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import MetricValue
from qlip.evaluation.report.result import EvalResult, Result

TITLES = {
    "psnr": "PSNR",
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
    "precision_vgg16": "precision (VGG16)",
    "precision_resnet50": "precision (ResNet50)",
    "recall_vgg16": "recall (VGG16)",
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
    """

    model: str
    metrics: dict[str, MetricValue]
    preparation: str
    marks: list[int] = field(default_factory=list)


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
        """Subjects whose metric, as it is written, is the best; none where there is no better side, or one row.

        Nor is there a best of metrics that are over different classes.
        """
        better = next(one.better for one in self.columns if one.name == column)
        known = {row.model: row.metrics[column] for row in self.rows if column in row.metrics}
        if not better or len(known) < 2 or not self.preparation or len(self.parts(column)) > 1:
            return set()
        choose = max if better == "higher" else min
        best = written(choose(known.values(), key=lambda one: one.value))
        return {model for model, one in known.items() if written(one) == best}

    def parts(self, column: str) -> list[str]:
        """The distinct parts (`MetricValue.part`) of a column; values may be compared if there is one."""
        return list(dict.fromkeys(row.metrics[column].part for row in self.rows if column in row.metrics))


def compare(results: Sequence[Result], *, mixed: bool = False) -> list[Table]:
    """Tables of all metrics, each of what may be compared.

    Args:
        results: of one model each; two of one model fill the same row.
        mixed: put subjects of different preparation into one table; each then says its own, and none is best.

    Raises:
        QLIPError: fewer than one result; subjects whose images were prepared differently, without ``mixed``; or one
            metric of one model with two values.
    """
    if not results:
        raise QLIPError("nothing to compare; give result files that qlip eval --output wrote")
    names = names_of(results)
    groups: dict[str, list[tuple[str, EvalResult]]] = {}
    for name, result in zip(names, results, strict=True):
        for one in result.measured:
            groups.setdefault(_key(one, mixed), []).append((name, one))
    if not mixed:
        _refuse_mixed(names, results)
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


def _table(group: Sequence[tuple[str, EvalResult]]) -> Table:
    first = group[0][1]
    preparations = list(dict.fromkeys(one.prepared for _, one in group))
    table = Table(first.evaluator, first.data, first.count, first.title, preparations[0], [], [])
    if len(preparations) > 1:
        table.preparation = ""
        table.notes.append("images were prepared differently: metrics are no comparison, and none is marked as best")
    rows: dict[tuple[str, str], Row] = {}  # a model at two sizes has two, where that is asked for
    columns: dict[str, Column] = {}
    for name, one in group:
        row = rows.setdefault((name, one.prepared), Row(name, {}, one.prepared))
        for value, metric in one.values.items():
            if value in row.metrics and row.metrics[value].value != metric.value:
                raise QLIPError(
                    f"{one.full_name(value)} of {name} is {row.metrics[value].value:.6g} in one result and"
                    f" {metric.value:.6g} in another; give one of them"
                )
            row.metrics[value] = metric
            columns.setdefault(value, Column(value, metric.unit, metric.better))
        _mark(table, row, one)
    table.columns, table.rows = list(columns.values()), list(rows.values())
    _say_other_classes(table)
    return table


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


def _say_what_differs(tables: Sequence[Table], groups: Sequence[Sequence[tuple[str, EvalResult]]]) -> None:
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
