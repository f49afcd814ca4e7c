"""Search a token dataset for the images with the nearest embeddings.

Shapes: E numbers in an embedding, k images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qlip.archive.dataset.dataset import Row, TokenDataset
from qlip.archive.dataset.schema import DatasetInfo
from qlip.archive.search.embeddings import Floats, Vectors
from qlip.archive.search.index import HEAD, Finder, NearestIndex, Scan, index_folder, open_index
from qlip.errors import QLIPError, check_integer, require

MAX_ROWS = 16_384
"""Nearest rows that a search examines for different images, unless more are asked for."""
TILES = 16
"""Nearest tiles per wanted image that a search of tiles begins with."""


@dataclass(frozen=True)
class Hit:
    """Image that was found.

    Attributes:
        score: cosine of query and embedding, of the best view.
        number: number of the row in the dataset.
        part: number of the row's part.
        row: columns of the row.
    """

    score: float
    number: int
    part: int
    row: Row


class Searcher:
    """Search in a dataset; opened once for many queries.

    Args:
        address: of the dataset.
        index: folder of its index; ``index`` in the dataset's folder by default.
        scan: read all embeddings even if there is an index.
        check: compare the index with its checksum.

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
        """Description of the dataset."""
        return self.dataset.info

    @property
    def index(self) -> NearestIndex | None:
        """The index, or None if all embeddings are read."""
        return self.finder if isinstance(self.finder, NearestIndex) else None

    def search(self, vector: Floats, k: int, without: tuple[int, str] | None = None) -> list[Hit]:
        """Find the k nearest images, best first; views of an image and equal rows of one key count once.

        Args:
            vector: (E,) numbers of unit length: an array, a tensor or a list.
            k: maximal number. Fewer are found if the dataset has no more, the index finds no more, or the nearest
                `MAX_ROWS` rows (or k images' rows, if these are more) hold fewer different images.
            without: (part, key) of an image to leave out.

        Raises:
            QLIPError: not a vector of the dataset's width, one with NaN or infinity, or a row with such an embedding.
        """
        k, query = check_integer("k", k), self._query(vector)
        views, count = self.info.views.count or TILES, len(self.vectors)
        wanted = min(count, (k + (without is not None)) * views)
        most = min(count, max(MAX_ROWS, wanted))
        while True:
            scores, rows = self.finder.nearest(query[None], wanted)
            there = rows[0] >= 0
            hits = self._hits(scores[0][there], rows[0][there], k, without)
            if len(hits) == k or wanted == most or not there.all():  # the index finds no more
                return hits
            wanted = min(most, 4 * wanted)

    def find(self, key: str) -> tuple[int, int]:
        """Find the first row of a key; returns its number and its part.

        Raises:
            QLIPError: no image has that key.
        """
        if not isinstance(key, str):
            raise QLIPError(f"{self.dataset.layout.address}: a key is a string, not {type(key).__name__}")
        compute, groups = require("pyarrow.compute", extra="tables"), self.dataset.groups
        for position in range(len(groups.parts)):
            first = int(groups.ends[position - 1]) if position else 0
            for group, end in enumerate(groups.group_ends(position).tolist()):
                column = groups.table(position, group, ["key"]).column("key")
                if (place := compute.index(column, key).as_py()) >= 0:
                    return first + end - len(column) + place, groups.parts[position]
        example = f"; its first is {self.dataset.keys([0])[0]!r}" if len(self.dataset) else ""
        raise QLIPError(f"{self.dataset.layout.address}: no image has the key {key!r}{example}")

    def embedding(self, row: int) -> Floats:
        """Return the embedding of a row, (E,) float32.

        Raises:
            QLIPError: no such row, or its embedding is missing or not finite.
        """
        row, count = check_integer("row", row, 0), len(self.vectors)
        if row >= count:
            raise QLIPError(f"{self.dataset.layout.address}: row {row:,} of {count:,}; count from 0 to {count - 1:,}")
        vector: Floats = self.vectors.at(np.array([row]))[0]
        return vector

    def _query(self, vector: object) -> Floats:
        width = self.vectors.dim
        if isinstance(vector, torch.Tensor):
            vector = vector.detach().cpu().float()
        try:
            numbers = np.asarray(vector)
            query: Floats = numbers.astype(np.float32)
            if numbers.dtype.kind not in "fiu":  # text and objects
                raise TypeError
        except (TypeError, ValueError):
            hint = "; embed a text with ImageCodec.embed_texts" if isinstance(vector, str) else ""
            raise QLIPError(f"a query is a vector of {width} numbers, not {type(vector).__name__}{hint}") from None
        if query.shape != (width,):
            raise QLIPError(f"a query is a vector of {width} numbers, not an array of shape {query.shape}")
        if not np.isfinite(query).all():
            raise QLIPError(f"the query has a value that is not finite, at {int(np.argmin(np.isfinite(query)))}")
        return query

    def _hits(
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
                if (row.key, row.tokens) not in known:  # a merged dataset may hold an image twice
                    known.add((row.key, row.tokens))
                    hits.append(Hit(float(scores[place]), int(rows[place]), parts[place], row))
            if len(hits) >= k:
                break
        return hits[:k]

    def _folder(self, index: str | Path | None) -> Path | None:
        """Return the folder of the index, if there is one; a folder that was given must exist."""
        if index is not None:
            return index_folder(self.dataset.layout, index)
        try:
            folder = index_folder(self.dataset.layout)
        except QLIPError:
            return None  # the dataset is in a store
        return folder if (folder / HEAD).exists() else None


def sample_texts(dataset: TokenDataset, count: int, seed: int = 0) -> list[str]:
    """Draw at most `count` different labels and captions of random rows; equal for equal seeds."""
    if not dataset.info.captions or not len(dataset):
        return []
    random = np.random.default_rng(seed)
    rows = np.sort(random.choice(len(dataset), min(len(dataset), 4 * count), replace=False))
    captions, labels = dataset.captions_and_labels(rows)
    texts = dict.fromkeys(text.strip() for text in _each(captions, labels))
    chosen = [text for text in texts if text]
    return [chosen[place] for place in random.permutation(len(chosen))[:count]]


def _each(captions: Sequence[Sequence[str]], labels: Sequence[str | None]) -> Iterator[str]:
    for texts, label in zip(captions, labels, strict=True):
        yield from texts
        if label:
            yield label
