"""An Anarchist FAQ, from Debian's package `anarchism`: essays of one subject. GPL-2: to measure on, not to bundle."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from qlip.data.public.builder import Builder, PublicDataset, in_share
from qlip.data.public.fetch import Package

PACKAGE = Package(
    "apt-get",
    "anarchism",
    "15.3-3",
    "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
    "GPL-2, the texts too",
)
FOLDER = Path("usr/share/doc/anarchism")
PROSE = re.compile(r"intro|vol\d|10years|append|sec")
"""Beginnings of the names of pages that are no lists of links or books."""
HELD_OUT = 10
"""One page in so many is held out."""


def build(builder: Builder) -> None:
    """Write train and test: a document per page."""
    folder = builder.fetch(PACKAGE) / FOLDER
    for path in sorted((folder / "html").glob("*.html")):
        if PROSE.match(path.stem):
            text = text_of(path.read_text(encoding="utf-8"))
            builder.add_text("test" if in_share(path.stem, HELD_OUT) else "train", path.stem, text)
    builder.add_licence(folder / "copyright")


def text_of(page: str) -> str:
    """Headings and paragraphs of a page, with an empty line between, without the links to other pages at its end."""
    parser = _Prose()
    parser.feed(page)
    parser.close()
    return "\n\n".join(found for block in "".join(parser.parts).split("\f") if (found := " ".join(block.split())))


class _Prose(HTMLParser):
    """Collects the text of a page's body, with a form feed where a block begins or ends."""

    BLOCKS = frozenset("h1 h2 h3 p li blockquote div td th tr br dt hr center table ul ol".split())
    NAVIGATION = "book-navigation"

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts = list[str]()
        self._hidden = True

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body":
            self._hidden = False
        elif tag == "div" and self.NAVIGATION in (dict(attrs).get("class") or ""):
            self._hidden = True  # up to the end of the page
        elif tag in self.BLOCKS:
            self.parts.append("\f")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.BLOCKS:
            self.parts.append("\f")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


DATASET = PublicDataset(
    "anarchism",
    "An Anarchist FAQ: English essays of one subject (GPL-2: to measure on, not to bundle); texts alone, no images",
    PACKAGE.licence,
    build,
    download=6_900_000,
    disk=11_400_000,
    texts={"train": "about 120 pages", "test": "about 13"},
    packages=(PACKAGE,),
)
