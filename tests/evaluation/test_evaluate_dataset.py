"""A pass gives the same figures however it is cut: killed, gone on with, shared among processes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from qlip import QLIPError, QLIPModel, QLIPProcessor, assets
from qlip.data.loader.eval_set import EvalSet
from qlip.evaluation import open_evaluation
from qlip.evaluation.evaluators.base import Columns, Evaluator, MetricResult, MetricValue, Rows, mean
from qlip.evaluation.models.base import EvalModel, QLIPEvalModel, Reconstructed
from qlip.evaluation.models.batch import ModelBatch
from qlip.evaluation.run import evaluate_dataset as passes
from qlip.evaluation.run.evaluate_dataset import PassResult, evaluate_dataset

COUNT = 11


class Brightness(Evaluator):
    """The mean of an image's pixels, and what is rebuilt of it."""

    name: ClassVar[str] = "brightness"
    needs: ClassVar[frozenset[str]] = frozenset({"reconstruct"})

    def __init__(self, broken: str | None = None) -> None:
        self.broken = broken

    def rows(self, batch: ModelBatch) -> Columns:
        """Two numbers an image."""
        means = batch.model.preprocessing.denormalize(batch.pixel_values).mean((1, 2, 3))
        if self.broken in batch.keys:
            means[batch.keys.index(self.broken)] = float("nan")
        return {"original": means, "rebuilt": batch.model.reconstruct(batch.pixel_values).pixels.mean((1, 2, 3))}

    def summarize(self, model: EvalModel, rows: Rows) -> MetricResult:
        """Means with intervals."""
        return MetricResult({name: mean(rows.column(name)) for name in ("original", "rebuilt")})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven images, one of them broken."""
    folder = tmp_path_factory.mktemp("images")
    images = sorted(assets.path("images").glob("*.jpg"))
    for number in range(COUNT - 1):
        shutil.copy(images[number % len(images)], folder / f"{number:02d}.jpg")
    (folder / "05b.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def model() -> QLIPEvalModel:
    return QLIPEvalModel(QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled"), assets.BUNDLED)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "CHUNK", 4)


def opened(folder: Path, model: QLIPEvalModel) -> EvalSet:
    return open_evaluation(str(folder), model.processor)


def run(model: QLIPEvalModel, images: Path, **options: object) -> PassResult:
    found = evaluate_dataset(model, opened(images, model), [Brightness()], batch_size=3, **options)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_evaluate_dataset__memory_a_folder_and_loader_workers_give_one_result(
    model: QLIPEvalModel, folder: Path, tmp_path: Path
) -> None:
    expected = run(model, folder)
    assert expected.count == COUNT - 1
    assert [key for key, _ in expected.broken] == ["05b.jpg"]
    done: list[int] = []
    assert run(model, folder, folder=tmp_path / "work", on_progress=done.append) == expected
    assert sum(done) == COUNT
    assert run(model, folder, num_workers=2) == expected
    # what is stored is not computed again
    found = evaluate_dataset(
        NoModel(model), opened(folder, model), [Brightness()], folder=tmp_path / "work", batch_size=3
    )
    assert found == expected


class NoModel(QLIPEvalModel):
    """Says what the other says of itself, and computes nothing."""

    def __init__(self, other: QLIPEvalModel) -> None:
        super().__init__(other.model, other.processor, other.name)

    def reconstruct(self, pixel_values: Tensor) -> Reconstructed:  # type: ignore[override]
        """Must not be asked."""
        raise AssertionError("computed again")


def test_evaluate_dataset__processes_give_the_same_metrics_to_the_last_digit(
    model: QLIPEvalModel, folder: Path, tmp_path: Path
) -> None:
    expected = run(model, folder)
    for rank in (2, 1):  # as if they were done first; the first rank makes the plan and waits for them
        work = {"folder": tmp_path, "rank": rank, "world": 3, "batch_size": 3}
        assert evaluate_dataset(model, opened(folder, model), [Brightness()], **work) is None  # type: ignore[arg-type]
    assert run(model, folder, folder=tmp_path, rank=0, world=3) == expected


def test_evaluate_dataset__rows_that_are_damaged_or_missing_are_computed_again(
    model: QLIPEvalModel, folder: Path, tmp_path: Path
) -> None:
    expected = run(model, folder, folder=tmp_path)
    first, second, _ = sorted(tmp_path.glob("rows-*.safetensors"))
    first.write_bytes(first.read_bytes()[:40])
    second.unlink()
    assert run(model, folder, folder=tmp_path) == expected


def test_evaluate_dataset__an_image_replaced_under_its_name_is_measured_again(
    model: QLIPEvalModel, folder: Path, tmp_path: Path
) -> None:
    images, work = tmp_path / "images", tmp_path / "work"
    shutil.copytree(folder, images)
    before = run(model, images, folder=work)
    written = {path.name: path.stat().st_mtime_ns for path in work.glob("rows-*")}
    shutil.copy(folder / "01.jpg", images / "00.jpg")
    (images / "10.txt").write_text("words that came later, beside no image")
    after = run(model, images, folder=work)
    assert after == run(model, images) and after.digest != before.digest
    again = {path.name for path in work.glob("rows-*") if path.stat().st_mtime_ns != written[path.name]}
    assert again == {"rows-000000000.safetensors"}  # the other chunks are as they were
    (images / "09.txt").write_text("a caption")
    run(model, images, folder=work)
    assert "a caption" in str(next(iter(safe_open(work / "rows-000000008.safetensors", "pt").metadata().values())))


def test_evaluate_dataset__killed_anywhere_no_image_is_counted_twice(
    model: QLIPEvalModel, folder: Path, tmp_path: Path
) -> None:
    expected = run(model, folder)
    for attempt in range(4):
        command = [sys.executable, "-m", "tests.evaluation.killed_evaluation", str(folder), str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        before, until = len(list(tmp_path.glob("rows-*"))), time.monotonic() + 120
        while attempt < 3 and process.poll() is None and time.monotonic() < until:
            if len(list(tmp_path.glob("rows-*"))) > before:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        output, _ = process.communicate(timeout=120)
    found = json.loads(output)
    assert found["count"] == expected.count and found["digest"] == expected.digest
    assert found["rebuilt"] == expected.metric_results["brightness"].values["rebuilt"].value


def test_evaluate_dataset__rows_of_another_evaluation_are_refused(
    model: QLIPEvalModel, folder: Path, tmp_path: Path
) -> None:
    run(model, folder, folder=tmp_path)
    with pytest.raises(QLIPError, match=r"another evaluation \(batch_size differ\)"):
        evaluate_dataset(model, opened(folder, model), [Brightness()], folder=tmp_path, batch_size=2)


def test_evaluate_dataset__the_digest_knows_images_and_keys(model: QLIPEvalModel, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    assert run(model, other).digest == run(model, folder).digest
    shutil.copy(folder / "01.jpg", other / "00.jpg")
    assert run(model, other).digest != run(model, folder).digest


def test_evaluate_dataset__what_is_wrong_is_said_in_a_line(model: QLIPEvalModel, folder: Path, tmp_path: Path) -> None:
    data = opened(folder, model)
    with pytest.raises(
        QLIPError, match=r"^07.jpg: brightness's values of original hold NaN; the model's output is broken$"
    ):
        evaluate_dataset(model, data, [Brightness(broken="07.jpg")])
    with pytest.raises(QLIPError, match="two have the same name"):
        evaluate_dataset(model, data, [Brightness(), Brightness()])
    with pytest.raises(QLIPError, match="name an output folder"):
        evaluate_dataset(model, data, [Brightness()], world=2)
    blind = NoModel(model)
    blind.capabilities = frozenset({"encode_image"})
    with pytest.raises(QLIPError, match="cannot reconstruct; leave this evaluator out"):
        evaluate_dataset(blind, data, [Brightness()])
    (tmp_path / "only.jpg").write_bytes(b"no image")
    with pytest.raises(QLIPError, match="no image could be read"):
        evaluate_dataset(model, opened(tmp_path, model), [Brightness()])


def test_evaluate_dataset__another_size_is_named_and_must_fit_the_patch(model: QLIPEvalModel) -> None:
    wider = QLIPEvalModel(model.model, model.processor, "wider", size=(32, 64))
    assert not wider.as_shipped and wider.preprocessing.size == (32, 64)
    assert QLIPEvalModel(model.model, model.processor, "same", size=(64, 64)).as_shipped
    with pytest.raises(QLIPError, match="multiples of 8"):
        QLIPEvalModel(model.model, model.processor, "odd", size=(60, 64))


def test_evaluate_dataset__a_mean_has_the_interval_that_theory_gives() -> None:
    numbers = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 3 + 10
    value = mean(numbers, unit="dB")
    half = 1.96 * float(numbers.std()) / 4000**0.5
    assert value.low == pytest.approx(value.value - half, rel=0.01)
    assert value.high == pytest.approx(value.value + half, rel=0.01)
    assert mean(numbers) == MetricValue(value.value, value.low, value.high, 4000)  # drawn the same each time
    assert mean(numbers[:1]).low is None
    assert mean(torch.tensor([1.0, float("inf"), 3.0])).value == 2.0  # over images with an error
    infinite = mean(torch.tensor([float("inf")] * 2))
    assert (infinite.value, infinite.low) == (float("inf"), None)
    with pytest.raises(QLIPError, match="not a number"):
        mean(torch.tensor([1.0, float("nan")]))
