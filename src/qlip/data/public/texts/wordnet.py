"""Glosses and examples of WordNet 3.0, in sentences, from Debian's package `wordnet-base`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from qlip.data.public.builder import Builder, PublicDataset, in_share
from qlip.data.public.fetch import Package
from qlip.errors import QLIPError

PACKAGE = Package(
    "apt-get",
    "wordnet-base",
    "1:3.0-37",
    "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    "WordNet 3.0: free for any purpose, with its notice on every copy",
)
FOLDER = Path("usr/share/wordnet")
FILES = ("noun", "verb", "adj", "adv")
HELD_OUT = 50
"""One set of synonyms in so many is held out."""

_MARKER = re.compile(r"\((?:a|p|ip)\)$")
"""Behind an adjective: where it may stand."""
_EXAMPLES = re.compile(r';\s*(?=")')


def build(builder: Builder) -> None:
    """Write train and test: a document per set of synonyms."""
    folder = builder.fetch(PACKAGE)
    with builder.progress("reading WordNet", None):
        for part in FILES:
            for key, text in documents(folder / FOLDER / f"data.{part}"):
                builder.add_text("test" if in_share(key, HELD_OUT) else "train", key, text)
    builder.add_licence(folder / "usr/share/doc/wordnet-base/copyright")


def documents(path: Path) -> Iterator[tuple[str, str]]:
    """Iterate over the sets of synonyms of a file: kind and number, and text.

    Raises:
        QLIPError: a line is not WordNet's.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("  "):  # the licence
            continue
        try:
            fields, gloss = line.split(" | ", 1)
            offset, _, kind, count, *rest = fields.split()
            words = [_MARKER.sub("", word).replace("_", " ") for word in rest[: 2 * int(count, 16) : 2]]
        except ValueError:
            raise QLIPError(f"{path.name}: line {number:,} is not a set of synonyms of WordNet") from None
        yield f"{kind}{offset}", document(words, gloss)


def document(words: list[str], gloss: str) -> str:
    """Text of a set of synonyms: its words, its gloss, and its examples without quotes, each a sentence."""
    definition, *examples = _EXAMPLES.split(gloss.strip().rstrip(";"))
    sentences = [definition, *(one.replace('"', "") for one in examples)]
    ended = (one if one.endswith((".", "!", "?")) else f"{one}." for one in map(str.strip, sentences) if one)
    return f"{', '.join(words)}: {' '.join(ended)}"


DATASET = PublicDataset(
    "wordnet",
    "Glosses and examples of WordNet 3.0: short English sentences, like captions; texts alone, no images",
    PACKAGE.licence,
    build,
    download=6_500_000,
    disk=15_600_000,
    texts={"train": "about 115,000 glosses", "test": "about 2,400"},
    packages=(PACKAGE,),
)
