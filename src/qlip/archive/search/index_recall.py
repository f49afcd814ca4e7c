"""What an approximate index finds of what exact search finds, and how far it has to look for that.

Shapes: R rows, E numbers in an embedding, Q queries, k neighbours.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from qlip.archive.search.embeddings import Floats, Vectors, exact
from qlip.archive.search.index import NEIGHBOURS, IndexInfo, NearestIndex, Recall, read_faiss
from qlip.runtime.progress import OnProgress, no_progress

EFFORTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
QUERIES = 200
NOISE = 0.5
"""Length of what is added to a unit vector to make a query: the cosine to the row it came from is about 0.9."""


def measured(
    info: IndexInfo,
    vectors: Vectors,
    folder: Path,
    least: float,
    words: Floats | None = None,
    on_progress: OnProgress = no_progress,
) -> IndexInfo:
    """The recall of an approximate index at growing effort, up to the one that reaches what was asked for.

    Args:
        info: the index's.
        vectors: R rows of the dataset.
        folder: of the index.
        least: recall@10 that is asked for, of images and of words.
        words: (Q, E) float32, unit length: texts to measure with too.
        on_progress: called with the rows that exact search has read.

    Returns:
        The same with what was measured; its effort is the smallest that does, or the largest of all.
    """
    pictures = picture_queries(vectors)
    queries = pictures if words is None else np.concatenate([pictures, words])
    k = min(NEIGHBOURS, len(vectors))
    truth, _ = exact(vectors, queries, k, on_progress)
    found: list[Recall] = []
    index = NearestIndex(info, read_faiss(folder, info))
    for effort in efforts(info):
        began = time.perf_counter()
        scores = np.concatenate([index.nearest(queries[[i]], k, effort)[0] for i in range(len(queries))])
        seconds = (time.perf_counter() - began) / len(queries)
        shares = recall(truth, scores)
        found.append(
            Recall(
                effort=effort,
                pictures=_mean(shares[: len(pictures)]),
                words=None if words is None else _mean(shares[len(pictures) :]),
                milliseconds=round(1000 * seconds, 4),
            )
        )
        if found[-1].least >= least:
            break
    asked = (len(pictures), 0 if words is None else len(words))
    return info.model_copy(update={"recall": tuple(found), "effort": found[-1].effort, "queries": asked})


def efforts(info: IndexInfo) -> list[int]:
    """All that are tried for an index of its kind and size, growing; the last looks as far as can be."""
    largest = info.parameters["lists"] if info.kind == "ivf" else EFFORTS[-1]
    least = NEIGHBOURS if info.kind == "hnsw" else 1
    return [one for one in EFFORTS if least <= one < largest] + [largest]


def is_set_for(info: IndexInfo, least: float) -> bool:
    """Whether an index looks just as far as measuring for such a recall would have it look."""
    if info.measured is None:
        return info.kind == "exact"
    reached = next((one for one in info.recall if one.least >= least), None)
    return info.effort == (efforts(info)[-1] if reached is None else reached.effort)


def picture_queries(vectors: Vectors, count: int = QUERIES, seed: int = 1) -> Floats:
    """Queries that are no rows: rows by chance, moved by noise, unit length; (Q, E) float32, the same for a seed."""
    rows = vectors.sample(count, seed)
    noise = np.random.default_rng(seed).standard_normal(rows.shape, np.float32)
    moved = rows + NOISE * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    queries: Floats = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    return queries


def recall(truth: Floats, found: Floats) -> Floats:
    """The share of each query's k nearest that was found, by scores, so that either of two equal rows will do.

    Args:
        truth: (Q, k), of exact search, best first.
        found: (Q, k).

    Returns:
        (Q,) in [0, 1].
    """
    shares: Floats = (found >= truth[:, -1:] - 1e-5).mean(1, dtype=np.float32)
    return shares


def _mean(shares: Floats) -> float:
    return round(float(shares.mean()), 4)
