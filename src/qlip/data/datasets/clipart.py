"""Openclipart 0.18: public-domain drawings with title and keywords, as Debian packages them."""

from __future__ import annotations

import hashlib
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from PIL import Image

from qlip.data.datasets.fetch import Package, fetch_package, unpack
from qlip.data.datasets.pictures import encode
from qlip.data.datasets.store import Builder

PNG = Package(
    "apt-get",
    "openclipart-png",
    "1:0.18+dfsg-19",
    "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    "public domain",
)
SVG = Package(
    "apt-get",
    "openclipart-svg",
    "1:0.18+dfsg-19",
    "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    "public domain",
)

STORED_SIZE = 160
DROPPED_FOLDERS = ("shapes", "special")
TEST_SHARE = 20  # one in twenty
LEAST_INK = 0.01  # share of pixels that are not white
DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
RDF_ITEM = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"
EMPTY_WORDS = {
    "", "unsorted", "duplicates", "clip art", "clipart", "image", "images", "media", "public domain", "png", "svg",
    "externalsource", "none", "other", "untitled", "unknown", "title", "openclipart", "open clip art", "keyword",
}  # fmt: skip


def build(builder: Builder) -> None:
    """Write train and test (a twentieth, by hash of the key): drawings on white of at most 160 px."""
    roots = []
    for package in (PNG, SVG):
        fetched = fetch_package(package, builder.raw, builder.report)
        builder.sources.append(fetched)
        roots.append(unpack(fetched.path, builder.raw / package.name) / "usr" / "share" / "openclipart")
    pictures, drawings = roots[0] / "png", roots[1] / "svg"
    paths = sorted(path for path in pictures.rglob("*.png"))
    seen: set[bytes] = set()
    with builder.report.task("writing clipart", len(paths)) as tick:
        for path in paths:
            tick(1)
            relative = path.relative_to(pictures)
            if relative.parts[0] in DROPPED_FOLDERS:
                continue
            image = shrunk_on_white(path)
            digest = hashlib.sha256(image.tobytes()).digest()
            if nearly_empty(image) or digest in seen:
                continue
            seen.add(digest)
            title, words = read_metadata(drawings / relative.with_suffix(".svg"), relative)
            key = re.sub(r"[^a-z0-9]+", "-", str(relative.with_suffix("")).lower()).strip("-")
            held_out = hashlib.sha256(key.encode()).digest()[0] * 256 // 256 % TEST_SHARE == 0
            builder.split("test" if held_out else "train").add(
                key, "png", encode(image, "png"), captions_of(title, words), title
            )
