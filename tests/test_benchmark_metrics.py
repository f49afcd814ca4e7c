"""The benchmark of metrics beside other packages: its table, and the stand-in for torchvision."""

from __future__ import annotations

import sys

import pytest

from benchmarks import metrics
from benchmarks.metrics import Row, images, table


def test_table__rows_and_missing_packages() -> None:
    rows = [Row("psnr", "piq 0.8", 30.40094334, 30.40088844, 1.32e-4, "adds 1e-8")]
    lines = list(table(rows, ["lpips"]))
    assert lines[2] == "| psnr | piq 0.8 | 30.4009 | 30.4009 | 1.3e-04 | adds 1e-8 |"
    assert lines[-1] == "Could not be installed: lpips."


def test_images__photographs_and_their_jpegs() -> None:
    originals, rebuilt = images()
    assert originals.shape == rebuilt.shape and originals.shape[1:] == (3, 256, 256)
    assert 0.001 < float((originals - rebuilt).abs().mean()) < 0.1


def test_no_torchvision__gives_modules_and_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    if "torchvision" in sys.modules:
        pytest.skip("torchvision is installed")
    monkeypatch.setattr(sys, "meta_path", [metrics._NoTorchvision(), *sys.meta_path])
    before = set(sys.modules)
    from torchvision.datasets import CIFAR10
    from torchvision.models import inception

    assert isinstance(CIFAR10, type) and isinstance(inception.InceptionA, type)
    for name in set(sys.modules) - before:
        del sys.modules[name]
