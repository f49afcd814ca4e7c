"""Probes of frozen features: a linear classifier, nearest neighbours, and logistic regression on few examples.

Shapes: N images of training, M of testing, D features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qlip.errors import QLIPError, require
from qlip.evaluation.evaluators.base import (
    BROKEN,
    Columns,
    DatasetPass,
    Evaluator,
    MetricResult,
    MetricValue,
    PassResult,
    Rows,
    RunOnce,
    mean,
)
from qlip.evaluation.metrics.ranking import accuracies, ranks_of
from qlip.evaluation.models.base import FEATURES, EvalModel
from qlip.evaluation.models.batch import ModelBatch
from qlip.runtime.finite import require_finite

CLS, MEAN, BOTH = "cls", "mean", "both"
BLOCK = 1024
"""Test images compared with as many training images at once by the neighbours' probe, times 16."""


class Features(Evaluator):
    """Features of every image, stored as float16 (relative error below 0.0005), once for all probes.

    They lie in the pass's chunks, so a killed pass continues. The model defines them
    (`EvalModel.features`); ``both`` is put together from ``cls`` and ``mean`` when it is needed.
    """

    name: ClassVar[str] = "features"
    needs: ClassVar[frozenset[str]] = frozenset({FEATURES})

    def settings(self) -> Mapping[str, object]:
        """Data type of the stored features."""
        return {"stored": "float16"}

    def rows(self, batch: ModelBatch) -> Columns:
        """Features by name, (B, D) float16.

        Raises:
            QLIPError: a feature is no number, or too large for float16, naming the image.
        """
        found = batch.shared("features", lambda: batch.model.features(batch.pixel_values))
        stored = {}
        for name, features in found.items():
            if name == BOTH and {CLS, MEAN} <= found.keys():
                continue
            stored[name] = features.to("cpu", torch.float16)
            require_finite(stored[name], f"features {name}, in float16,", BROKEN, batch.keys)
        return stored

    def summarize(self, model: EvalModel, rows: Rows) -> MetricResult:
        """``arrays`` holds all features, ``tables`` the labels: what :meth:`FeatureSet.of` reads."""
        arrays = {name: rows.column(name) for name in rows.names}
        values = {
            f"dimensions_{name}": MetricValue(float(one.shape[1]), count=len(rows)) for name, one in arrays.items()
        }
        classes = sorted({label for label in rows.labels if label is not None})
        number = {label: at for at, label in enumerate(classes)}
        arrays["labels"] = torch.tensor([-1 if label is None else number[label] for label in rows.labels])
        return MetricResult(values, {}, {"classes": [{"label": label} for label in classes]}, arrays)


@dataclass(frozen=True)
class FeatureSet:
    """Features of a split and what its images show; images without a label are left out.

    Attributes:
        features: by name, (N, D) float16.
        labels: N class names.
    """

    features: dict[str, Tensor]
    labels: list[str]

    @classmethod
    def of(cls, metric_result: MetricResult) -> FeatureSet:
        """Make it from the `MetricResult` of `Features`.

        Raises:
            QLIPError: no image has a label.
        """
        arrays = dict(metric_result.arrays)
        numbers = arrays.pop("labels")
        used = numbers >= 0
        if not used.any():
            raise QLIPError("features: no image of the set has a label; a probe needs a labelled set")
        names = [str(record["label"]) for record in metric_result.tables["classes"]]
        if {CLS, MEAN} <= arrays.keys():
            arrays[BOTH] = torch.cat([arrays[CLS], arrays[MEAN]], 1)
        return cls({name: one[used] for name, one in arrays.items()}, [names[at] for at in numbers[used].tolist()])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Split:
    """One feature of training and of testing, with classes as numbers.

    Attributes:
        train, test: (N, D) and (M, D) float32.
        train_labels, test_labels: (N,) and (M,) int64 in [0, C).
        num_classes: C.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        for which, features in (("training", self.train), ("test", self.test)):
            require_finite(features, f"features of the {which} images", "compute them again")

    @classmethod
    def of(cls, train: FeatureSet, test: FeatureSet, feature: str) -> Split:
        """Join two splits.

        Raises:
            QLIPError: no such feature, other dimensions, fewer than two classes, a test class that training has not,
                or a feature that is no number.
        """
        for one in (train, test):
            if feature not in one.features:
                raise QLIPError(f"features: there is no {feature!r}; there are {', '.join(sorted(one.features))}")
        first, second = train.features[feature], test.features[feature]
        if first.shape[1] != second.shape[1]:
            raise QLIPError(
                f"features: {feature} has {first.shape[1]} dimensions in training and {second.shape[1]} in testing;"
                " they are of two models or preparations"
            )
        classes = sorted(set(train.labels))
        if len(classes) < 2:
            raise QLIPError(f"features: the training images are all {classes[0]!r}; a probe needs two classes or more")
        if unknown := sorted(set(test.labels) - set(classes)):
            raise QLIPError(f"features: no training image shows {unknown[0]!r}, which testing asks for")
        number = {label: at for at, label in enumerate(classes)}
        targets = [torch.tensor([number[label] for label in one.labels]) for one in (train, test)]
        return cls(first.float(), targets[0], second.float(), targets[1], len(classes))


class Probe(RunOnce):
    """Probes trained on the features of one dataset and tested on those of another.

    Args:
        train: dataset and split, or a path, of labelled images to train on.
        train_limit: number of training images, drawn at random; None takes all.
    """

    name: ClassVar[str] = "probe"
    package: ClassVar[tuple[str, str]] = ("sklearn.linear_model", "eval")

    def __init__(self, train: str = "", train_limit: int | None = None) -> None:
        if not train:
            raise QLIPError("probe: needs a dataset to train on; set train, and if wanted train_limit")
        self.train, self.train_limit = train, train_limit

    def check(self, model: EvalModel) -> None:
        """Refuse a model without features, and a machine without scikit-learn. Raises QLIPError."""
        require("sklearn.linear_model", extra="eval")
        Features().check(model)

    def passes(self, data: str, limit: int | None) -> tuple[DatasetPass, ...]:
        """Return the pass over the training set and that over the test set."""
        return (DatasetPass(self.train, self.train_limit, (Features(),)), DatasetPass(data, limit, (Features(),)))

    def run(self, model: EvalModel, results: Sequence[PassResult]) -> tuple[dict[str, object], PassResult]:
        """Train and test all probes on all features."""
        del model
        known, asked = results
        trained, tested = (FeatureSet.of(one.metric_results[Features.name]) for one in results)
        settings: dict[str, object] = {
            "train": self.train,
            "train_count": known.count,
            "train_digest": known.digest,
        }
        return settings, replace(asked, metric_results={self.name: run_probes(trained, tested)})


def linear_probe(
    split: Split, *, lr: float = 0.2, epochs: int = 10, batch_size: int = 1024, seed: int = 0
) -> dict[str, MetricValue]:
    """A linear classifier by gradient descent, as the paper trains it (arXiv 2502.05178, table 4).

    AdamW without weight decay, cosine schedule to 0 a step at a time, learning rate 0.2, 10 epochs, batches of 1,024,
    cross entropy. Not said there and chosen here: features are standardised by the training set's mean and deviation
    and divided by sqrt(D), so that the rate means the same for any width; weights start at 0.

    Args:
        split: features with labels.
        lr, epochs, batch_size: of the descent.
        seed: of the order.

    Returns:
        ``top1`` and ``top5`` over test images, in percent.
    """
    centre = split.train.mean(0)
    scale = split.train.std(0).clamp(min=1e-6) * math.sqrt(split.train.shape[1])
    train, test = (split.train - centre) / scale, (split.test - centre) / scale
    head = torch.nn.Linear(train.shape[1], split.num_classes)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.0)
    per_epoch = -(-len(train) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    draw = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(epochs):
            for chosen in torch.randperm(len(train), generator=draw).split(batch_size):
                loss = F.cross_entropy(head(train[chosen]), split.train_labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    with torch.no_grad():
        return accuracies(ranks_of(head(test), split.test_labels))


@torch.no_grad()
def knn_probe(split: Split, *, k: int = 20, temperature: float = 0.07) -> dict[str, MetricValue]:
    """Weighted nearest neighbours by cosine, as DINO (arXiv 2104.14294, appendix F.1; after arXiv 1805.01978).

    Each of the k nearest training images votes for its class with weight exp(cosine / temperature). Blockwise, so
    memory does not grow with the training set.

    Args:
        split: features with labels.
        k: neighbours; all training images where there are fewer.
        temperature: of the weights.
    """
    train, test = F.normalize(split.train, dim=1), F.normalize(split.test, dim=1)
    k = min(k, len(train))
    votes = []
    for some in test.split(BLOCK):
        best = torch.full((len(some), 0), -torch.inf)
        labels = torch.empty(len(some), 0, dtype=torch.int64)
        for start in range(0, len(train), 16 * BLOCK):
            cosines = some @ train[start : start + 16 * BLOCK].t()
            here = split.train_labels[start : start + 16 * BLOCK].expand(len(some), -1)
            best, at = torch.cat([best, cosines], 1).topk(min(k, best.shape[1] + cosines.shape[1]), dim=1)
            labels = torch.cat([labels, here], 1).gather(1, at)
        sums = torch.zeros(len(some), split.num_classes)
        votes.append(sums.scatter_add_(1, labels, (best / temperature).exp()))
    return accuracies(ranks_of(torch.cat(votes), split.test_labels))


def few_shot(
    split: Split, *, shots: Sequence[int] = (1, 2, 4, 8, 16), seeds: int = 5, strength: float = 1.0
) -> dict[str, MetricValue]:
    """Logistic regression on few images per class, as CLIP does with its few-shot probes (arXiv 2103.00020, figure 6).

    scikit-learn's, L2 penalty, on features of unit length; images are drawn for each seed. Accuracies are
    means over seeds; intervals redraw test images, and ``few_shot_*_spread`` is the deviation between seeds.

    Args:
        split: features with labels.
        shots: images per class; numbers that a class does not have are left out.
        seeds: draws.
        strength: scikit-learn's C, the inverse of the penalty's weight, at its default; the same for all.
    """
    linear = require("sklearn.linear_model", extra="eval")
    train, test = F.normalize(split.train, dim=1).numpy(), F.normalize(split.test, dim=1).numpy()
    targets, wanted = split.train_labels.numpy(), split.test_labels.numpy()
    most = int(np.bincount(targets, minlength=split.num_classes).min())
    values: dict[str, MetricValue] = {}
    for count in (count for count in shots if count <= most):
        hits = np.empty((seeds, len(test)))
        for seed in range(seeds):
            chosen = _drawn(targets, split.num_classes, count, seed)
            model = linear.LogisticRegression(C=strength, max_iter=1000)
            model.fit(train[chosen], targets[chosen])
            hits[seed] = model.predict(test) == wanted
        each = torch.from_numpy(hits.mean(0))
        values[f"{count}_shot"] = mean(each, unit="%", better="higher", scale=100)
        spread = 100 * float(hits.mean(1).std(ddof=1)) if seeds > 1 else 0.0
        values[f"{count}_shot_spread"] = MetricValue(spread, count=len(test), unit="%")
    return values


def run_probes(
    train: FeatureSet, test: FeatureSet, features: Sequence[str] | None = None, **options: Any
) -> MetricResult:
    """All probes on all features.

    Args:
        train, test: of one model, see :meth:`FeatureSet.of`.
        features: names; all that both have by default.
        **options: of ``linear``, ``knn`` and ``few_shot``, by probe; ``None`` in place of a mapping leaves one out.

    Returns:
        ``linear_cls_top1`` and so on: probe, feature, figure.

    Raises:
        QLIPError: as :meth:`Split.of`; no probe of that name.
    """
    if unknown := sorted(set(options) - set(PROBES)):
        raise QLIPError(f"no probe is called {unknown[0]}; there are {', '.join(PROBES)}")
    names = [name for name in train.features if name in test.features] if features is None else list(features)
    values: dict[str, MetricValue] = {}
    for feature in names:
        split = Split.of(train, test, feature)
        for name, probe in PROBES.items():
            chosen: Mapping[str, Any] | None = options.get(name, {})
            if chosen is not None:
                values |= {f"{name}_{feature}_{key}": value for key, value in probe(split, **chosen).items()}
    values["chance"] = MetricValue(100 / len(set(train.labels)), count=len(test), unit="%")
    notes = {"training": f"{len(train):,} images of {len(set(train.labels)):,} classes"}
    return MetricResult(values, notes)


PROBES: dict[str, Callable[..., dict[str, MetricValue]]] = {
    "linear": linear_probe,
    "knn": knn_probe,
    "few_shot": few_shot,
}


def _drawn(targets: np.ndarray, num_classes: int, count: int, seed: int) -> np.ndarray:
    """Positions of so many training images of each class, without replacement."""
    draw = np.random.default_rng(seed)
    return np.concatenate(
        [draw.choice(np.flatnonzero(targets == number), count, replace=False) for number in range(num_classes)]
    )
