"""Colour icons of 24 free sets, from Iconify's collection: drawn by resvg at 64 px, captioned by their names.

Emoji sets are left out, since the dataset `emoji` holds out a vendor and a tenth of the concepts. For that reason, an
icon is dropped if its captions contain the name of a held-out emoji concept as whole words (`names_held_out`), so that
classifying held-out emoji stays zero-shot. Sets of flags, logos and currency symbols are left out because their names
(country codes, trade marks) do not describe the image.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qlip.data.public import emoji
from qlip.data.public.builder import Builder, PublicDataset, in_share
from qlip.data.public.clipart import nearly_empty
from qlip.data.public.fetch import Package
from qlip.errors import QLIPError, require

PACKAGE = Package(
    "npm",
    "@iconify/json",
    "2.2.535",
    "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91",
    "per icon set",
)


@dataclass(frozen=True)
class IconSet:
    """A set of the collection.

    Attributes:
        prefix: its name in the collection.
        licence: expected licence; another one in the collection is an error.
        noise: last words of names that denote a variant, not the subject.
    """

    prefix: str
    licence: str
    noise: tuple[str, ...] = ()


SETS = (
    IconSet("catppuccin", "MIT"),
    IconSet("devicon", "MIT", ("wordmark", "original", "plain", "line")),
    IconSet("flat-color-icons", "MIT"),
    IconSet("flat-ui", "MIT"),
    IconSet("fluent-color", "MIT"),
    IconSet("gcp", "Apache-2.0"),
    IconSet("glyphs-poly", "MIT"),
    IconSet("icon-park", "Apache-2.0", ("one", "two", "three", "four", "five")),
    IconSet("k8s", "Apache-2.0"),
    IconSet("marketeq", "MIT"),
    IconSet("material-icon-theme", "MIT", ("light",)),
    IconSet("meteocons", "MIT", ("fill",)),
    IconSet("skill-icons", "MIT", ("dark", "light")),
    IconSet("streamline-color", "CC-BY-4.0", ("flat",)),
    IconSet("streamline-cyber-color", "CC-BY-4.0"),
    IconSet("streamline-flex-color", "CC-BY-4.0", ("flat",)),
    IconSet("streamline-freehand-color", "CC-BY-4.0"),
    IconSet("streamline-kameleon-color", "CC-BY-4.0", ("duo",)),
    IconSet("streamline-plump-color", "CC-BY-4.0", ("flat",)),
    IconSet("streamline-sharp-color", "CC-BY-4.0", ("flat",)),
    IconSet("streamline-stickies-color", "CC-BY-4.0", ("duo",)),
    IconSet("streamline-ultimate-color", "CC-BY-4.0"),
    IconSet("unjs", "Apache-2.0"),
    IconSet("vscode-icons", "MIT"),
)
LICENCE = "; ".join(f"{one.prefix}: {one.licence}" for one in SETS) + f"; {emoji.OPENMOJI.name}: names only"

SIDE = 64
TEST_SHARE = 50  # one name in fifty
GENERAL_NOISE = ("color", "colour", "icon", "icons", "logo")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")

Phrase = tuple[str, ...]


def build(builder: Builder) -> None:
    """Write train and test (one name in fifty, over all sets): PNG of 64 px with a transparent background.

    Raises:
        QLIPError: resvg_py is not installed, or the package holds something else than expected.
    """
    resvg = require("resvg_py", extra="icons")
    collection, openmoji = builder.fetch(PACKAGE), builder.fetch(emoji.OPENMOJI)
    held_out = names_held_out(openmoji / "data" / "openmoji.json")
    seen: set[bytes] = set()
    with builder.progress("writing icons", None) as advance:
        for icon_set in SETS:
            for name, svg in read_icons(collection, icon_set):
                advance(1)
                caption = caption_of(name, icon_set)
                captions = captions_of(caption)
                if not caption or any(contains(phrase_of(one), held_out) for one in captions):
                    continue
                try:
                    data = resvg.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
                except ValueError:
                    continue  # resvg cannot read a few icons of the collection
                pixels = on_white(data)
                digest = hashlib.sha256(pixels.tobytes()).digest()
                if nearly_empty(pixels) or digest in seen:
                    continue
                seen.add(digest)
                split = builder.split("test" if is_held_out(caption) else "train")
                split.add(f"{icon_set.prefix}-{name}", "png", data, captions, caption)


def read_icons(folder: Path, icon_set: IconSet) -> Iterator[tuple[str, str]]:
    """Name and SVG, square at 64 px, of the visible icons of a set, without aliases.

    Raises:
        QLIPError: the collection has no such set, or the set has another licence.
    """
    try:
        content = json.loads((folder / "json" / f"{icon_set.prefix}.json").read_text(encoding="utf-8"))
        licence, icons = content["info"]["license"]["spdx"], content["icons"]
    except (OSError, ValueError, KeyError):
        raise QLIPError(f"{PACKAGE.name}: holds no icon set {icon_set.prefix}") from None
    if licence != icon_set.licence:
        raise QLIPError(f"{PACKAGE.name}: {icon_set.prefix} is under {licence}, expected {icon_set.licence}")
    for name, icon in sorted(icons.items()):
        if not icon.get("hidden"):
            yield name, _square_svg(content | icon)


def _square_svg(icon: dict[str, Any]) -> str:
    """An icon in the middle of a square; missing sizes have Iconify's defaults."""
    width, height = icon.get("width", 16), icon.get("height", 16)
    side = max(width, height)
    left, top = icon.get("left", 0) - (side - width) / 2, icon.get("top", 0) - (side - height) / 2
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    view = f'width="{SIDE}" height="{SIDE}" viewBox="{left} {top} {side} {side}"'
    return f"<svg {spaces} {view}>{icon['body']}</svg>"


def caption_of(name: str, icon_set: IconSet) -> str:
    """Caption from an icon's name: ``cloud-flash-2`` -> ``cloud flash``; "" if nothing but noise is left."""
    words = [word for word in name.lower().split("-") if word]
    while words and (words[-1].isdecimal() or words[-1] in GENERAL_NOISE + icon_set.noise):
        words.pop()
    return " ".join(words)


def captions_of(caption: str) -> list[str]:
    """Captions of an icon, each with its name."""
    return [
        caption,
        f"an icon of {caption}",
        f"{caption} icon",
        f"a colour icon of {caption}",
        f"a drawing of {caption}",
    ]


def is_held_out(caption: str) -> bool:
    """True for a name whose icons are kept out of training, by SHA-256 of the caption."""
    return in_share(caption, TEST_SHARE)


def names_held_out(openmoji: Path) -> frozenset[Phrase]:
    """Names of the emoji concepts that are kept out of training, as phrases."""
    concepts = emoji.read_concepts(openmoji)
    return frozenset(phrase_of(one.name) for hexcode, one in concepts.items() if emoji.is_held_out(hexcode))


def phrase_of(text: str) -> Phrase:
    """Words of a text in lower case, without punctuation."""
    return tuple(_WORD.findall(text.lower()))


def contains(words: Phrase, phrases: frozenset[Phrase]) -> bool:
    """True if one of the phrases occurs as consecutive whole words."""
    spans = (words[start:stop] for start in range(len(words)) for stop in range(start + 1, len(words) + 1))
    return any(span in phrases for span in spans)


def on_white(data: bytes) -> Image.Image:
    """A PNG file as RGB on a white background."""
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


DATASET = PublicDataset(
    "icons",
    "colour icons of 64 px with their names, of 24 free sets; drawn by resvg_py (qlip[icons])",
    LICENCE,
    build,
    download=110_000_000,
    disk=60_000_000,
    splits={"train": "49 names in 50", "test": "1 name in 50, by hash"},
    packages=(PACKAGE,),
)
