"""Cost and recall of search indexes: ``python -m benchmarks.search --dataset tokens``.

For each size and kind of index: bytes per row, seconds to build, recall@10 relative to exact search, and milliseconds
per query, with and without reading the rows of the images found; and the same for a scan without an index.

Embeddings are random rows of a dataset with added noise, as many as each size needs; without --dataset they come from a
mixture of 500 clusters. Text queries need a dataset with captions and the model that made it. No other program should
run on the machine.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks import measure
from benchmarks.report import publish
from qlip import QLIPModel, QLIPProcessor
from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.layout import Layout
from qlip.archive.dataset.schema import DatasetInfo, arrow_schema
from qlip.archive.manage.decode import check_model
from qlip.archive.search.build_index import Build, build
from qlip.archive.search.embeddings import Floats, Vectors
from qlip.archive.search.index import FOLDER, IndexInfo, Kind
from qlip.archive.search.index_recall import noisy_queries
from qlip.archive.search.search import Searcher, sample_texts

PAGE = Path(__file__).parents[1] / "docs" / "search.md"
BEGIN, END = "<!-- search: begin -->", "<!-- search: end -->"
SIZES, TINY = (10_000, 60_000, 200_000, 1_000_000), (1500, 3000)
PART, TOKENS = 10_000, (8, 8, 28)
NOISE, CLUSTERS = 0.3, 500
FOUND = 16
"""Number of images that a search returns."""


@dataclass(frozen=True)
class Measured:
    """One row of the table; times in seconds, medians over queries."""

    rows: int
    kind: str
    info: IndexInfo | None
    nearest: float
    whole: float
    opening: float


def main() -> None:
    """Measure, print the table, and write the files that were asked for."""
    options = _options()
    measure.prepare(options.threads, options.tiny)
    lines = tables(options.dataset, options.rows, options.dim, options.queries)
    publish(f"medians of {options.queries} queries", lines, PAGE, BEGIN, END, options.write)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--dataset", metavar="DIR", help="token dataset to take embeddings from (default: a random mixture)"
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", metavar="N", help=f"index sizes in rows (default: {' '.join(map(str, SIZES))})"
    )
    parser.add_argument("--dim", type=int, default=128, help="size of random embeddings (default: 128)")
    parser.add_argument("--queries", type=int, default=50, help="timed searches per index (default: 50)")
    parser.add_argument("--tiny", action="store_true", help="use few rows, to test the benchmark itself")
    parser.add_argument("--threads", type=int, help="number of PyTorch threads (default: chosen by PyTorch)")
    parser.add_argument("--write", action="store_true", help="write the table to docs/search.md")
    options = parser.parse_args()
    options.rows = options.rows or (TINY if options.tiny else SIZES)
    return options


def tables(dataset: str | None, sizes: Sequence[int], dim: int, queries: int) -> Iterator[str]:
    """Measure each index, and make the lines of the table."""
    source, texts = _source(dataset, dim)
    origin = "a random mixture" if dataset is None else f"the embeddings of {Path(dataset).name}, with noise"
    yield f"{source.shape[1]} numbers per embedding, {origin}; tokens are 224 bytes per image in addition."
    yield ""
    yield (
        "| rows | index | bytes per row | built in, s | opened in, ms | recall@10, images | text | effort"
        " | nearest rows, ms | with the images' rows, ms |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for rows in sizes:
        folder = Path(tempfile.mkdtemp(prefix="qlip-search-"))
        try:
            layout = grown(folder / "tokens", source, rows)
            for one in measured(layout, texts, queries):
                yield _line(one)
        finally:
            shutil.rmtree(folder)


def measured(layout: Layout, texts: Floats | None, queries: int) -> Iterator[Measured]:
    """Measure each kind of index over a dataset, and a scan without one."""
    vectors = Vectors(layout)
    query_rows = noisy_queries(vectors, queries, seed=2)
    kinds: tuple[Kind, ...] = ("exact", "hnsw", "ivf")
    for kind in kinds:
        info = build(vectors, what=Build(kind=kind, texts=texts))
        yield _timed(layout, info, query_rows)
        shutil.rmtree(Path(layout.address) / FOLDER)
    yield _timed(layout, None, query_rows[: max(1, queries // 10)])


def _timed(layout: Layout, info: IndexInfo | None, query_rows: Floats) -> Measured:
    began = time.perf_counter()
    searcher = Searcher(layout.address, scan=info is None)
    opening = time.perf_counter() - began
    nearest, whole = [], []
    for query in query_rows:
        began = time.perf_counter()
        searcher.finder.nearest(query[None], FOUND)
        nearest.append(time.perf_counter() - began)
    for query in query_rows:
        began = time.perf_counter()
        searcher.search(query, FOUND)
        whole.append(time.perf_counter() - began)
    kind = "none (scan)" if info is None else info.kind
    return Measured(len(searcher.vectors), kind, info, measure.median(nearest), measure.median(whole), opening)


def _line(one: Measured) -> str:
    info, recall = one.info, None if one.info is None else one.info.measured
    cells = [f"{one.rows:,}", one.kind]
    cells += ["-", "-"] if info is None else [f"{info.bytes / info.count:.0f}", f"{info.seconds:.1f}"]
    cells.append(f"{1000 * one.opening:.0f}")
    if recall is None:
        cells += ["exact", "exact", "-"]
    else:
        effort = {"hnsw": "efSearch", "ivf": "nprobe"}[one.kind]
        text_recall = "-" if recall.texts is None else f"{recall.texts:.1%}"
        cells += [f"{recall.images:.1%}", text_recall, f"{effort} {recall.effort}"]
    cells += [f"{1000 * one.nearest:.2f}", f"{1000 * one.whole:.1f}"]
    return f"| {' | '.join(cells)} |"


def _source(dataset: str | None, dim: int) -> tuple[Floats, Floats | None]:
    """Return embeddings to draw from, and embeddings of captions as queries."""
    if dataset is None:
        random = np.random.default_rng(0)
        centres = random.standard_normal((CLUSTERS, dim), np.float32)
        return _unit(centres[random.integers(0, CLUSTERS, 20_000)] + _noise(random, 20_000, dim, 4.0)), None
    tokens = TokenDataset(dataset)
    vectors = Vectors(tokens.layout).sample(100_000)
    texts = sample_texts(tokens, 200)
    if not texts:
        return vectors, None
    model, processor = QLIPModel.from_pretrained(tokens.info.model), QLIPProcessor.from_pretrained(tokens.info.model)
    check_model(tokens.info, dataset, model.eval(), processor, tokens.info.model, ["text"])
    text = processor(text=texts)
    features = model.get_text_features(text["input_ids"], text["attention_mask"]).detach().float().numpy()
    return vectors, _unit(features)


def grown(folder: Path, source: Floats, rows: int) -> Layout:
    """Write a dataset of random tokens with embeddings near those of the source."""
    random, dim = np.random.default_rng(1), source.shape[1]
    height, width, bits = TOKENS
    info = DatasetInfo(
        model="random",
        code_fingerprint="c" * 64,
        decoder_fingerprint="d" * 64,
        text_fingerprint="e" * 64,
        bits_per_token=bits,
        group_size=7,
        grid=(height, width),
        embedding_dim=dim,
        captions=False,
        batch_size=32,
    )
    layout, entries = Layout(str(folder)), []
    layout.write_info(info)
    for part, first in enumerate(range(0, rows, PART)):
        count = min(PART, rows - first)
        moved = source[random.integers(0, len(source), count)] + _noise(random, count, dim, NOISE)
        half, size = _unit(moved).astype(np.float16), info.token_bytes
        columns = {
            "key": pa.array([f"{first + row:09d}" for row in range(count)]),
            "view": pa.array(np.zeros(count, np.uint8)),
            "tokens": pa.array([random.bytes(size or 0) for _ in range(count)], pa.binary(size)),
            "grid": pa.FixedSizeListArray.from_arrays(pa.array([height, width] * count, pa.uint16()), 2),
            "original_size": pa.FixedSizeListArray.from_arrays(pa.array([64, 64] * count, pa.uint32()), 2),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(half.ravel()), dim),
        }
        table = pa.Table.from_arrays(list(columns.values()), schema=arrow_schema(info))
        entries.append(layout.write_part(info, part, f"{part}", count, table))
    layout.write_manifest(entries)
    return layout


def _noise(random: np.random.Generator, rows: int, dim: int, length: float) -> Floats:
    return _unit(random.standard_normal((rows, dim), np.float32)) * np.float32(length)


def _unit(rows: Floats) -> Floats:
    unit: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


if __name__ == "__main__":
    main()
