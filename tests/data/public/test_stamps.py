"""Tux Paint's stamps, built for real from a small Debian archive."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qlip.data.public import get, open_named, stamps
from qlip.modeling.images import load_image

from ..archives import debian
from ..samples import encoded

packed = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="builds Debian archives")


@packed
def test_build__stamps_with_a_sentence(tmp_path: Path, cache: Path) -> None:
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
