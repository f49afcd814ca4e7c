"""Clip art, built for real from small Debian archives."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from qlip.data.public import clipart, get, open_named, read_manifest
from qlip.modeling.images import load_image

from ..archives import debian, keys
from ..samples import encoded

SVG = """<svg xmlns="http://www.w3.org/2000/svg"><metadata>
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:dc="http://purl.org/dc/elements/1.1/">
<dc:title>{title}</dc:title><dc:subject><rdf:Bag>{items}</rdf:Bag></dc:subject></rdf:RDF></metadata></svg>"""


def test_read_metadata__becomes_captions(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    items = "".join(f"<rdf:li>{word}</rdf:li>" for word in ("hash", "", "0x865f868", "sea_animal", "fish", "fish"))
    path.write_text(SVG.format(title="Blue_Dolphin_01", items=items))
    assert clipart.read_metadata(path) == ("blue dolphin", ["sea animal", "fish"])
    assert clipart.captions_of("blue dolphin", ["sea animal", "fish"]) == [
        "blue dolphin", "a drawing of blue dolphin", "clip art of blue dolphin", "blue dolphin, sea animal, fish"
    ]  # fmt: skip
    assert clipart.clean("Clipart by Nicu Buculei - smiley111") == "smiley"
    path.write_text("<svg")
    assert clipart.read_metadata(path) == clipart.read_metadata(tmp_path / "none.svg") == ("", [])


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="builds Debian archives")
def test_build__from_two_packages(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, drawings = (tmp_path / kind / "usr" / "share" / "openclipart" / kind for kind in ("png", "svg"))
    drawn = {f"animals/cat_{number:02d}": number for number in range(40)} | {"shapes/star": 90, "special/x": 91}
    for name, number in drawn.items():
        for folder, suffix in ((images, "png"), (drawings, "svg")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.{suffix}").write_bytes(
                encoded(number, "png", (400, 100)) if suffix == "png" else SVG.format(title="Cats", items="").encode()
            )
    shutil.copy(images / "animals" / "cat_00.png", images / "animals" / "twin.png")
    Image.new("RGBA", (50, 50), (0, 0, 0, 0)).save(images / "animals" / "empty.png")
    for name, package in (("png", clipart.PNG), ("svg", clipart.SVG)):
        debian(tmp_path / name, tmp_path / "archives", package)
    get("clipart", progress=False)
    train, test = open_named("clipart:train"), open_named("clipart:test")
    assert sorted(keys(train) + keys(test)) == [f"animals-cat-{number:02d}" for number in range(40)]
    assert all(clipart.is_held_out(key) for key in keys(test)) and 1 <= len(test) <= 5
    raw = train.read(0)
    assert raw.label == "cat", "a title shared by many is their collection's, so the file name speaks"
    image = load_image(raw.image)
    assert image.size == (160, 160) and image.getpixel((80, 2)) == (255, 255, 255), "in a white square"
    manifest = read_manifest("clipart")
    assert manifest is not None and manifest["sources"][0]["origin"] == "apt-get package openclipart-png 99"
