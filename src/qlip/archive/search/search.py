"""Images of a token dataset by words, by an image, or by one of its own: the rows of the nearest embeddings.

Shapes: E numbers in an embedding, k images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlip.archive.dataset.dataset import Row, TokenDataset
from qlip.archive.dataset.schema import DatasetInfo
from qlip.archive.search.embeddings import Floats, Vectors
from qlip.archive.search.index import HEAD, Finder, NearestIndex, Scan, index_folder, open_index
from qlip.errors import QLIPError, require

MOST = 16_384
"""Nearest rows that a search looks through for different images, unless more were asked for."""
TILES = 16
"""Nearest tiles per wanted image that a search of tiles begins with."""


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    Attributes:
        score: inner product of its embedding, of the view that fits best, with the query's: their cosine.
        number: of the row in the dataset.
        part: that the row is in.
        row: all that the dataset holds of it.
    """

    score: float
    number: int
    part: int
    row: Row


class Searcher:
    """A dataset that is asked for its nearest images; opened once, asked often.

    Args:
        address: of the dataset.
        index: its index's folder; ``index`` in the dataset's by default.
        scan: read all embeddings instead, also where there is an index.
        check: compare the index with its checksum first.

    Raises:
        QLIPError: no dataset, no embeddings in it, or an index that is damaged or of other rows.
    """

    def __init__(self, address: str, index: str | Path | None = None, scan: bool = False, check: bool = True) -> None:
        self.dataset = TokenDataset(address)
        self.vectors = Vectors(self.dataset.layout)
        self.finder: Finder = Scan(self.vectors)
        if not scan and (folder := self._folder(index)) is not None:
            self.finder = open_index(self.vectors, folder, check)

    @property
    def info(self) -> DatasetInfo:
        """The dataset's."""
        return self.dataset.info

    @property
    def index(self) -> NearestIndex | None:
        """The index, or None where all embeddings are read."""
        return self.finder if isinstance(self.finder, NearestIndex) else None

    def search(self, vector: Floats, k: int, without: tuple[int, str] | None = None) -> list[Hit]:
        """The k nearest images, best first; of an image's views, and of equal rows of one key, the best alone.

        Args:
            vector: (E,) unit length.
            k: at most so many; fewer where the dataset has no more, the index finds no more, or the nearest `MOST`
                rows, or k images' rows if they are more, hold no more that differ.
            without: (part, key) of an image that is left out.
        """
        views, count = self.info.views.count or TILES, len(self.vectors)
        wanted = min(count, (k + (without is not None)) * views)
        most = min(count, max(MOST, wanted))
        while True:
            scores, rows = self.finder.nearest(vector[None].astype(np.float32), wanted)
            there = rows[0] >= 0
            hits = self._pictures(scores[0][there], rows[0][there], k, without)
            if len(hits) == k or wanted == most or not there.all():  # an index that found fewer finds no more
                return hits
            wanted = min(most, 4 * wanted)

    def find(self, key: str) -> tuple[int, int]:
        """The first row of an image's, and its part.

        Raises:
            QLIPError: no image of that key.
        """
        compute, groups = require("pyarrow.compute", extra="tables"), self.dataset.groups
        for position in range(len(groups.parts)):
            first = int(groups.ends[position - 1]) if position else 0
            for group, end in enumerate(groups.group_ends(position).tolist()):
                column = groups.table(position, group, ["key"]).column("key")
                if (place := compute.index(column, key).as_py()) >= 0:
                    return first + end - len(column) + place, groups.parts[position]
        example = f"; its first is {self.dataset.keys([0])[0]!r}" if len(self.dataset) else ""
        raise QLIPError(f"{self.dataset.layout.address}: no picture has the key {key!r}{example}")

    def embedding(self, row: int) -> Floats:
        """Of a row, (E,) float32."""
        vector: Floats = self.vectors.at(np.array([row]))[0]
        return vector

    def _pictures(
        self, scores: Floats, rows: np.ndarray[tuple[int], np.dtype[np.int64]], k: int, without: tuple[int, str] | None
    ) -> list[Hit]:
        groups = self.dataset.groups
        parts = [groups.parts[at] for at in np.searchsorted(groups.ends, rows, side="right")]
        seen = set() if without is None else {without}
        chosen = []
        for place, name in enumerate(zip(parts, self.dataset.keys(rows), strict=True)):
            if name not in seen:
                seen.add(name)
                chosen.append(place)
        hits: list[Hit] = []
        known: set[tuple[str, bytes]] = set()
        for start in range(0, len(chosen), k):
            some = chosen[start : start + k]
            for place, row in zip(some, self.dataset.rows(rows[some]), strict=True):
                if (row.key, row.tokens) not in known:  # of datasets that were merged, an image may be there twice
                    known.add((row.key, row.tokens))
                    hits.append(Hit(float(scores[place]), int(rows[place]), parts[place], row))
            if len(hits) >= k:
                break
        return hits[:k]

    def _folder(self, index: str | Path | None) -> Path | None:
        """Of the index, where there is one; what was named must be there."""
        if index is not None:
            return index_folder(self.dataset.layout, index)
        try:
            folder = index_folder(self.dataset.layout)
        except QLIPError:
            return None  # the dataset is in a store
        return folder if (folder / HEAD).exists() else None


def some_words(dataset: TokenDataset, count: int, seed: int = 0) -> list[str]:
    """Different labels and captions of rows taken by chance, at most `count`, the same for a seed; may be none."""
    if not dataset.info.captions or not len(dataset):
        return []
    random = np.random.default_rng(seed)
    rows = np.sort(random.choice(len(dataset), min(len(dataset), 4 * count), replace=False))
    captions, labels = dataset.words(rows)
    words = dict.fromkeys(text.strip() for text in _each(captions, labels))
    chosen = [text for text in words if text]
    return [chosen[place] for place in random.permutation(len(chosen))[:count]]


def _each(captions: Sequence[Sequence[str]], labels: Sequence[str | None]) -> Iterator[str]:
    for texts, label in zip(captions, labels, strict=True):
        yield from texts
        if label:
            yield label
