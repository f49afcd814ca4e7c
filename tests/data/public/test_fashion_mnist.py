"""Fashion-MNIST, built for real from a small Debian archive."""

from __future__ import annotations

import gzip
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qlip.data.public import fashion_mnist, get, open_named
from qlip.errors import QLIPError
from qlip.modeling.images import load_image

from ..archives import debian

packed = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="builds Debian archives")


def idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


@packed
def test_build__images_and_labels_in_order(tmp_path: Path, cache: Path) -> None:
    rng = np.random.default_rng(0)
    expected = {}
    root = tmp_path / "package" / fashion_mnist.FOLDER
    for split, stem, count in (("train", "train", 12), ("test", "t10k", 5)):
        images, labels = rng.integers(0, 256, (count, 28, 28)), rng.integers(0, 10, count)
        idx(root / f"{stem}-images-idx3-ubyte.gz", images)
        idx(root / f"{stem}-labels-idx1-ubyte.gz", labels)
        expected[split] = images, labels
    debian(tmp_path / "package", tmp_path / "archives", fashion_mnist.PACKAGE)
    get("fashion-mnist", progress=False)
    for split, (images, labels) in expected.items():
        source = open_named(f"fashion-mnist:{split}")
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            raw = source.read(index)
            assert raw.label == fashion_mnist.CLASSES[label] and raw.captions == ()
            assert np.array_equal(np.asarray(load_image(raw.image))[..., 0], image)
        assert len(source) == len(labels)


def test_read_idx__refuses_other_files(tmp_path: Path) -> None:
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
