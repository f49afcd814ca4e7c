"""Tux Paint's stamps: photographs and drawings with a sentence each. GPL-2: to measure on, not to bundle."""

from __future__ import annotations

from pathlib import Path

from qlip.data.public.builder import Builder, PublicDataset, encode, key_of
from qlip.data.public.clipart import nearly_empty, shrunk_on_white
from qlip.data.public.fetch import Package

PACKAGE = Package(
    "apt-get",
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    "GPL-2",
)
FOLDER = Path("usr/share/tuxpaint/stamps")


def build(builder: Builder) -> None:
    """Write test: stamps in white squares of at most 160 px, each with the English sentence beside it."""
    root = builder.fetch(PACKAGE) / FOLDER
    files = sorted(root.rglob("*.png"))
    with builder.progress("writing stamps", len(files)) as advance:
        for file in files:
            advance(1)
            sentence = sentence_of(file.with_suffix(".txt"))
            image = shrunk_on_white(file) if sentence else None
            if sentence is None or image is None or nearly_empty(image):
                continue
            key = key_of(str(file.relative_to(root).with_suffix("")))
            builder.split("test").add(key, "png", encode(image, "png"), [sentence])


def sentence_of(path: Path) -> str | None:
    """The first line of a stamp's text file, which is English; translations follow. None if there is no file."""
    try:
        first = path.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        return None
    return " ".join(first.split()) or None


DATASET = PublicDataset(
    "stamps",
    "Tux Paint's stamps: photographs and drawings of at most 160 px with a sentence each; for evaluation",
    PACKAGE.licence,
    build,
    download=161_000_000,
    disk=13_000_000,
    splits={"test": "about 780"},
    packages=(PACKAGE,),
)
