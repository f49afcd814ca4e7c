"""Sets of images: one pass makes both, against torchmetrics, SciPy and pieces, however the pass was cut."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from qlip import QLIPError, QLIPModel, QLIPProcessor, assets
from qlip.evaluation import open_evaluation
from qlip.evaluation.evaluators import registry
from qlip.evaluation.evaluators.base import Chunk, MetricResult, Rows
from qlip.evaluation.evaluators.set_distance import InceptionSets, ResNetSets, SetDistance, compared
from qlip.evaluation.metrics.kid import kernel_distance
from qlip.evaluation.metrics.pixel import round_to_8_bit
from qlip.evaluation.metrics.precision_recall import precision_recall
from qlip.evaluation.metrics.statistics import Gathered
from qlip.evaluation.models.base import QLIPEvalModel, Reconstructed
from qlip.evaluation.run import evaluate_dataset as passes
from qlip.evaluation.run.evaluate_dataset import evaluate_dataset

from .tiny import Tiny, TinyInception, write_images

COUNT = 22


@pytest.fixture(scope="module")
def model() -> QLIPEvalModel:
    return QLIPEvalModel(QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled"), assets.BUNDLED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_images(folder, COUNT, 64, 0)
    return folder


def run(model: QLIPEvalModel, images: Path, evaluator: SetDistance, **options: Any) -> MetricResult:
    data = open_evaluation(str(images), model.processor)
    found = evaluate_dataset(model, data, [evaluator], batch_size=4, **options)
    assert found is not None
    return found.metric_results[evaluator.name]


@pytest.fixture(scope="module")
def features(model: QLIPEvalModel, folder: Path) -> tuple[Tensor, Tensor]:
    """Of originals and reconstructions, (COUNT, 5) each."""
    (batch,) = open_evaluation(str(folder), model.processor).batches(COUNT)
    with torch.inference_mode():
        originals = round_to_8_bit(model.preprocessing.denormalize(batch.pixel_values))
        rebuilt = round_to_8_bit(model.reconstruct(batch.pixel_values).pixels)
        return Tiny().features(originals), Tiny().features(rebuilt)


def test_set_distance__metrics_are_those_of_the_pieces(
    model: QLIPEvalModel, folder: Path, features: tuple[Tensor, Tensor]
) -> None:
    found = run(model, folder, SetDistance(Tiny()))
    assert set(found.values) == {"fd_tiny", "kd_tiny", "precision_tiny", "recall_tiny"}
    first, second = (one.double().numpy() for one in features)
    covariances = np.cov(first.T), np.cov(second.T)
    expected = float(np.square(first.mean(0) - second.mean(0)).sum())
    expected += float(np.trace(sum(covariances)) - 2 * np.trace(sqrtm(covariances[0] @ covariances[1])).real)
    assert found.values["fd_tiny"].value == pytest.approx(expected, rel=1e-3) and expected > 1e-4
    kernel = kernel_distance(*features)
    assert found.values["kd_tiny"].value == pytest.approx(kernel.mean, rel=1e-3, abs=1e-6)
    assert found.notes["kd_tiny"].startswith("mean of 1 subsets of 22 images")
    coverage = precision_recall(*features)
    for name, hits in (("precision_tiny", coverage.precise), ("recall_tiny", coverage.recalled)):
        value = found.values[name]
        assert value.value == float(hits.double().mean()) and value.count == COUNT
        assert value.low is not None and value.high is not None and value.low <= value.value <= value.high
    assert found.notes["fd_tiny"].startswith("expected bias at this number of images")


def test_set_distance__the_distance_is_torchmetrics(
    model: QLIPEvalModel, folder: Path, features: tuple[Tensor, Tensor]
) -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Given(nn.Module):
        num_features = 5

        def forward(self, x: Tensor) -> Tensor:
            return x

    metric = fid.FrechetInceptionDistance(feature=Given()).set_dtype(torch.float64)
    for one, real in zip(features, (True, False), strict=True):
        metric.update(one, real=real)
    found = run(model, folder, SetDistance(Tiny()))
    assert found.values["fd_tiny"].value == pytest.approx(float(metric.compute()), rel=1e-3)


def test_set_distance__two_processes_and_a_second_run_give_the_same_digits(
    model: QLIPEvalModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "CHUNK", 8)
    alone = run(model, folder, SetDistance(Tiny()))
    data = open_evaluation(str(folder), model.processor)
    options = {"folder": tmp_path, "world": 2, "batch_size": 4}
    assert evaluate_dataset(model, data, [SetDistance(Tiny())], rank=1, **options) is None  # type: ignore[arg-type]
    shared = run(model, folder, SetDistance(Tiny()), folder=tmp_path, rank=0, world=2)
    assert shared == alone
    monkeypatch.setattr(model, "reconstruct", None)  # nothing is rebuilt twice
    assert run(model, folder, SetDistance(Tiny()), folder=tmp_path) == alone
    with pytest.raises(QLIPError, match=r"holds another evaluation \(evaluators differ\)"):
        run(model, folder, SetDistance(Tiny(seed=1)), folder=tmp_path)


def gathered(count: int, seed: int, kept: int = 10_000) -> Gathered:
    found = Gathered(5, kept)
    found.add(torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)))
    return found


def test_set_distance__few_images_are_said_to_be_few() -> None:
    found = compared(Tiny(), gathered(3, 0), gathered(3, 1), name="fd_tiny")
    assert found.notes["fd_tiny"] == "3 images for 5 features: the covariance is singular and the distance biased"
    assert set(found.values) == {"fd_tiny", "kd_tiny"}
    assert found.notes["recall_tiny"] == "left out: 3 images, and 3 neighbours of each are needed"
    assert "1000 images a subset are usual" in found.notes["kd_tiny"]
    with pytest.raises(QLIPError, match="fd_tiny: a distance between sets needs two images or more, got 1"):
        compared(Tiny(), gathered(1, 0), gathered(3, 1), name="fd_tiny")
    many = compared(Tiny(), gathered(50, 0, 20), gathered(40, 1, 20), name="fd_tiny")
    assert many.notes["precision_tiny"] == "over 20 images drawn from 40"
    assert many.notes["recall_tiny"] == "over 20 images drawn from 50"
    assert many.values["fd_tiny"].count == 40 and many.values["kd_tiny"].count == 20


def test_set_distance__only_inceptions_metrics_are_called_fid_and_kid(model: QLIPEvalModel, folder: Path) -> None:
    found = run(model, folder, InceptionSets(TinyInception()))
    assert set(found.values) == {"rfid", "kid", "precision_inception", "recall_inception"}
    other = TinyInception()
    other.suffix, other.short = "_pytorch_fid", "inception_pytorch_fid"
    found = run(model, folder, InceptionSets(other))
    names = {"rfid_pytorch_fid", "kid_pytorch_fid", "precision_inception_pytorch_fid", "recall_inception_pytorch_fid"}
    assert set(found.values) == names


def test_set_distance__the_registry_knows_a_name_for_each_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path))
    for name, kind in (("sets", SetDistance), ("sets_resnet50", ResNetSets), ("sets_fid", InceptionSets)):
        made = registry.evaluator(name)
        assert type(made) is kind and made.name == name
    with pytest.raises(QLIPError, match="fetch it with `qlip data get resnet50`"):
        registry.evaluator("sets_resnet50").settings()
    with pytest.raises(QLIPError, match="fetch it with `qlip data get lpips`"):
        registry.evaluator("sets").settings()
    with pytest.raises(QLIPError, match="sets: takes 1 subset of 2 images, 1 neighbour and 2 images kept"):
        SetDistance(Tiny(), neighbours=0)


def test_set_distance__settings_are_all_that_metrics_depend_on() -> None:
    settings = SetDistance(Tiny(), neighbours=5, kept=77, seed=3).settings()
    assert settings == {
        **Tiny().described(),
        "kernel distance": {"subsets": 100, "size": 1000},
        "neighbours": 5,
        "kept": 77,
        "seed": 3,
    }


def test_set_distance__broken_models_are_named(
    model: QLIPEvalModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "reconstruct", lambda pixels: Reconstructed(pixels[..., :32], torch.ones(len(pixels))))
    with pytest.raises(QLIPError, match=r"rebuilds \(64, 32\) from images of \(64, 64\); sets of unequal sizes"):
        run(model, folder, SetDistance(Tiny()))
    monkeypatch.setattr(model, "reconstruct", lambda pixels: Reconstructed(pixels * torch.nan, torch.ones(len(pixels))))
    with pytest.raises(QLIPError, match=r"^000.png: reconstructed pixels hold NaN"):
        run(model, folder, SetDistance(Tiny()))
    monkeypatch.setattr(model, "capabilities", frozenset({"encode_image"}))
    with pytest.raises(QLIPError, match="cannot reconstruct; leave this evaluator out"):
        run(model, folder, SetDistance(Tiny()))


def test_set_distance__features_stream_and_few_are_held(model: QLIPEvalModel) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = [0]

    def chunks() -> Iterator[Chunk]:
        draw = torch.Generator().manual_seed(0)
        for start in range(0, 4000, 100):
            columns = {name: torch.randn(100, 5, generator=draw) for name in ("originals", "rebuilt")}
            for one in columns.values():
                alive.add(one)
            most[0] = max(most[0], len(alive))
            yield Chunk(start, columns, ["x"] * 100, [None] * 100, [()] * 100, [], "")

    found = SetDistance(Tiny(), kept=50).summarize(model, Rows(chunks))
    assert found.values["fd_tiny"].count == 4000 and found.values["kd_tiny"].count == 50
    assert most[0] <= 4  # two chunks of two columns, of forty
    assert abs(found.values["fd_tiny"].value) < 0.05
