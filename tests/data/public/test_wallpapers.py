"""Wallpapers, built for real from small Debian archives."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qlip.data.public import get, open_named, wallpapers
from qlip.modeling.images import load_image

from ..archives import debian, keys


def textured(seed: int, size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def test_largest_of_each__takes_one_resolution_per_wallpaper(tmp_path: Path) -> None:
    for name, size in {
        "wallpapers/Kay/contents/images/1080x1920.png": (20, 30),
        "wallpapers/Kay/contents/images/5120x2880.png": (60, 30),
        "wallpapers/Kay/contents/images_dark/5120x2880.png": (60, 31),
        "wallpapers/Kay/contents/screenshot.png": (90, 90),
        "backgrounds/Elephants.jpg": (20, 20),
        "backgrounds/Elephants_40x20.jpg": (40, 20),
        "backgrounds/note.svg": (1, 1),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        textured(0, (200, 200)).resize(size).save(tmp_path / name, "png" if name.endswith("png") else "jpeg")
    found = [str(path.relative_to(tmp_path)) for path in wallpapers.largest_of_each(tmp_path)]
    assert found == [
        "backgrounds/Elephants_40x20.jpg",
        "wallpapers/Kay/contents/images/5120x2880.png",
        "wallpapers/Kay/contents/images_dark/5120x2880.png",
    ]


def test_crops__are_repeatable_detailed_and_never_enlarged() -> None:
    image = textured(1, (900, 500))
    image.paste((9, 9, 9), (450, 0, 900, 500))
    first, again = (list(wallpapers.crops(image, 30, "name")) for _ in range(2))
    assert [crop.tobytes() for crop in first] == [crop.tobytes() for crop in again] and len(first) == 30
    assert all(crop.size == (96, 96) and wallpapers.detail(crop) > wallpapers.LEAST_DETAIL for crop in first)
    assert [crop.tobytes() for crop in wallpapers.crops(image, 30, "other")] != [crop.tobytes() for crop in first]
    assert list(wallpapers.crops(Image.new("RGB", (900, 500), "navy"), 5, "flat")) == []
    native = next(iter(wallpapers.crops(textured(2, (96, 96)), 1, "small")))
    assert native.tobytes() == textured(2, (96, 96)).tobytes()


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="builds Debian archives")
def test_build__from_six_packages(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wallpapers, "CROPS", 60)
    for number, package in enumerate(wallpapers.TRAIN + wallpapers.TEST):
        folder = tmp_path / package.name / "usr" / "share" / "backgrounds"
        folder.mkdir(parents=True)
        textured(number, (300 + number, 200)).save(folder / f"image{number}.png")
        textured(number, (1200, 800)).save(folder / ("Garden.jpg" if number == 1 else f"umang{number}.jpg"))
        debian(tmp_path / package.name, tmp_path / "archives", package)
    get("wallpapers", progress=False)
    train, test = open_named("wallpapers:train"), open_named("wallpapers:test")
    assert keys(test) == ["image4", "image5"], "whole packages are held out, but for what is no photograph"
    assert load_image(test.read(0).image).size == (200, 200)
    counts = {
        name: sum(key.startswith(name) for key in keys(train)) for name in ("backgrounds-garden", "backgrounds-pic")
    }
    assert len(train) == 60 and counts["backgrounds-garden"] == 18, "photographs get three shares"
    raw = train.read(0)
    assert load_image(raw.image).size == (96, 96) and raw.captions == () and raw.label is None
