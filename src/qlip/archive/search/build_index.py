"""Build an index atomically, streaming the embeddings of the parts.

An exact and an hnsw index are built in memory. The rows of an ivf index go to disk in blocks, which a later run reuses
if it was stopped, and the blocks are merged on disk. `Build` is the request, `build` returns the `IndexInfo`.

Shapes: R rows, E numbers in an embedding, Q queries.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlip.archive.dataset.parquet_reader import Numbers
from qlip.archive.search.embeddings import BLOCK, Floats, Vectors
from qlip.archive.search.index import IndexFile, IndexInfo, Kind, digits, index_folder, open_index
from qlip.archive.search.index_recall import measure_recall
from qlip.errors import QLIPError, require
from qlip.files import flush, sha256_of, written_aside
from qlip.runtime.progress import OnProgress, no_progress
from qlip.runtime.workspace import Workspace, lock_folder

EXACT_UP_TO = 100_000
"""Rows up to which an index is exact by default; searching all of them takes milliseconds."""
LINKS, CONSTRUCTION = 32, 100
"""hnsw: neighbours per row (twice as many on the lowest level), and efConstruction."""
ROWS_A_CENTROID = 64
"""ivf: rows per list that k-means learns the centres from."""
BLOCK_BYTES = 256 << 20
"""ivf: size of the block of rows that is sorted into lists in memory."""
AT_ONCE = 2048
"""Rows per call of faiss, between which Ctrl-C is handled."""
RECALL = 0.95
"""Default recall of an index."""
BUILDING = "building"
REMEMBERED = 256
"""Parts whose checksums an index stores, at most."""


@dataclass(frozen=True)
class Build:
    """Request for an index.

    Attributes:
        kind: None chooses by the number of rows: exact up to `EXACT_UP_TO`, else ivf.
        recall: that an approximate index should reach; its effort is the smallest that does.
        texts: (Q, E) float32, unit length: embeddings of texts that recall is measured with too.
        block_rows: ivf: rows per block; by default as many as make `BLOCK_BYTES`.
        on_progress: called with the rows read, in each of the passes over the dataset (see `passes`).
    """

    kind: Kind | None = None
    recall: float = RECALL
    texts: Floats | None = None
    block_rows: int | None = None
    on_progress: OnProgress = no_progress

    def kind_for(self, rows: int) -> Kind:
        """Return the kind of an index of so many rows."""
        return self.kind or ("exact" if rows <= EXACT_UP_TO else "ivf")

    def passes(self, rows: int) -> int:
        """Return how often all rows are read: once for the index, once more to measure an approximate one."""
        return 1 if self.kind_for(rows) == "exact" else 2


def build(vectors: Vectors, folder: Path | None = None, what: Build | None = None) -> IndexInfo:
    """Build an index and replace the old one, if any.

    If it is stopped, the old index stays intact; the next run reuses or removes what was left.

    Args:
        vectors: of the dataset.
        folder: of the index; ``index`` in the dataset's folder by default.
        what: see `Build`.

    Raises:
        QLIPError: the dataset has no rows or is damaged, or the folder cannot be written.
    """
    what = what or Build()
    folder = folder or index_folder(vectors.layout)
    if not len(vectors):
        raise QLIPError(f"{vectors.layout.address}: holds no row, so there is nothing to index")
    with _locked(folder):
        return _build(vectors, folder, what)


def set_recall(vectors: Vectors, folder: Path, what: Build) -> IndexInfo:
    """Measure an existing index, and set its effort to the smallest that reaches another recall.

    Args:
        vectors: of the dataset.
        folder: of an index that is up to date.
        what: of which `recall`, `texts` and `on_progress` count; all rows are read once.

    Raises:
        QLIPError: no index of these rows, or the folder cannot be written.
    """
    with _locked(folder):
        info = open_index(vectors, folder).info
        info = measure_recall(info, vectors, folder, what.recall, what.texts, what.on_progress)
        info.write(folder)
        return info


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the index's folder."""
    try:
        with lock_folder(folder, "another `qlip tokens index` is running here; wait for it, or stop it"):
            yield
    except OSError as error:
        raise QLIPError(
            f"{folder}: cannot write ({error.strerror or error}); free the disk or choose another folder"
        ) from None


def _build(vectors: Vectors, folder: Path, what: Build) -> IndexInfo:
    faiss, began, kind = require("faiss", extra="archive"), time.perf_counter(), what.kind_for(len(vectors))
    (folder / BUILDING).mkdir(exist_ok=True)  # a run before this one may have removed it
    if kind == "ivf":
        parameters, names = _build_ivf(faiss, vectors, folder, what)
    else:
        parameters, names = _build_in_memory(faiss, vectors, folder, kind, what)
    info = IndexInfo(
        kind=kind,
        parameters=parameters,
        effort=None,
        count=len(vectors),
        embedding_dim=vectors.dim,
        code_fingerprint=vectors.info.code_fingerprint,
        text_fingerprint=vectors.text_fingerprint,
        manifest_fingerprint=vectors.manifest_fingerprint,
        parts=_remembered(vectors),
        files=tuple(_described(folder / name) for name in names),
        faiss=faiss.__version__,
        seconds=0,
    )
    info = info if kind == "exact" else measure_recall(info, vectors, folder, what.recall, what.texts, what.on_progress)
    info = info.model_copy(update={"seconds": round(time.perf_counter() - began, 3)})
    info.write(folder)
    _tidy(folder, keep=names)
    return info


def up_to_date(vectors: Vectors, folder: Path, kind: Kind | None) -> IndexInfo | None:
    """Return the existing index, if it is of these rows and of this kind, and its files have their size."""
    try:
        info = IndexInfo.read(folder)
        if info.kind != (kind or info.kind):
            return None
        open_index(vectors, folder, check=False)
    except QLIPError:
        return None
    return info


# -------------------------------------------------------------------- exact and hnsw


def _build_in_memory(
    faiss: Any, vectors: Vectors, folder: Path, kind: Kind, what: Build
) -> tuple[dict[str, int], list[str]]:
    half, product = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    if kind == "hnsw":
        index = faiss.IndexHNSWSQ(vectors.dim, half, LINKS, product)
        index.hnsw.efConstruction = CONSTRUCTION
        parameters = {"links": LINKS, "construction": CONSTRUCTION}
    else:
        index, parameters = faiss.IndexScalarQuantizer(vectors.dim, half, product), {}
    index.train(np.zeros((1, vectors.dim), np.float32))  # float16 needs no training; faiss wants the call
    for _, rows in _slices(vectors.blocks(), what):
        index.add(rows)
    name = f"{kind}-{uuid.uuid4().hex[:8]}.faiss"
    aside = folder / BUILDING / name
    _save(faiss, index, aside)
    aside.replace(folder / name)
    return parameters, [name]


def _slices(blocks: Iterator[tuple[int, Floats]], what: Build) -> Iterator[tuple[int, Floats]]:
    for first, block in blocks:
        for start in range(0, len(block), AT_ONCE):
            rows = block[start : start + AT_ONCE]
            yield first + start, rows
            what.on_progress(len(rows))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn faiss' error of a failed write, a full disk included, into one line."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-120:]
        raise QLIPError(f"{folder}: cannot write ({reason}); free the disk or choose another folder") from None


# -------------------------------------------------------------------- ivf


def num_lists(rows: int) -> int:
    """Number of lists of an ivf index: about four times the root of the rows, each list long enough for k-means."""
    return max(1, min(int(4 * rows**0.5), rows // ROWS_A_CENTROID, 1 << 16))


def _build_ivf(faiss: Any, vectors: Vectors, folder: Path, what: Build) -> tuple[dict[str, int], list[str]]:
    lists = num_lists(len(vectors))
    size = what.block_rows or max(BLOCK, BLOCK_BYTES // (2 * vectors.dim + 8))
    plan = {"manifest": vectors.manifest_fingerprint, "lists": lists, "block": size, "faiss": faiss.__version__}
    work = Workspace(folder / BUILDING, plan)
    work.claim(restart=True)
    trained = work.path("trained.faiss")
    if not trained.exists():
        _save(faiss, _trained(faiss, vectors, lists), trained)
    blocks: list[Path] = []
    for number, first in enumerate(range(0, len(vectors), size)):
        blocks.append(work.path(f"block-{number:05d}.faiss"))
        last = min(first + size, len(vectors))
        if blocks[-1].exists():
            what.on_progress(last - first)
            continue
        index = faiss.read_index(str(trained))
        for start, rows in _slices(vectors.blocks(first, last), what):
            index.add_with_ids(rows, np.arange(start, start + len(rows)))
        _save(faiss, index, blocks[-1])
    return {"lists": lists}, _merged(faiss, trained, blocks, folder)


def _merged(faiss: Any, trained: Path, blocks: Sequence[Path], folder: Path) -> list[str]:
    """Merge the blocks' lists into one file, one list in memory at a time; returns the files' names.

    faiss' own `merge_ondisk` maps the file that it writes, so a full disk kills the process; this one raises.
    """
    stem, work = f"ivf-{uuid.uuid4().hex[:8]}", folder / BUILDING
    names = [f"{stem}.faiss", f"{stem}.ivfdata"]
    merged = faiss.read_index(str(trained))
    lists = faiss.OnDiskInvertedLists()
    lists.nlist, lists.code_size, lists.filename = merged.nlist, merged.code_size, names[1]  # in the same folder
    sources = [faiss.read_index(str(block), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY) for block in blocks]
    with open(work / names[1], "wb") as file:
        for number in range(merged.nlist):
            codes, ids = _list(faiss, [source.invlists for source in sources], number, merged.code_size)
            one = faiss.OnDiskOneList()
            one.size, one.offset = len(ids), file.tell()
            one.capacity = -(-len(ids) // 4) * 4  # aligns the ids to 8 bytes
            file.write(codes.tobytes() + bytes((one.capacity - len(ids)) * merged.code_size))
            file.write(ids.tobytes() + bytes((one.capacity - len(ids)) * ids.itemsize))
            lists.lists.push_back(one)
        lists.totsize = file.tell()
    merged.replace_invlists(lists, False)
    merged.ntotal = sum(source.ntotal for source in sources)
    _save(faiss, merged, work / names[0])
    flush(work / names[1])
    for name in reversed(names):
        (work / name).replace(folder / name)
    return names


def _list(faiss: Any, sources: Sequence[Any], number: int, code_size: int) -> tuple[NDArray[np.uint8], Numbers]:
    """Return a list's codes (n, code_size) and ids (n,) of all blocks, in the order of the rows."""
    codes, ids = [np.empty((0, code_size), np.uint8)], [np.empty(0, np.int64)]
    for lists in sources:
        if size := lists.list_size(number):
            codes.append(faiss.rev_swig_ptr(lists.get_codes(number), size * code_size).reshape(size, code_size))
            ids.append(faiss.rev_swig_ptr(lists.get_ids(number), size))
    return np.concatenate(codes), np.concatenate(ids)


def _trained(faiss: Any, vectors: Vectors, lists: int) -> Any:
    """Return an empty index with centres of unit length from k-means, for inner products."""
    index = faiss.index_factory(vectors.dim, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.by_residual = False  # keeps the dataset's own numbers
    index.cp.min_points_per_centroid = 1  # no warning for very small datasets
    index.train(vectors.sample(ROWS_A_CENTROID * lists))
    return index


def _save(faiss: Any, index: Any, path: Path) -> None:
    """Write an index atomically."""
    with written_aside(path) as aside, _writing(path.parent.parent):
        faiss.write_index(index, str(aside))


# -------------------------------------------------------------------- what was built


def _described(path: Path) -> IndexFile:
    return IndexFile(name=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))


def _remembered(vectors: Vectors) -> tuple[str, ...]:
    entries = vectors.entries
    step = -(-len(entries) // REMEMBERED)
    return tuple(digits(entry.sha256) for entry in entries[::step])


def _tidy(folder: Path, keep: Sequence[str]) -> None:
    """Remove files of earlier indexes and stopped runs; open files stay readable."""
    shutil.rmtree(folder / BUILDING, ignore_errors=True)
    for path in [*folder.glob("*.faiss"), *folder.glob("*.ivfdata")]:
        if path.name not in keep:
            with suppress(OSError):
                path.unlink()
