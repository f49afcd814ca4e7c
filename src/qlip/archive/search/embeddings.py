"""Read the embeddings of a token dataset as one matrix in blocks, and search it exactly.

Shapes: R rows of a dataset, Q queries, E numbers in an embedding, k neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlip.archive.dataset.completeness import warn_if_partial
from qlip.archive.dataset.layout import Layout, manifest_fingerprint
from qlip.archive.dataset.parquet_reader import Numbers, RowGroups, values_of
from qlip.errors import QLIPError
from qlip.runtime.progress import OnProgress, no_progress

Floats = NDArray[np.float32]
Found = tuple[Floats, Numbers]
"""Scores (Q, k), best first, and rows (Q, k); -inf and -1 if there are fewer than k."""

COLUMN = "embedding"
BLOCK = 8192
"""Rows per block."""
OVERSAMPLED = 8
"""A sample is drawn from row groups that hold so many times its rows, not from the whole dataset."""


class Vectors:
    """Embeddings by row; rows are numbered through the parts in order.

    Args:
        layout: of the dataset.

    Raises:
        QLIPError: no dataset, no finished part, or no embeddings in it.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout, self.info = layout, layout.read_info()
        self.entries = layout.manifest()
        warn_if_partial(layout, self.entries)
        if self.info.embedding_dim is None or self.info.text_fingerprint is None:
            raise QLIPError(f"{layout.address}: has no embeddings; run `qlip tokenize` with --embeddings")
        self.dim, self.text_fingerprint = self.info.embedding_dim, self.info.text_fingerprint
        self.groups = RowGroups(layout, self.info, self.entries)
        self.manifest_fingerprint = manifest_fingerprint(self.entries)

    def __len__(self) -> int:
        return len(self.groups)

    def blocks(self, first: int = 0, last: int | None = None, rows: int = BLOCK) -> Iterator[tuple[int, Floats]]:
        """Yield (number of the first row, float32 (n, E)) of consecutive rows, about `rows` at a time.

        Args:
            first, last: rows [first, last); all by default.

        Raises:
            QLIPError: a part is missing or damaged, or a row has no embedding.
        """
        held, count = list[Floats](), 0
        for piece in self._pieces(first, len(self) if last is None else last):
            held.append(piece)
            count += len(piece)
            if count >= rows:
                yield first, np.concatenate(held)
                first, held, count = first + count, [], 0
        if count:
            yield first, np.concatenate(held)

    def _pieces(self, first: int, last: int) -> Iterator[Floats]:
        """Yield the rows of each row group; parts without any of the rows are not read."""
        ends = self.groups.ends
        for part in range(int(np.searchsorted(ends, first, side="right")), len(ends)):
            begin = int(ends[part - 1]) if part else 0
            if begin >= last:
                return
            start = begin
            for group, end in enumerate(begin + self.groups.group_ends(part)):
                if start < last and end > first:
                    yield self._group(part, group)[max(0, first - start) : last - start]
                start = int(end)

    def at(self, rows: Numbers) -> Floats:
        """Return embeddings of rows, float32 (n, E), in the given order."""
        found = np.empty((len(rows), self.dim), np.float32)
        for places, part, group, inside in self.groups.scattered(rows):
            found[places] = self._group(part, group)[inside]
        return found

    def sample(self, count: int, seed: int = 0) -> Floats:
        """Draw the embeddings of `count` random rows, or of all rows if there are fewer; equal for equal seeds."""
        random, total = np.random.default_rng(seed), len(self)
        places = [
            (part, group) for part in range(len(self.entries)) for group in range(len(self.groups.group_ends(part)))
        ]
        taken: list[Floats] = []
        held, enough = 0, min(total, OVERSAMPLED * count)
        for place in random.permutation(len(places)):
            if held >= enough:
                break
            rows = self._group(*places[place])
            share = min(len(rows), -(-len(rows) * count // max(1, enough)))  # the row group's share of the sample
            taken.append(rows[random.choice(len(rows), share, replace=False)])
            held += len(rows)
        joined = np.concatenate(taken) if taken else np.empty((0, self.dim), np.float32)
        return joined[random.permutation(len(joined))[:count]]

    def _group(self, part: int, group: int) -> Floats:
        column = self.groups.table(part, group, [COLUMN]).column(COLUMN).combine_chunks()
        return self._numbers(column, part, group)

    def _numbers(self, column: Any, part: int, group: int) -> Floats:
        if column.null_count:
            raise QLIPError(f"{self.groups.path(part)}: {column.null_count} rows have no embedding; tokenize it again")
        numbers = values_of(column.flatten()).reshape(-1, self.dim).astype(np.float32)
        finite = np.isfinite(numbers).all(1)
        if not finite.all():
            inside = int(np.argmin(finite))
            key = self.groups.table(part, group, ["key"]).column("key")[inside].as_py()
            row = int(self.groups.group_ends(part)[group]) - len(numbers) + inside
            raise QLIPError(f"{self.groups.path(part)}: row {row:,} ({key}): embedding not finite; tokenize it again")
        return numbers


def exact(vectors: Vectors, queries: Floats, k: int, on_progress: OnProgress = no_progress) -> Found:
    """Find the k nearest rows of each query by inner product, comparing with all embeddings.

    Args:
        vectors: R rows.
        queries: (Q, E) float32, unit length.
        k: neighbours; ties go to the smaller row.
        on_progress: called with the rows of each block.
    """
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    for first, block in vectors.blocks():
        found = queries @ block.T  # (Q, n)
        numbers = np.broadcast_to(np.arange(first, first + len(block)), found.shape)
        scores, rows = best(np.concatenate([scores, found], 1), np.concatenate([rows, numbers], 1), k)
        on_progress(len(block))
    return scores, rows


def best(scores: Floats, rows: Numbers, k: int) -> Found:
    """Return the k largest of each query's scores (Q, n), best first, ties by the smaller row."""
    if scores.shape[1] > 4 * k:  # sorting a whole block would take longer than multiplying it
        kept = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        least = np.take_along_axis(scores, kept, 1).min(1, keepdims=True)
        if ((scores >= least).sum(1) == k).all():  # else ties at the border are sorted with the rest
            scores, rows = np.take_along_axis(scores, kept, 1), np.take_along_axis(rows, kept, 1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
