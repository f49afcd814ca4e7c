"""Tux Paint's stamps: photographs and drawings with a sentence each. GPL-2: to measure on, not to bundle."""

from __future__ import annotations

import re
from pathlib import Path

from qlip.data.public.cache import Builder
from qlip.data.public.clipart import nearly_empty, shrunk_on_white
from qlip.data.public.fetch import Package, fetch_package, unpack
from qlip.data.public.images import encode

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
    fetched = fetch_package(PACKAGE, builder.raw, builder.report)
    builder.sources.append(fetched)
    root = unpack(fetched.path, builder.raw / PACKAGE.name) / FOLDER
    files = sorted(root.rglob("*.png"))
    with builder.report.task("writing stamps", len(files)) as tick:
        for file in files:
            tick(1)
            sentence = sentence_of(file.with_suffix(".txt"))
            image = shrunk_on_white(file) if sentence else None
            if sentence is None or image is None or nearly_empty(image):
                continue
            key = re.sub(r"[^a-z0-9]+", "-", str(file.relative_to(root).with_suffix("")).lower()).strip("-")
            builder.split("test").add(key, "png", encode(image, "png"), [sentence])


def sentence_of(path: Path) -> str | None:
    """The first line of a stamp's text file, which is English; translations follow. None without one."""
    try:
        first = path.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        return None
    return " ".join(first.split()) or None
