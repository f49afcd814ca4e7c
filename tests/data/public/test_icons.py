"""Icons, built for real from a small package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlip.data.public import emoji, get, icons, open_named
from qlip.data.public.icons import IconSet, caption_of, contains, phrase_of
from qlip.errors import QLIPError
from qlip.modeling.images import load_image

from ..archives import registered

HELD_OUT, TRAINED = "1F6F9", "1F600"  # by the hash of the hexcode


SETS = (IconSet("plain", "MIT"), IconSet("streamline", "CC-BY-4.0", ("flat",)))


def rectangle(colour: str, x: int = 4, y: int = 4, width: int = 8, height: int = 8) -> dict[str, Any]:
    return {"body": f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{colour}"/>'}


def collection(spdx: str, drawn: dict[str, dict[str, Any]], **sizes: int) -> bytes:
    return json.dumps({"info": {"license": {"spdx": spdx}}, "icons": drawn, **sizes}).encode()


@pytest.fixture
def package(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Two sets with one icon of everything that is dropped, and the names that emoji hold out."""
    pytest.importorskip("resvg_py")
    wide = {"body": '<path fill="#00f" d="M0 0h32v16H0z"/>', "width": 32, "left": 0}
    plain = {
        "red-box": rectangle("#f00"),
        "red-box-2": rectangle("#e00"),
        "blue-flag": wide,
        "the-same": rectangle("#f00"),  # as red-box
        "old-skateboard-icon": rectangle("#0a0"),  # names a held-out emoji
        "skateboarding": rectangle("#0b0"),  # does not
        "blank": {"body": ""},
        "pale": rectangle("#fefefe"),
        "gone": rectangle("#00a") | {"hidden": True},
        "broken": {"body": "<g>"},
        "24": rectangle("#a0a"),  # no name
    }
    streamline = {"cloud-flash-1-flat": rectangle("#0aa", 0, 0, 24, 12), "cup": rectangle("#aa0", 2, 2, 9, 9)}
    files = {
        "json/plain.json": collection("MIT", plain),
        "json/streamline.json": collection("CC-BY-4.0", streamline, width=24, height=24),
    }
    rows = [
        {"hexcode": code, "annotation": name, "tags": "", "group": "g", "subgroups": "s", "skintone_base_hexcode": ""}
        for code, name in ((HELD_OUT, "skateboard"), (TRAINED, "cup"))
    ]
    assert emoji.is_held_out(HELD_OUT) and not emoji.is_held_out(TRAINED)
    words = {"data/openmoji.json": json.dumps(rows).encode()}
    monkeypatch.setattr(icons, "SETS", SETS)
    monkeypatch.setattr(icons, "TEST_SHARE", 3)
    monkeypatch.setattr(icons, "PACKAGE", registered(icons.PACKAGE, files, tmp_path / "archives"))
    monkeypatch.setattr(emoji, "OPENMOJI", registered(emoji.OPENMOJI, words, tmp_path / "archives"))
    return files


def test_icons__every_kept_icon_is_in_one_split_with_its_captions(package: dict[str, bytes]) -> None:
    get("icons", progress=False)
    splits = {name: open_named(f"icons:{name}") for name in ("train", "test")}
    found = {raw.key: (name, raw) for name, source in splits.items() for raw in map(source.read, range(len(source)))}
    assert set(found) == {
        "plain-red-box",
        "plain-red-box-2",
        "plain-blue-flag",
        "plain-skateboarding",
        "streamline-cloud-flash-1-flat",
        "streamline-cup",
    }
    for name, raw in found.values():
        assert raw.label is not None and (name == "test") == icons.is_held_out(raw.label)
        assert raw.captions[:2] == (raw.label, f"an icon of {raw.label}")
    assert found["plain-red-box"][1].label == found["plain-red-box-2"][1].label == "red box"
    assert found["streamline-cloud-flash-1-flat"][1].label == "cloud flash"


def test_icons__are_drawn_square_on_white(package: dict[str, bytes]) -> None:
    get("icons", progress=False)
    images = {}
    for split in ("train", "test"):
        source = open_named(f"icons:{split}")
        images |= {raw.key: np.asarray(load_image(raw.image)) for raw in map(source.read, range(len(source)))}
    box, flag = images["plain-red-box"], images["plain-blue-flag"]
    assert box.shape == flag.shape == (64, 64, 3)
    assert (box[16:48, 16:48] == (255, 0, 0)).all() and (box[:16] == 255).all() and (box[:, 48:] == 255).all()
    assert (flag[16:48] == (0, 0, 255)).all() and (flag[:16] == 255).all(), "32 x 16, in the middle of a square"


def test_icons__another_licence_than_expected_is_an_error(
    package: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = package | {"json/plain.json": collection("GPL-3.0", {})}
    monkeypatch.setattr(icons, "PACKAGE", registered(icons.PACKAGE, changed, tmp_path / "archives"))
    with pytest.raises(QLIPError, match=r"plain is under GPL-3\.0, expected MIT"):
        get("icons", progress=False)
    missing = {name: data for name, data in package.items() if "plain" not in name}
    monkeypatch.setattr(icons, "PACKAGE", registered(icons.PACKAGE, missing, tmp_path / "archives"))
    with pytest.raises(QLIPError, match="holds no icon set plain"):
        get("icons", progress=False)


def test_icons__without_resvg_name_the_extra(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(QLIPError, match=r"needs the package 'resvg_py': pip install .*\[icons\]"):
        get("icons", progress=False)


@pytest.mark.parametrize(
    ("name", "noise", "caption"),
    [
        ("airplane-2", (), "airplane"),
        ("cloud-flash-1-flat", ("flat",), "cloud flash"),
        ("traffic-light", (), "traffic light"),
        ("react-icon", (), "react"),
        ("3d-move", (), "3d move"),
        ("24-icon", (), ""),
    ],
)
def test_caption_of(name: str, noise: tuple[str, ...], caption: str) -> None:
    assert caption_of(name, IconSet("x", "MIT", noise)) == caption


def test_contains__whole_consecutive_words_only() -> None:
    phrases = frozenset({("hot", "dog"), ("sun",)})
    assert contains(phrase_of("An icon of Hot-Dog stand"), phrases)
    assert not contains(phrase_of("hot red dog, sunny"), phrases)
