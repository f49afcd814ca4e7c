"""Emoji: Noto and Fluent to train on; Twemoji is a held-out vendor, and a tenth of the concepts is held out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qlip.data.public.builder import Builder, PublicDataset, encode, in_share, licences
from qlip.data.public.fetch import Package

NOTO = Package(
    "npm",
    "emoji-datasource-google",
    "16.0.0",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "package MIT; Noto Emoji Apache-2.0",
)
TWEMOJI = Package(
    "npm",
    "emoji-datasource-twitter",
    "16.0.0",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "package MIT; Twemoji CC-BY-4.0",
)
FLUENT = Package(
    "npm",
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "MIT",
)
OPENMOJI = Package(
    "npm",
    "openmoji",
    "17.0.0",
    "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    "names and tags CC-BY-SA-4.0; its images are not used",
)

STORED_SIZE = 128
HELD_OUT_SHARE = 10
SKIN_TONES = {f"1F3F{code}" for code in "BCDEF"}
VARIATION_SELECTOR = "FE0F"
STYLES = {"noto": "a flat drawing of", "twemoji": "a flat drawing of", "fluent": "a 3d picture of"}


@dataclass(frozen=True)
class Concept:
    """Meaning of an emoji: its name with skin tone ("waving hand, dark skin tone"), tags, and a group."""

    name: str
    tags: tuple[str, ...]
    group: str


def build(builder: Builder) -> None:
    """Write train and test (Noto and Fluent), twemoji (all) and twemoji-heldout (its held-out concepts)."""
    noto, twemoji, fluent, openmoji = (builder.fetch(package) for package in (NOTO, TWEMOJI, FLUENT, OPENMOJI))
    concepts = read_concepts(openmoji / "data" / "openmoji.json")
    images = {
        "noto": sorted((noto / "img" / "google" / "64").glob("*.png")),
        "fluent": sorted((fluent / "assets").glob("*.webp")),
        "twemoji": sorted((twemoji / "img" / "twitter" / "64").glob("*.png")),
    }
    seen = set()
    with builder.progress("writing emoji", sum(map(len, images.values()))) as advance:
        for vendor, paths in images.items():
            for path in paths:
                advance(1)
                hexcode = normal_hexcode(path.stem)
                if hexcode in concepts and (vendor, hexcode) not in seen:  # an image may be there with and without FE0F
                    seen.add((vendor, hexcode))
                    _add(builder, vendor, path, hexcode, concepts[hexcode])


def _add(builder: Builder, vendor: str, path: Path, hexcode: str, concept: Concept) -> None:
    suffix, data = _stored(path)
    captions = captions_of(concept, vendor)
    held_out = is_held_out(hexcode)
    if vendor == "twemoji":
        splits = ["twemoji", "twemoji-heldout"] if held_out else ["twemoji"]
    else:
        splits = ["test" if held_out else "train"]
    for split in splits:
        builder.split(split).add(f"{vendor}-{hexcode.lower()}", suffix, data, captions, concept.name)


def _stored(path: Path) -> tuple[str, bytes]:
    """Suffix and bytes: the file itself if it is small, else shrunk. Transparency stays, and is white when read."""
    with Image.open(path) as image:
        if max(image.size) <= STORED_SIZE:
            return path.suffix[1:], path.read_bytes()
        small = image.convert("RGBA").resize((STORED_SIZE, STORED_SIZE), Image.Resampling.LANCZOS)
        return "webp", encode(small, "webp")


def normal_hexcode(hexcode: str) -> str:
    """A hexcode in upper case, without variation selectors, which vendors put in or leave out."""
    return "-".join(part for part in hexcode.upper().split("-") if part != VARIATION_SELECTOR)


def is_held_out(hexcode: str) -> bool:
    """True for a concept, of any tone and vendor, kept out of training, by SHA-256 of its hexcode."""
    base = "-".join(part for part in normal_hexcode(hexcode).split("-") if part not in SKIN_TONES)
    return in_share(base, HELD_OUT_SHARE)


def read_concepts(path: Path) -> dict[str, Concept]:
    """OpenMoji's concepts by normal hexcode, without the emoji that only OpenMoji has."""
    return dict(_concepts(json.loads(path.read_text(encoding="utf-8"))))


def _concepts(rows: list[dict[str, str]]) -> Iterator[tuple[str, Concept]]:
    tags_by_hexcode = {row["hexcode"]: row["tags"] for row in rows}
    for row in rows:
        if row["group"].startswith("extras"):
            continue
        listed = row["tags"] or tags_by_hexcode.get(row["skintone_base_hexcode"], "")
        tags = dict.fromkeys(tag.strip().lower() for tag in listed.split(",") if tag.strip())
        name = natural_name(row["annotation"])
        group = row["subgroups"].replace("-", " ")
        yield normal_hexcode(row["hexcode"]), Concept(name, tuple(tag for tag in tags if tag not in name), group)


def natural_name(annotation: str) -> str:
    """Turn "flag: Italy" into "flag of italy", and "waving hand: dark skin tone" into "waving hand, dark skin tone"."""
    name, colon, rest = annotation.lower().replace("\u2019", "'").partition(": ")
    if not colon:
        return name
    return f"flag of {rest}" if name == "flag" else f"{name} {rest}" if name == "keycap" else f"{name}, {rest}"


def captions_of(concept: Concept, vendor: str) -> list[str]:
    """Captions of an emoji; each holds its name, so that none fits another emoji."""
    name, tags = concept.name, concept.tags
    captions = [
        name,
        f"an emoji of {name}",
        f"{name} emoji",
        f"{STYLES[vendor]} {name}",
        f"{name}, {concept.group}",
    ]
    captions += [f"{name}, {', '.join(tags[first : first + 3])}" for first in range(0, min(len(tags), 9), 3)]
    return list(dict.fromkeys(captions))


DATASET = PublicDataset(
    "emoji",
    "Noto, Fluent and Twemoji images of 64 to 128 px with names and tags",
    licences(NOTO, TWEMOJI, FLUENT, OPENMOJI),
    build,
    download=156_000_000,
    disk=60_000_000,
    splits={
        "train": "Noto and Fluent, nine concepts in ten",
        "test": "Noto and Fluent, every tenth concept: none was trained on",
        "twemoji": "all of Twemoji: a vendor that was not trained on",
        "twemoji-heldout": "Twemoji, every tenth concept: neither vendor nor concept was trained on",
    },
    packages=(NOTO, TWEMOJI, FLUENT, OPENMOJI),
)
