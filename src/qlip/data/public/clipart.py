"""Openclipart 0.18: public-domain drawings with title and keywords, as Debian packages them."""

from __future__ import annotations

import hashlib
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from qlip.data.public.builder import Builder, PublicDataset, encode, in_share, key_of, large_images_allowed, licences
from qlip.data.public.fetch import Package

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
MOST_PIXELS = 50_000_000
TEST_SHARE = 20  # one in twenty
LEAST_INK = 0.01  # share of pixels that are not nearly white
LEAST_SIDE = 16  # pixels
DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
RDF_ITEM = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"
COLLECTION = 9
"""Drawings that share a title, from which on it is taken for the name of their collection; the file name is used."""
EMPTY_WORDS = frozenset(
    [
        "",
        "hash",
        "unsorted",
        "duplicates",
        "clip art",
        "clipart",
        "image",
        "images",
        "none",
        "other",
        "various",
    ]
    + ["untitled", "unknown", "title", "theme", "icons", "lemon theme icon", "various cliparts"]
)


def build(builder: Builder) -> None:
    """Write train and test (one in twenty, by hash of the key): drawings in white squares of at most 160 px."""
    images = builder.fetch(PNG) / "usr" / "share" / "openclipart" / "png"
    drawings = builder.fetch(SVG) / "usr" / "share" / "openclipart" / "svg"
    files = [path.relative_to(images) for path in sorted(images.rglob("*.png"))]
    files = [path for path in files if path.parts[0] not in DROPPED_FOLDERS]
    annotations = read_annotations(drawings, files, builder)
    seen: set[bytes] = set()
    twins: Counter[str] = Counter()
    with builder.progress("writing clipart", len(files)) as advance:
        for file in files:
            advance(1)
            image = shrunk_on_white(images / file)
            if image is None or nearly_empty(image):
                continue
            digest = hashlib.sha256(image.tobytes()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            title, keywords = annotations[file]
            key = key_of(str(file).lower().removesuffix(".png"))
            twins[key] += 1  # a few names differ only in punctuation, such as view+ and view-
            split = builder.split("test" if is_held_out(key) else "train")
            name = key if twins[key] == 1 else f"{key}-twin-{twins[key]}"
            split.add(name, "png", encode(image, "png"), captions_of(title, keywords), title)


def is_held_out(key: str) -> bool:
    """True for a drawing kept out of training, by SHA-256 of its key."""
    return in_share(key, TEST_SHARE)


def shrunk_on_white(path: Path) -> Image.Image | None:
    """The drawing in a white square of at most `STORED_SIZE` px; None if opening it would take a gigabyte.

    Square, because a crop of a pencil or a necktie hardly shows what its caption says.
    """
    with large_images_allowed(), Image.open(path) as opened:
        if opened.width * opened.height > MOST_PIXELS:
            return None
        image = opened.convert("RGBA")
    image.thumbnail((STORED_SIZE, STORED_SIZE), Image.Resampling.LANCZOS)
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert("RGB")


def nearly_empty(image: Image.Image) -> bool:
    """True for an image with almost no ink, or a very narrow one."""
    ink = np.asarray(image.convert("L")) < 245
    return bool(ink.mean() < LEAST_INK or min(image.size) < LEAST_SIDE)


def read_annotations(drawings: Path, files: list[Path], builder: Builder) -> dict[Path, tuple[str, list[str]]]:
    """Title and keywords of each drawing, from the metadata of the SVG of the same path."""
    found = {}
    with builder.progress("reading titles", len(files)) as advance:
        for file in files:
            advance(1)
            found[file] = read_metadata(drawings / file.with_suffix(".svg"))
    shared = Counter(title for title, _ in found.values())
    annotations = {}
    for file, (title, keywords) in found.items():
        if title in EMPTY_WORDS or "@" in title or shared[title] >= COLLECTION:
            title = clean(file.stem) or clean(file.parent.name)
        annotations[file] = (title, [word for word in keywords if word != title])
    return annotations


def read_metadata(path: Path) -> tuple[str, list[str]]:
    """The Dublin Core title and subjects of an SVG file, cleaned; both may be empty."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError):
        return "", []
    title = root.find(f".//{DUBLIN_CORE}title")
    subject = root.find(f".//{DUBLIN_CORE}subject")
    items = [] if subject is None else [clean(item.text or "") for item in subject.iter(RDF_ITEM)]
    keywords = [word for word in dict.fromkeys(items) if word not in EMPTY_WORDS and not word.startswith("0x")]
    return ("" if title is None else clean(title.text or "")), keywords


def clean(text: str) -> str:
    """Lower-case words without underscores, counters and the boilerplate of one prolific author."""
    text = text.lower().replace("_", " ").removeprefix("clipart by nicu buculei - ")
    text = re.sub(r"[\s\d.\-]+$", "", text.strip())
    return " ".join(text.split())


def captions_of(title: str, keywords: list[str]) -> list[str]:
    """Captions of a drawing, each with its title."""
    captions = [title, f"a drawing of {title}", f"clip art of {title}"]
    captions += [f"{title}, {', '.join(keywords[first : first + 3])}" for first in range(0, min(len(keywords), 6), 3)]
    return captions


DATASET = PublicDataset(
    "clipart",
    "Openclipart drawings of at most 160 px with title and keywords",
    licences(PNG, SVG),
    build,
    download=156_000_000,
    disk=60_000_000,
    splits={"train": "19 in 20", "test": "1 in 20, by hash of the key"},
    packages=(PNG, SVG),
)
