"""Recall of an approximate index against exact search, and the smallest effort that reaches a given recall.

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
"""Length of the noise added to a unit vector: the cosine of query and row is about 0.9."""


def measure_recall(
    info: IndexInfo,
    vectors: Vectors,
    folder: Path,
    least: float,
    texts: Floats | None = None,
    on_progress: OnProgress = no_progress,
) -> IndexInfo:
    """Measure the recall of an approximate index at growing effort, up to the effort that reaches `least`.

    Args:
        info: the index's.
        vectors: R rows of the dataset.
        folder: of the index.
        least: recall@10 to reach, with images and with texts as queries.
        texts: (Q, E) float32, unit length: embeddings of texts to measure with too.
        on_progress: called with the rows that exact search has read.

    Returns:
        The info with the measurements; its effort is the smallest that reaches `least`, or else the largest.
    """
    images = noisy_queries(vectors)
    queries = images if texts is None else np.concatenate([images, texts])
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
                images=_mean(shares[: len(images)]),
                texts=None if texts is None else _mean(shares[len(images) :]),
                milliseconds=round(1000 * seconds, 4),
            )
        )
        if found[-1].least >= least:
            break
    asked = (len(images), 0 if texts is None else len(texts))
    return info.model_copy(update={"recall": tuple(found), "effort": found[-1].effort, "queries": asked})


def efforts(info: IndexInfo) -> list[int]:
    """Return the efforts to try for an index of its kind and size, ascending; the last one searches everything."""
    largest = info.parameters["lists"] if info.kind == "ivf" else EFFORTS[-1]
    least = NEIGHBOURS if info.kind == "hnsw" else 1
    return [one for one in EFFORTS if least <= one < largest] + [largest]


def is_set_for(info: IndexInfo, least: float) -> bool:
    """Return whether the effort of an index is the one that measuring for this recall would choose."""
    if info.measured is None:
        return info.kind == "exact"
    reached = next((one for one in info.recall if one.least >= least), None)
    return info.effort == (efforts(info)[-1] if reached is None else reached.effort)


def noisy_queries(vectors: Vectors, count: int = QUERIES, seed: int = 1) -> Floats:
    """Return random rows with noise added, of unit length, as queries: (Q, E) float32, equal for equal seeds."""
    rows = vectors.sample(count, seed)
    noise = np.random.default_rng(seed).standard_normal(rows.shape, np.float32)
    moved = rows + NOISE * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    queries: Floats = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    return queries


def recall(truth: Floats, found: Floats) -> Floats:
    """Share of each query's k nearest rows that was found, by scores, so that either of two equal rows counts.

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
