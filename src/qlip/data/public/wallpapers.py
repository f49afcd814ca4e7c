"""Six packages of wallpapers: crops at many scales to train on, two packages' photographs held out for evaluation."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from qlip.data.public.builder import Builder, PublicDataset, encode, key_of, large_images_allowed, licences
from qlip.data.public.fetch import Package
from qlip.runtime.rng import generator

TRAIN = (
    Package(
        "apt-get",
        "plasma-workspace-wallpapers",
        "4:5.27.5-2",
        "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
        "GPL-2+ as Debian states; LGPL-3 or CC-BY-SA-4.0 in each image's own metadata",
    ),
    Package(
        "apt-get",
        "mate-backgrounds",
        "1.26.0-1",
        "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
        "GPL-2+, the Ubuntu-Mate images CC-BY-SA-4.0",
    ),
    Package(
        "apt-get",
        "gnome-backgrounds",
        "43.1-1",
        "a670dea21572652127d6e55f9cdb3a226d0037854fdbfd037003c7d00ee0dc4e",
        "CC-BY-SA-3.0 and GPL-2+",
    ),
    Package(
        "apt-get",
        "ukui-wallpapers",
        "20.04.3-1.1",
        "6d49be70152e6d603163458e177e501deb0be8f2916389ccbfcf59b0d7fc0262",
        "CC-BY-SA-3.0",
    ),
)
TEST = (
    Package(
        "apt-get",
        "lomiri-wallpapers-16.04",
        "20.04.0-2",
        "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
        "CC-BY-4.0, CC-BY-SA-4.0 and CC0-1.0, by image",
    ),
    Package(
        "apt-get",
        "lomiri-wallpapers-20.04",
        "20.04.0-2",
        "d44e89b8473aafe64a5b678f014862dc31335aaaf18665c544d985d854f1a709",
        "CC-BY-SA-3.0",
    ),
)
"""Held out as a whole: their photographs are diverse (landscapes, animals, rooms, by many people)."""

NOT_PHOTOGRAPHS = ("umang", "analogpattern", "Fossa", "Infinite-Sea", "Painting-Colors", "warty-final")
"""Name prefixes of other images in the held-out packages: gradients, a texture, drawings."""
PHOTOGRAPHS = frozenset(
    ["FallenLeaf", "Path", "DarkestHour", "summer_1am", "EveningGlow", "Grey", "Kite", "ColorfulCups"]
    + [
        "OneStandsOut",
        "ColdRipple",
        "BytheWater",
        "Garden",
        "Dune",
        "Wood",
        "Aqua",
        "TwoWings",
        "Storm",
        "GreenMeadow",
    ]
    + ["RainDrops", "Blinds", "FreshFlower", "LadyBird", "YellowFlower"]
)
"""Training wallpapers that are photographs; they get more crops than renders and patterns."""
PHOTOGRAPH_SHARE = 3

CROPS = 25_000
CROP_SIZE = 96
TEST_SIZE = 512
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
CANDIDATES = 4
LEAST_DETAIL = 2.5  # grey levels, see `detail`; a crop with less is almost flat


def build(builder: Builder) -> None:
    """Write train (crops of 96 px) and test (whole photographs, square, at most 512 px); no captions."""
    train = [path for folder in [builder.fetch(package) for package in TRAIN] for path in largest_of_each(folder)]
    test = [path for folder in [builder.fetch(package) for package in TEST] for path in largest_of_each(folder)]
    with large_images_allowed():
        _write_test(builder, test)
        _write_train(builder, train)


def _write_test(builder: Builder, paths: list[Path]) -> None:
    for path in paths:
        if not path.name.startswith(NOT_PHOTOGRAPHS):
            image = _open(path)
            side = min(image.size)
            left, upper = (image.width - side) // 2, (image.height - side) // 2
            box, size = (left, upper, left + side, upper + side), min(side, TEST_SIZE)
            square = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
            builder.split("test").add(key_of(path.stem), "png", encode(square, "png"))


def _write_train(builder: Builder, paths: list[Path]) -> None:
    shares = [PHOTOGRAPH_SHARE if wallpaper_of(path)[1] in PHOTOGRAPHS else 1 for path in paths]
    ends = [round(CROPS * sum(shares[: number + 1]) / sum(shares)) for number in range(len(paths))]
    writer = builder.split("train")
    with builder.progress("cropping wallpapers", CROPS) as advance:
        for path, count in zip(paths, np.diff([0, *ends]), strict=True):
            for number, crop in enumerate(crops(_open(path), int(count), path.name)):
                folder, name = wallpaper_of(path)
                writer.add(f"{key_of(f'{folder}-{name}')}-{number:04d}", "jpg", encode(crop, "jpg"))
            advance(int(count))


def crops(image: Image.Image, count: int, seed: str) -> Iterator[Image.Image]:
    """Up to `count` square crops at `CROP_SIZE`, of log-uniform side up to the whole image; none enlarged, none flat.

    Each is the most detailed of `CANDIDATES` random crops: wallpapers are mostly sky, blur and gradients, and uniform
    crops have a third of the detail of the photographs that a model is then evaluated on.
    """
    rng = generator("wallpapers", seed)
    levels = [image]  # halved repeatedly, so that a large crop costs no more than a small one
    while min(levels[-1].size) >= 4 * CROP_SIZE:
        levels.append(levels[-1].reduce(2))
    largest = min(image.size)
    for _ in range(count):
        best, most = None, LEAST_DETAIL
        for scale, x, y in rng.random((CANDIDATES, 3)):
            side = min(largest, round(CROP_SIZE * math.exp(scale * math.log(largest / CROP_SIZE))))
            left, upper = int(x * (image.width - side + 1)), int(y * (image.height - side + 1))
            crop = _shrink(levels, left, upper, side)
            if (found := detail(crop)) > most:
                best, most = crop, found
        if best is not None:
            yield best


def _shrink(levels: list[Image.Image], left: int, upper: int, side: int) -> Image.Image:
    """A square of the first level, resized from the smallest level in which its side is at least twice `CROP_SIZE`."""
    level = min(len(levels) - 1, max(0, int(math.log2(side / (2 * CROP_SIZE)))))
    image, factor = levels[level], 2**level
    right, lower = min((left + side) / factor, image.width), min((upper + side) / factor, image.height)
    box = (left / factor, upper / factor, right, lower)
    return image.resize((CROP_SIZE, CROP_SIZE), Image.Resampling.LANCZOS, box=box)


def detail(crop: Image.Image) -> float:
    """Mean absolute difference of neighbouring pixels in grey levels, horizontal plus vertical."""
    grey = np.asarray(crop.convert("L"), np.float32)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean())


def largest_of_each(root: Path) -> list[Path]:
    """The wallpapers of an unpacked package, each at the largest of its resolutions, sorted by path."""
    versions: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.stem != "screenshot" and not path.is_symlink():
            versions[wallpaper_of(path)].append(path)
    return [max(paths, key=_pixels) for _, paths in sorted(versions.items())]


def wallpaper_of(path: Path) -> tuple[str, str]:
    """(folder, name) shared by its resolutions: ``Kay/contents/images/1080x1920.png`` -> images, Kay."""
    if re.fullmatch(r"\d+x\d+", path.stem):
        return path.parent.name, path.parents[2].name
    return path.parent.name, re.sub(r"_\d+x\d+$", "", path.stem)


def _pixels(path: Path) -> int:
    with Image.open(path) as image:
        return image.width * image.height


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


DATASET = PublicDataset(
    "wallpapers",
    "wallpapers: 96 px crops at many scales, without captions; two packages' photographs held out",
    licences(*TRAIN, *TEST),
    build,
    download=222_000_000,
    disk=200_000_000,
    splits={"train": "about 25,000 crops", "test": "held-out photographs, square, at most 512 px"},
    packages=(*TRAIN, *TEST),
)
