"""Fashion-MNIST (Xiao et al., arXiv 1708.07747): 70,000 grey images of clothes, 28 px, in ten classes."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from qlip.data.public.cache import Builder
from qlip.data.public.fetch import Package, fetch_package, unpack
from qlip.data.public.images import encode
from qlip.errors import QLIPError

PACKAGE = Package(
    "apt-get",
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    "MIT",
)
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FILES = {"train": "train", "test": "t10k"}
FOLDER = Path("usr/share/datasets/fashion-mnist")
BYTES = 0x08  # an IDX file's code for uint8


def build(builder: Builder) -> None:
    """Write train (60,000) and test (10,000): grey PNG and the class as label, in the files' order."""
    fetched = fetch_package(PACKAGE, builder.raw, builder.report)
    builder.sources.append(fetched)
    root = unpack(fetched.path, builder.raw / PACKAGE.name) / FOLDER
    for split, stem in FILES.items():
        pictures = read_idx(root / f"{stem}-images-idx3-ubyte.gz", 3)
        labels = read_idx(root / f"{stem}-labels-idx1-ubyte.gz", 1)
        if len(pictures) != len(labels) or labels.max() >= len(CLASSES):
            raise QLIPError(f"{fetched.origin}: {len(labels):,} labels for {len(pictures):,} pictures of {split}")
        writer = builder.split(split)
        with builder.report.task(f"writing {split}", len(labels)) as tick:
            for picture, label in zip(pictures, labels, strict=True):
                file = encode(Image.fromarray(picture), "png")
                writer.add(f"{writer.count:05d}", "png", file, label=CLASSES[label])
                tick(1)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of bytes, compressed: two zero bytes, type, number of axes, their sizes as big-endian uint32, data.

    Raises:
        QLIPError: not there, or not that.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise QLIPError(f"{path.name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    head = 4 + 4 * dimensions
    if len(data) < head or data[:4] != bytes([0, 0, BYTES, dimensions]):
        raise QLIPError(f"{path.name}: no IDX file of bytes with {dimensions} axes")
    sizes = struct.unpack(f">{dimensions}I", data[4:head])
    if len(data) - head != int(np.prod(sizes)):
        raise QLIPError(f"{path.name}: holds {len(data) - head:,} bytes for sizes {sizes}")
    return np.frombuffer(data, np.uint8, offset=head).reshape(sizes)
