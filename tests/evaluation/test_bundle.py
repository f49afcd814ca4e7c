"""A measurement's folder holds all that was found, and gives it back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlip import QLIPError
from qlip.evaluation.evaluators.base import MetricResult, MetricValue
from qlip.evaluation.report.bundle import image_name, read_bundle, write_bundle

from .test_codebook import found_of
from .test_result import measured, result


def reconstruction() -> MetricResult:
    """With two thumbnails."""
    pairs = torch.randint(0, 256, (2, 2, 3, 5, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    records: list[dict[str, object]] = [{"key": "a/b.png", "psnr": 20.0}, {"key": "c.png", "psnr": 21.0}]
    return MetricResult(
        {"psnr": MetricValue(28.0, 27.9, 28.1, 100, "dB", "higher")}, {}, {"worst_psnr": records}, {"worst_psnr": pairs}
    )


def codebook() -> MetricResult:
    """Of codes drawn at random."""
    return found_of(torch.randint(0, 4, (6, 4, 2), generator=torch.Generator().manual_seed(1)), 2)


def written(folder: Path) -> list[MetricResult]:
    """A bundle of both, and the metric_results that went into it."""
    metric_results = [reconstruction(), codebook()]
    rows = [
        measured(tables=metric_results[0].tables, values=metric_results[0].values),
        measured(evaluator="codebook", values=metric_results[1].values, notes=metric_results[1].notes, tables={}),
    ]
    shown = {0: {"c.png": (torch.zeros(3, 8, 8, dtype=torch.uint8), torch.ones(3, 8, 8, dtype=torch.uint8))}}
    write_bundle(folder, result(*rows), metric_results, pairs=shown)
    return metric_results


def test_bundle__a_folder_gives_back_what_was_found(tmp_path: Path) -> None:
    metric_results = written(tmp_path)
    bundle = read_bundle(tmp_path)
    assert len(bundle.metric_results) == 2
    assert (
        bundle.metric_results[0].values == metric_results[0].values
        and bundle.metric_results[0].tables == metric_results[0].tables
    )
    assert (
        bundle.metric_results[1].values == metric_results[1].values
        and bundle.metric_results[1].notes == metric_results[1].notes
    )
    assert set(bundle.metric_results[1].arrays) == set(metric_results[1].arrays) and not bundle.metric_results[0].arrays
    for name, array in metric_results[1].arrays.items():
        assert torch.equal(bundle.metric_results[1].arrays[name], array)
    assert "01-codebook" in bundle.images
    assert read_bundle(tmp_path / "result.json").result == bundle.result


def test_bundle__images_are_the_pixels_and_larger_ones_go_before_thumbnails(tmp_path: Path) -> None:
    (metric_result, _) = written(tmp_path)
    images = read_bundle(tmp_path).images
    for side, place in (("original", 0), ("rebuilt", 1)):
        with Image.open(images[image_name(0, "a/b.png", side)]) as opened:  # type: ignore[arg-type]
            stored = torch.from_numpy(np.array(opened)).permute(2, 0, 1)
        assert torch.equal(stored, metric_result.arrays["worst_psnr"][0, place])
        with Image.open(images[image_name(0, "c.png", side)]) as opened:  # type: ignore[arg-type]
            assert opened.size == (8, 8) and opened.getpixel((0, 0)) == (place,) * 3


def test_bundle__writing_again_leaves_nothing_of_before(tmp_path: Path) -> None:
    written(tmp_path)
    write_bundle(tmp_path, result(measured()), [MetricResult({})])
    bundle = read_bundle(tmp_path)
    assert not bundle.images and len(bundle.metric_results) == 1


def test_bundle__faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(QLIPError, match="1 metric results do not fit a result of 2 rows"):
        write_bundle(tmp_path, result(measured(), measured()), [MetricResult({})])
    with pytest.raises(QLIPError, match=r"result\.json: No such file"):
        read_bundle(tmp_path / "nowhere")
    written(tmp_path)
    result(measured()).save(tmp_path / "result.json")
    with pytest.raises(QLIPError, match="is of no row of result.json; was the result replaced"):
        read_bundle(tmp_path)
    (tmp_path / "arrays.safetensors").write_bytes(b"no")
    with pytest.raises(QLIPError, match="cannot be read as safetensors; measure again"):
        read_bundle(tmp_path)
