"""Probes: against scikit-learn, a literal twin, and what features of known worth must give."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from qlip import QLIPError, QLIPModel, QLIPProcessor, assets
from qlip.data.loader.eval_set import EvalBatch
from qlip.data.public import read_manifest
from qlip.evaluation import open_evaluation
from qlip.evaluation.evaluators import probe as probes
from qlip.evaluation.evaluators.probe import Features, FeatureSet, Split, few_shot, knn_probe, linear_probe, run_probes
from qlip.evaluation.evaluators.registry import evaluator
from qlip.evaluation.models.base import QLIPEvalModel
from qlip.evaluation.models.batch import ModelBatch
from qlip.evaluation.run import evaluate_dataset as passes
from qlip.evaluation.run.evaluate import EvalSpec, run_specs
from qlip.evaluation.run.evaluate_dataset import evaluate_dataset

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]


def blobs(count: int, seed: int, noise: float, dimensions: int = 12) -> tuple[Tensor, Tensor]:
    """Points around a centre a class, scaled unevenly; (n, D) and (n,)."""
    centres = torch.randn(6, dimensions, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 6
    points = centres[labels] + noise * torch.randn(count, dimensions, generator=draw)
    return points * torch.logspace(-1, 1, dimensions) + 3, labels


def split(noise: float = 1.5) -> Split:
    train, test = blobs(600, 1, noise), blobs(300, 2, noise)
    return Split(train[0], train[1], test[0], test[1], 6)


def feature_set(points: Tensor, labels: Tensor, **more: Tensor) -> FeatureSet:
    return FeatureSet({"cls": points.half()} | more, [NAMES[number] for number in labels])


def test_probe__the_linear_probe_is_as_good_as_logistic_regression() -> None:
    data = split()
    mean, std = data.train.mean(0), data.train.std(0)
    reference = LogisticRegression(max_iter=500).fit((data.train - mean) / std, data.train_labels)
    expected = 100 * reference.score((data.test - mean) / std, data.test_labels)
    found = linear_probe(data, epochs=30, batch_size=128)
    assert 60 < expected < 99 and found["top1"].value == pytest.approx(expected, abs=2.5)
    assert found == linear_probe(data, epochs=30, batch_size=128)
    assert found["top5"].value > found["top1"].value
    assert linear_probe(split(0.05))["top1"].value == 100, "easy data, at the paper's settings"


def test_probe__neighbours_are_scikit_learns_and_a_literal_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    data = split()
    found = knn_probe(data)
    reference = KNeighborsClassifier(20, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.07))
    expected = 100 * reference.fit(data.train, data.train_labels).score(data.test, data.test_labels)
    assert found["top1"].value == pytest.approx(expected, abs=1e-4)
    monkeypatch.setattr(probes, "BLOCK", 7)  # blocks of 7 and 112
    assert knn_probe(data) == found
    hits = []
    for point, label in zip(data.test.numpy(), data.test_labels.tolist(), strict=True):
        scored = []
        for other, name in zip(data.train.numpy(), data.train_labels.tolist(), strict=True):
            cosine = float(point @ other) / math.sqrt(float(point @ point) * float(other @ other))
            scored.append((cosine, name))
        votes = [0.0] * 6
        for cosine, name in sorted(scored, reverse=True)[:20]:
            votes[name] += math.exp(cosine / 0.07)
        hits.append(votes.index(max(votes)) == label)
    assert found["top1"].value == pytest.approx(100 * np.mean(hits))
    few = Split(data.train[:6], data.train_labels[:6], data.test, data.test_labels, 6)
    assert knn_probe(few)["top1"].count == 300, "fewer images than neighbours"


def test_probe__more_shots_know_more() -> None:
    found = few_shot(split(2.0), shots=(1, 4, 16, 500), seeds=3)
    accuracies = [found[f"{count}_shot"].value for count in (1, 4, 16)]
    assert accuracies == sorted(accuracies) and accuracies[0] > 100 / 6
    assert found["1_shot_spread"].value > 0 and "500_shot" not in found
    assert found == few_shot(split(2.0), shots=(1, 4, 16), seeds=3)
    low, high = found["4_shot"].low, found["4_shot"].high
    assert low is not None and high is not None and low < accuracies[1] < high


def test_probe__all_probes_on_all_features() -> None:
    (train, train_labels), (test, test_labels) = blobs(300, 1, 0.8), blobs(120, 2, 0.8)
    noise = torch.randn(420, 12, generator=torch.Generator().manual_seed(3)).half()
    first = feature_set(train, train_labels, mean=noise[:300])
    second = feature_set(test, test_labels, mean=noise[300:])
    options = {"few_shot": {"shots": [1], "seeds": 2}, "linear": {"batch_size": 100}}
    found = run_probes(first, second, **options).values
    for name in ("linear_{}_top1", "knn_{}_top1", "few_shot_{}_1_shot"):
        assert found[name.format("cls")].value > 40 > found[name.format("mean")].value
    assert found["chance"].value == pytest.approx(100 / 6)
    assert set(run_probes(first, second, ["cls"], linear=None, few_shot=None).values) == {
        "knn_cls_top1",
        "knn_cls_top5",
        "chance",
    }
    with pytest.raises(QLIPError, match="no probe is called nearest; there are linear, knn, few_shot"):
        run_probes(first, second, nearest={})


def test_probe__sets_that_do_not_fit_are_refused_in_a_line() -> None:
    (points, labels), (more, others) = blobs(60, 1, 1), blobs(30, 2, 1)
    train, test = feature_set(points, labels), feature_set(more, others)
    broken = points.clone()
    broken[7, 3] = float("nan")
    for first, second, message in (
        (feature_set(broken, labels), test, "row 7: features of the training images hold NaN; compute them again"),
        (feature_set(points[:, :5], labels), test, "cls has 5 dimensions in training and 12 in testing"),
        (feature_set(points[labels < 5], labels[labels < 5]), test, "no training image shows 'fox'"),
        (feature_set(points[labels < 1], labels[labels < 1]), test, "the training images are all 'ant'"),
    ):
        with pytest.raises(QLIPError, match=message):
            Split.of(first, second, "cls")
    with pytest.raises(QLIPError, match="there is no 'mean'; there are cls"):
        Split.of(train, test, "mean")


@pytest.fixture(scope="module")
def model() -> QLIPEvalModel:
    return QLIPEvalModel(QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled"), assets.BUNDLED)


class Broken(QLIPEvalModel):
    """Gives one number that is none."""

    bad: float = float("nan")

    def features(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Its second image's feature 5."""
        found = super().features(pixel_values)
        found["mean"][1, 5] = self.bad
        return found


def test_probe__features_are_the_models_and_go_on_where_they_were(
    model: QLIPEvalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "CHUNK", 8)
    data = open_evaluation(str(assets.path("images")), model.processor)
    made = evaluator("features")
    found = evaluate_dataset(model, data, [made], folder=tmp_path, batch_size=4)
    assert found is not None
    (chunk, *_) = sorted(tmp_path.glob("rows-*"))
    chunk.unlink()
    again = evaluate_dataset(model, data, [Features()], folder=tmp_path, batch_size=4)
    assert again is not None and again.digest == found.digest
    (metric_result,) = found.metric_results.values()
    features = FeatureSet.of(metric_result)
    assert len(features) == 18 and features.labels[0] == "astronaut"
    for name, one in features.features.items():
        assert torch.equal(one, FeatureSet.of(again.metric_results["features"]).features[name])
    pixels = torch.cat([batch.pixel_values for batch in data.batches(18)])
    with torch.inference_mode():
        vision = model.model.vision_model(pixels)
        expected = {
            "cls": vision.pooler_output,
            "mean": model.model.get_patch_features(pixels).mean(1),
        }
    expected["both"] = torch.cat([expected["cls"], expected["mean"]], 1)
    assert set(features.features) == set(expected)
    for name, one in expected.items():
        torch.testing.assert_close(features.features[name].float(), one, rtol=1e-3, atol=1e-3)
    assert metric_result.values["dimensions_cls"].value == 192


@pytest.mark.parametrize(("bad", "message"), [(float("nan"), "NaN"), (1e6, "infinite values")])
def test_probe__a_feature_that_is_no_number_names_its_image(bad: float, message: str, model: QLIPEvalModel) -> None:
    data = open_evaluation(str(assets.path("images")), model.processor)
    broken = Broken(model.model, model.processor, "broken")
    broken.bad = bad
    with pytest.raises(QLIPError, match=rf"^cat\.jpg: features mean, in float16, hold {message}"):
        evaluate_dataset(broken, data, [Features()], batch_size=4)
    batch = next(iter(data.batches(2)))
    unlabelled = EvalBatch(batch.pixel_values, [(), ()], [None, None], batch.keys)
    rows = Features().rows(ModelBatch(model, unlabelled))
    from .known import rows_of

    with pytest.raises(QLIPError, match="no image of the set has a label"):
        FeatureSet.of(Features().summarize(model, rows_of(rows)))


@pytest.mark.skipif(read_manifest("cifar10") is None, reason="cifar10 is not in the cache")
def test_probe__the_bundled_models_features_know_cifars_classes(model: QLIPEvalModel, tmp_path: Path) -> None:
    item = EvalSpec("photographs", "cifar10:test", "probe", {"train": "cifar10:train", "train_limit": 300}, limit=100)
    outcome = run_specs(model, [item], work=tmp_path)
    assert outcome is not None
    (found,) = outcome.metric_results
    for name in ("linear_both_top1", "knn_cls_top1", "few_shot_cls_4_shot"):
        assert found.values[name].value > 25
    assert sorted(path.name.partition("-")[0] for path in tmp_path.iterdir()) == ["cifar10", "cifar10"]
    assert outcome.result.measured[0].settings["train_count"] == 300
