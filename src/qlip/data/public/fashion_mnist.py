"""Fashion-MNIST (Xiao et al., arXiv 1708.07747): 70,000 grey images of clothes, 28 px, in ten classes."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

from qlip.data.public.builder import Builder, PublicDataset
from qlip.data.public.fetch import Package
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
    root = builder.fetch(PACKAGE) / FOLDER
    for split, stem in FILES.items():
        images = read_idx(root / f"{stem}-images-idx3-ubyte.gz", 3)
        labels = read_idx(root / f"{stem}-labels-idx1-ubyte.gz", 1)
        if len(images) != len(labels) or labels.max() >= len(CLASSES):
            raise QLIPError(f"{PACKAGE.name}: {len(labels):,} labels for {len(images):,} images of {split}")
        builder.add_labelled(split, images, labels, CLASSES)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read a compressed IDX file: two zero bytes, type, number of axes, their sizes as big-endian uint32, data.

    Returns:
        uint8, of the sizes in the file.

    Raises:
        QLIPError: no such file, or no IDX file of bytes with so many axes.
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


DATASET = PublicDataset(
    "fashion-mnist",
    "70,000 grey images of clothes, 28 px, in ten classes (arXiv 1708.07747)",
    PACKAGE.licence,
    build,
    download=31_000_000,
    disk=180_000_000,
    splits={"train": "60,000, label only", "test": "10,000, label only"},
    packages=(PACKAGE,),
)
