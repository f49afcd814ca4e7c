"""Emoji: names, held-out concepts and splits."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qlip.data.public import emoji, get, open_named
from qlip.modeling.images import load_image

from ..archives import keys, png, registered

ROWS = [
    ("1F600", "grinning face", "cheerful, happy", "smileys-emotion", "face-smiling", ""),
    ("1F44B", "waving hand", "hello", "people-body", "hand-fingers-open", ""),
    ("1F44B-1F3FF", "waving hand: dark skin tone", "", "people-body", "hand-fingers-open", "1F44B"),
    ("1F1EE-1F1F9", "flag: Italy", "IT, flag", "flags", "country-flag", ""),
    ("E000", "own", "", "extras-openmoji", "brand", ""),
    ("0035-FE0F-20E3", "keycap: 5", "5", "symbols", "keycap", ""),
]


def test_read_concepts__names_are_natural(tmp_path: Path) -> None:
    fields = ("hexcode", "annotation", "tags", "group", "subgroups", "skintone_base_hexcode")
    (tmp_path / "openmoji.json").write_text(json.dumps([dict(zip(fields, row, strict=True)) for row in ROWS]))
    concepts = emoji.read_concepts(tmp_path / "openmoji.json")
    assert {code: concept.name for code, concept in concepts.items()} == {
        "1F600": "grinning face",
        "1F44B": "waving hand",
        "1F44B-1F3FF": "waving hand, dark skin tone",
        "1F1EE-1F1F9": "flag of italy",
        "0035-20E3": "keycap 5",
    }
    assert concepts["1F44B-1F3FF"].tags == ("hello",)
    captions = emoji.captions_of(concepts["1F600"], "fluent")
    assert captions[0] == "grinning face" and "a 3d picture of grinning face" in captions
    assert "grinning face, cheerful, happy" in captions and all("grinning face" in text for text in captions)


def test_is_held_out__in_every_skin_tone_and_spelling() -> None:
    codes = [f"{number:X}" for number in range(0x1F300, 0x1F700)]
    held_out = [code for code in codes if emoji.is_held_out(code)]
    assert 60 < len(held_out) < 145
    for code in codes[::50] + held_out[:5]:
        for variant in (f"{code}-1F3FD", f"{code.lower()}-fe0f", f"{code}-FE0F-1F3FB"):
            assert emoji.is_held_out(variant) == emoji.is_held_out(code)
    assert emoji.is_held_out("1F600") is False and emoji.is_held_out("1F351") is True  # pinned: splits may not move


def test_build__splits_keep_vendors_and_concepts_apart(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = ("hexcode", "annotation", "tags", "group", "subgroups", "skintone_base_hexcode")
    rows = [*ROWS, ("1F351", "peach", "fruit", "food-drink", "food-fruit", "")]
    table = json.dumps([dict(zip(fields, row, strict=True)) for row in rows]).encode()
    clear = np.zeros((64, 64, 4), np.uint8)
    big = io.BytesIO()
    Image.new("RGBA", (256, 256), (255, 0, 0, 128)).save(big, "webp")
    archives, codes = tmp_path / "archives", ("1f600", "1f44b-1f3ff", "1f351", "ffff")
    noto = {f"img/google/64/{code}.png": png(clear) for code in codes}
    twemoji = {f"img/twitter/64/{code}.png": png(clear) for code in codes}
    fluent = {f"assets/{code}.webp": big.getvalue() for code in (*codes, "1f600-fe0f")}
    for name, files in (
        ("NOTO", noto), ("TWEMOJI", twemoji), ("FLUENT", fluent), ("OPENMOJI", {"data/openmoji.json": table})
    ):  # fmt: skip
        monkeypatch.setattr(emoji, name, registered(getattr(emoji, name), files, archives))
    get("emoji", progress=False)
    assert keys(open_named("emoji:train")) == ["noto-1f44b-1f3ff", "noto-1f600", "fluent-1f44b-1f3ff", "fluent-1f600"]
    assert keys(open_named("emoji:test")) == ["noto-1f351", "fluent-1f351"]
    assert keys(open_named("emoji:twemoji")) == ["twemoji-1f351", "twemoji-1f44b-1f3ff", "twemoji-1f600"]
    assert keys(open_named("emoji:twemoji-heldout")) == ["twemoji-1f351"]
    first, last = open_named("emoji:train").read(0), open_named("emoji:train").read(3)
    assert first.label == "waving hand, dark skin tone" and len(first.captions) >= 5
    assert np.asarray(load_image(first.image)).min() == 255, "transparency is white"
    image = load_image(last.image)
    assert image.size == (128, 128) and np.abs(np.asarray(image).mean((0, 1)) - (255, 127, 127)).max() < 3
