"""Zero-shot classification by prompts, as CLIP does it (arXiv 2103.00020, section 3.1).

Metrics over all classes are called ``prompt_*``. The checkpoint's record of its training captions
(`EvalModel.training_text`) divides the classes: ``trained_*`` are over those whose names occur in it, ``zero_shot_*``
over those that are known not to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from qlip.data.sources.captions import load_templates
from qlip.data.sources.classes import ClassTable, load_classes
from qlip.data.sources.training_text import RECORD, TrainingText
from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import PER_IMAGE, Columns, Evaluator, MetricResult, MetricValue, Rows
from qlip.evaluation.evaluators.text_embeddings import classifier
from qlip.evaluation.metrics.ranking import accuracies, ranks_of
from qlip.evaluation.models.base import ENCODE_IMAGE, ENCODE_TEXT, EvalModel
from qlip.evaluation.models.batch import ModelBatch
from qlip.evaluation.report.confusion import draw

SETTINGS: dict[str, dict[str, object]] = {
    "cifar10": {"templates": "cifar"},
    "emoji": {"templates": "emoji", "without": ["skin tone"]},
    "clipart": {"templates": "sketch"},
    "fashion-mnist": {"templates": "clothing"},
    "quickdraw": {"templates": "sketch"},
}
"""Prompts per public dataset. Skin tones make five near-copies of a concept; only the yellow one counts."""


class ZeroShot(Evaluator):
    """Top-1 and top-5 accuracy over a set's labels.

    Args:
        classes: a table of the package (``imagenet``) or a text file, see `qlip.data.sources.classes.load_classes`;
        None takes
            the set's own labels.
        templates: a list of the package, a text file, or templates with one ``{}`` each.
        without: labels that contain one of these take no part, and neither do their images.
    """

    name: ClassVar[str] = "zero_shot"
    needs: ClassVar[frozenset[str]] = frozenset({ENCODE_IMAGE, ENCODE_TEXT})

    def __init__(
        self,
        classes: str | None = None,
        templates: str | Sequence[str] = "imagenet",
        without: Sequence[str] = (),
    ) -> None:
        self.classes, self.without = classes, tuple(without)
        self.table = None if classes is None else load_classes(classes)
        self.templates = load_templates(templates) if isinstance(templates, str) else tuple(templates)
        if wrong := next((one for one in self.templates if one.count("{}") != 1), None):
            raise QLIPError(f"template {wrong!r}: should hold one '{{}}', where the name goes")

    def settings(self) -> Mapping[str, object]:
        """Classes, prompts, and what was left out."""
        return {
            "classes": None if self.table is None else self.table.described(),
            "templates": list(self.templates),
            "without": list(self.without),
        }

    def rows(self, batch: ModelBatch) -> Columns:
        """``embedding`` (B, E) float32."""
        return {"embedding": batch.embeddings.float()}

    def summarize(self, model: EvalModel, rows: Rows) -> MetricResult:
        """Accuracies with intervals, accuracy per class, and the confusion matrix.

        Raises:
            QLIPError: labels that the class table has not, or fewer than two classes.
        """
        taking_part = [self._counts(label) for label in rows.labels]
        labels = [label for label, used in zip(rows.labels, taking_part, strict=True) if used and label is not None]
        table = ClassTable.from_labels(labels) if self.table is None else self.table
        if len(table) < 2 or not labels:
            found = "no labels" if not labels else f"one label, {labels[0]!r}"
            remedy = "classification needs two or more; DIR# takes the folders in DIR as classes"
            raise QLIPError(f"{self.name}: the set's images carry {found}; {remedy}")
        table.check_holds(labels)
        index = table.index_of()
        targets = torch.tensor([index[label] for label in labels])
        vectors = classifier(model, table.names, self.templates)
        known = [model.training_text.knows(name) for name in table.names]
        named = _Classification(rows, torch.tensor(taking_part), targets, vectors)
        notes = {"protocol": protocol_of(known, model.training_text)}
        return self._found(table, known, notes, named, len(rows) - len(labels))

    def _counts(self, label: str | None) -> bool:
        return label is not None and not any(part in label for part in self.without)

    def _found(
        self,
        table: ClassTable,
        known: list[bool | None],
        notes: dict[str, str],
        named: _Classification,
        left_out: int,
    ) -> MetricResult:
        everything = named.among(torch.ones(len(table), dtype=torch.bool))
        values = {f"prompt_{name}": value for name, value in everything.values().items()}
        arrays = everything.per_image("prompt")
        used = [key for key, part in zip(named.rows.keys, named.taking_part.tolist(), strict=True) if part]
        keys = dict.fromkeys(arrays, used)
        for prefix, status in (("trained", True), ("zero_shot", False)):
            chosen = torch.tensor([one is status for one in known])
            if int(chosen.sum()) > 1 and bool(chosen[named.targets].any()):
                outcome = everything if chosen.all() else named.among(chosen)
                part = _part(table, chosen)
                arrays |= (own := outcome.per_image(prefix))
                inside = chosen[named.targets].tolist()
                keys |= dict.fromkeys(own, [key for key, part in zip(used, inside, strict=True) if part])
                values |= {f"{prefix}_{name}": replace(one, part=part) for name, one in outcome.values().items()}
        if left_out:
            notes["left out"] = f"{left_out:,} images without a label, or of one that takes no part"
        if shared := table.shared_names():
            notes["classes"] = f"no prompt tells apart classes of one name: {', '.join(sorted(shared))}"
        elif missing := len(table) - len(set(named.targets.tolist())):
            notes["classes"] = f"{missing:,} of {len(table):,} classes are only names to confuse: no image shows them"
        confusion = everything.confusion(len(table))
        records = _by_class(table, known, everything, confusion)
        return MetricResult(values, notes, {"classes": records}, {"confusion": confusion} | arrays, keys)


@dataclass(frozen=True)
class _Outcome:
    """Classification of some images among some classes: (n,) each."""

    targets: Tensor
    predicted: Tensor
    ranks: Tensor
    num_classes: int

    @property
    def counts(self) -> list[int]:
        """K of top-K accuracies; among five classes or fewer every answer is among the first five."""
        return [k for k in (1, 5) if k < self.num_classes]

    def per_image(self, prefix: str) -> dict[str, Tensor]:
        """Arrays (n,) float32 of the accuracies, 100 for a hit."""
        return {f"{PER_IMAGE}{prefix}_top{k}": 100 * (self.ranks < k).float() for k in self.counts}

    def values(self) -> dict[str, MetricValue]:
        return accuracies(self.ranks, self.counts) | {
            "chance": MetricValue(100 / self.num_classes, count=len(self.ranks), unit="%"),
            "classes": MetricValue(float(self.num_classes), count=len(self.ranks)),
        }

    def confusion(self, num_classes: int) -> Tensor:
        """(C, C) int64: images of the row's class that were given the column's name."""
        counts = torch.bincount(self.targets * num_classes + self.predicted, minlength=num_classes**2)
        return counts.view(num_classes, num_classes)


@dataclass(frozen=True)
class _Classification:
    """Embeddings of a set, which of its rows take part, their class, and the classes' vectors."""

    rows: Rows
    taking_part: Tensor
    targets: Tensor
    vectors: Tensor

    def among(self, chosen: Tensor) -> _Outcome:
        """Name the images of some classes, (C,) bool, among these classes alone."""
        targets, predicted, ranks = [], [], []
        row = done = 0
        number = chosen.cumsum(0) - 1  # of a chosen class among them
        for embeddings in self.rows.finite("embedding"):
            used = self.taking_part[row : row + len(embeddings)]
            row += len(embeddings)
            wanted = self.targets[done : done + int(used.sum())]
            done += len(wanted)
            scores = embeddings[used].float() @ self.vectors.t()
            scores, wanted = scores[chosen[wanted]][:, chosen], wanted[chosen[wanted]]
            ranks.append(ranks_of(scores, number[wanted]))
            predicted.append(chosen.nonzero()[scores.argmax(1), 0] if len(scores) else wanted)
            targets.append(wanted)
        return _Outcome(torch.cat(targets), torch.cat(predicted), torch.cat(ranks), int(chosen.sum()))


def protocol_of(known: Sequence[bool | None], text: TrainingText) -> str:
    """The note that says how far the accuracy is zero-shot."""
    total, seen, unseen = len(known), sum(one is True for one in known), sum(one is False for one in known)
    if not seen and not unseen:
        why = "is not complete" if text.sources else "is missing"
        return f"prompt accuracy; unknown whether training saw these classes: the checkpoint's {RECORD} {why}"
    where = f"the training captions ({', '.join(text.sources) or 'none'})"
    if unseen == total:
        return f"zero-shot accuracy: none of the {total:,} class names occurs in {where}"
    if seen == total:
        return f"prompt accuracy on trained classes: all {total:,} names occur in {where}"
    unknown = total - seen - unseen
    rest = [f"{unseen:,} do not (zero-shot)"] if unseen else []
    rest += [f"of {unknown:,} it is unknown"] if unknown else []
    return f"prompt accuracy: {seen:,} of {total:,} class names occur in {where}, {', '.join(rest)}"


def settings_for(data: str) -> dict[str, object]:
    """Prompts that fit a public set, ``ZeroShot``'s settings; for any other set its defaults."""
    return dict(SETTINGS.get(data.partition(":")[0], {}))


def _part(table: ClassTable, chosen: Tensor) -> str:
    """Label of the classes (C,) bool that a metric is over, equal for equal classes; "" for all."""
    if chosen.all():
        return ""
    labels = [label for label, one in zip(table.labels, chosen.tolist(), strict=True) if one]
    digest = hashlib.sha256("\n".join(sorted(labels)).encode()).hexdigest()[:8]
    return f"{len(labels):,} of {len(table):,} classes ({digest})"


def _by_class(
    table: ClassTable, known: Sequence[bool | None], outcome: _Outcome, confusion: Tensor
) -> list[dict[str, object]]:
    """A record a class that images show: how many, accuracies in percent, and what it is most often taken for."""
    records: list[dict[str, object]] = []
    wrong = confusion.clone().fill_diagonal_(0)
    counts = confusion.sum(1)
    top1, top5 = (_hits(outcome, k, len(table)) for k in (1, 5))
    for number, (label, name) in enumerate(zip(table.labels, table.names, strict=True)):
        if not counts[number]:
            continue
        most = int(wrong[number].argmax())
        records.append(
            {
                "class": name,
                "label": label,
                "pictures": int(counts[number]),
                "top1": 100 * float(top1[number] / counts[number]),
                "top5": 100 * float(top5[number] / counts[number]),
                "taken for": table.names[most] if wrong[number, most] else None,
                "times": int(wrong[number, most]),
                "trained": known[number],
            }
        )
    return records


def _hits(outcome: _Outcome, k: int, num_classes: int) -> Tensor:
    """(C,) float64: images of each class whose name is among the first k."""
    return torch.bincount(outcome.targets, weights=(outcome.ranks < k).double(), minlength=num_classes)


def draw_confusion(metric_result: MetricResult, path: Path) -> None:
    """Draw a confusion matrix as a PNG: classes that occur in the set, and one column for all other names."""
    names = [str(record["class"]) for record in metric_result.tables["classes"]]
    matrix = metric_result.arrays["confusion"]
    shown = matrix.sum(1) > 0
    square, others = matrix[shown][:, shown], matrix[shown][:, ~shown].sum(1, keepdim=True)
    draw(torch.cat([square, others], 1) if others.any() else square, names, path)
