"""A small CIFAR-10 in the layouts of its page and its package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qlip.data.public import cifar10

from ..archives import png, registered


@pytest.fixture
def small_cifar(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """Six files of 20 images, as the package; labels (6, 20) and pixels (6, 20, 32, 32, 3)."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, (6, 20)).astype(np.uint8)
    pixels = rng.integers(0, 256, (6, 20, 32, 32, 3)).astype(np.uint8)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    files = {f"{name}.png": png(block.reshape(20, 1024, 3)) for name, block in zip(names, pixels, strict=True)}
    files["train_lables.json"] = json.dumps(labels[:5].ravel().tolist()).encode()
    files["test_lables.json"] = json.dumps(labels[5].tolist()).encode()
    monkeypatch.setattr(cifar10, "PER_FILE", 20)
    monkeypatch.setattr(cifar10, "PACKAGE", registered(cifar10.PACKAGE, files, tmp_path / "archives"))
    monkeypatch.setattr(cifar10, "PAGE", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    splits = [("train" if n < 5 else "test", labels[n], pixels[n]) for n in range(6)]
    monkeypatch.setattr(cifar10, "CONTENT_SHA256", cifar10._digest(splits))
    return labels, pixels
