"""Nearest-neighbour index over a dataset's embeddings: files on disk and queries (docs/search.md).

::

    DATASET/index/
      index.json                description of the index and its dataset, and checksums; written last
      exact-3f2a9c81.faiss      faiss' own format: plain numbers, no pickle
      ivf-3f2a9c81.ivfdata      the lists of kind ivf

All kinds store the dataset's embeddings in float16, so scores are exact inner products; an approximate index only
misses neighbours. `IndexInfo` is index.json, `NearestIndex` answers queries, `Scan` does so without an index.

Shapes: Q queries, E numbers in an embedding, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from qlip.archive.dataset.layout import Layout
from qlip.archive.dataset.schema import Fingerprint
from qlip.archive.search.embeddings import Floats, Found, Vectors, exact
from qlip.data.storage.storage import is_remote, local_path
from qlip.errors import QLIPError, require, validate_json
from qlip.files import sha256_of, write_text

VERSION: Final = 1
FOLDER, HEAD = "index", "index.json"
NEIGHBOURS = 10
"""k of the recall that is measured."""
_AGAIN = "rebuild it with `qlip tokens index`"

Kind = Literal["exact", "hnsw", "ivf"]
Share = Annotated[float, Field(ge=0, le=1)]


class IndexFile(BaseModel):
    """File of an index.

    Attributes:
        name: in the index's folder.
        bytes, sha256: size and checksum.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z]+-[0-9a-f]{8}\.(faiss|ivfdata)$")]
    bytes: Annotated[int, Field(ge=0)]
    sha256: Fingerprint


class Recall(BaseModel):
    """Recall@10 against exact search: share of the ten nearest rows that the index finds.

    Attributes:
        effort: efSearch of hnsw, nprobe of ivf.
        images: recall with noisy embeddings of the dataset as queries.
        texts: recall with texts as queries; None without texts.
        milliseconds: per query, one at a time, on the machine that measured it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    effort: Annotated[int, Field(ge=1)]
    images: Share = Field(alias="pictures")
    texts: Share | None = Field(default=None, alias="words")
    milliseconds: Annotated[float, Field(ge=0)]

    @property
    def least(self) -> float:
        """The smaller of both."""
        return self.images if self.texts is None else min(self.images, self.texts)


class IndexInfo(BaseModel):
    """Description of an index: ``index.json``.

    Attributes:
        version: of the format.
        kind: ``exact``, ``hnsw`` or ``ivf``.
        parameters: of the build.
        effort: default efSearch or nprobe; None for ``exact``.
        count: R, number of rows.
        embedding_dim: E.
        code_fingerprint, text_fingerprint: of the model that made the embeddings.
        manifest_fingerprint: of the rows and their order, see `qlip.archive.dataset.layout.manifest_fingerprint`.
        parts: first digits of some parts' SHA-256, to tell a changed dataset from another one.
        files: of the index, the one to open first.
        recall: at each effort that was tried; empty for ``exact``.
        queries: number of image queries and of text queries that recall was measured with.
        faiss: version that wrote the index.
        seconds: duration of the build.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = VERSION
    kind: Kind
    parameters: dict[str, int]
    effort: Annotated[int, Field(ge=1)] | None
    count: Annotated[int, Field(ge=1)]
    embedding_dim: Annotated[int, Field(ge=1)]
    code_fingerprint: Fingerprint
    text_fingerprint: Fingerprint
    manifest_fingerprint: Fingerprint
    parts: tuple[str, ...]
    files: Annotated[tuple[IndexFile, ...], Field(min_length=1)]
    recall: tuple[Recall, ...] = ()
    queries: tuple[int, int] = (0, 0)
    faiss: str
    seconds: Annotated[float, Field(ge=0)]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def measured(self) -> Recall | None:
        """Recall at the default effort."""
        return next((one for one in self.recall if one.effort == self.effort), None)

    @classmethod
    def read(cls, folder: Path) -> IndexInfo:
        """Read ``index.json``. Raises QLIPError: no index here, or not a valid one."""
        path = folder / HEAD
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise QLIPError(f"{folder}: no index; make one with `qlip tokens index`") from None
        except OSError as error:
            raise QLIPError(f"{path}: {error.strerror or error}; {_AGAIN}") from None
        return validate_json(cls, data, str(path), remedy=_AGAIN, of="indexes")

    def write(self, folder: Path) -> None:
        """Write ``index.json``, the last step of building."""
        write_text(folder / HEAD, self.model_dump_json(indent=1, by_alias=True) + "\n")

    def check_dataset(self, vectors: Vectors, folder: Path) -> None:
        """Refuse an index of other rows than the dataset's.

        Raises:
            QLIPError: of another model, of another dataset, or of the dataset as it was before it changed.
        """
        again = f"rebuild it with `qlip tokens index {vectors.layout.address}`"
        mine = (vectors.info.code_fingerprint, vectors.text_fingerprint, vectors.dim)
        if (self.code_fingerprint, self.text_fingerprint, self.embedding_dim) != mine:
            raise QLIPError(
                f"{folder}: an index of another model's embeddings (codes {self.code_fingerprint[:12]}, text"
                f" {self.text_fingerprint[:12]}; the dataset: {mine[0][:12]}, {mine[1][:12]}); {again}"
            )
        if self.manifest_fingerprint == vectors.manifest_fingerprint:
            return
        if not set(self.parts) & {digits(entry.sha256) for entry in vectors.entries}:
            raise QLIPError(f"{folder}: an index of another dataset, without a common part; {again}")
        raise QLIPError(
            f"{folder}: stale, the dataset changed since it was built ({self.count:,} rows then, {len(vectors):,} now);"
            f" {again}"
        )


def digits(sha256: str) -> str:
    """Return the digits of a part's checksum that an index stores."""
    return sha256[:16]


class Finder(Protocol):
    """Finds the nearest rows of queries."""

    def nearest(self, queries: Floats, k: int) -> Found:
        """Return scores and rows, (Q, k) each, of queries (Q, E) float32."""
        ...


class Scan:
    """Exact search without an index, which reads all embeddings for every query."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors

    def nearest(self, queries: Floats, k: int) -> Found:
        """Return scores and rows, (Q, k) each, of queries (Q, E) float32."""
        return exact(self.vectors, queries, k)


class NearestIndex:
    """Opened index.

    Args:
        info: description of the index.
        index: faiss' object.
    """

    def __init__(self, info: IndexInfo, index: Any) -> None:
        self.info, self.index = info, index

    def nearest(self, queries: Floats, k: int, effort: int | None = None) -> Found:
        """Find the nearest rows by inner product.

        Args:
            queries: (Q, E) float32.
            k: neighbours.
            effort: efSearch of hnsw, nprobe of ivf; `info.effort` by default.

        Returns:
            Scores, best first, and rows, (Q, k) each; -inf and -1 if fewer were found.
        """
        scores, rows = self.index.search(np.ascontiguousarray(queries, np.float32), k, params=self._effort(effort, k))
        return np.where(rows < 0, np.float32(-np.inf), scores), rows

    def _effort(self, effort: int | None, k: int) -> Any:
        faiss, effort = require("faiss", extra="archive"), effort or self.info.effort
        if self.info.kind == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=max(effort or 1, k))
        if self.info.kind == "ivf":
            return faiss.SearchParametersIVF(nprobe=effort or 1)
        return None


def index_folder(layout: Layout, folder: str | Path | None = None) -> Path:
    """Return the folder of a dataset's index.

    Raises:
        QLIPError: the folder is in a store, which cannot be mapped into memory.
    """
    address = layout.path(FOLDER) if folder is None else str(folder)
    if is_remote(address):
        raise QLIPError(f"{address}: an index is mapped into memory, so it lies on a disk; name a folder for it")
    return local_path(address)


def open_index(vectors: Vectors, folder: Path, check: bool = True) -> NearestIndex:
    """Open the index of a dataset; its numbers are mapped from disk.

    Args:
        vectors: of the dataset.
        folder: of the index.
        check: compare the files with their SHA-256, about a second per gigabyte; their size is always compared.

    Raises:
        QLIPError: no index, one of other rows than the dataset's, or a damaged one.
    """
    faiss, info = require("faiss", extra="archive"), IndexInfo.read(folder)
    info.check_dataset(vectors, folder)
    check_files(folder, info.files, check)
    path = folder / info.files[0].name
    try:
        index = read_faiss(folder, info)
    except RuntimeError as error:
        raise QLIPError(f"{path}: faiss cannot read it ({_reason(error)}); {_AGAIN}") from None
    if (index.ntotal, index.d, index.metric_type) != (info.count, info.embedding_dim, faiss.METRIC_INNER_PRODUCT):
        raise QLIPError(f"{path}: not the index that {HEAD} describes; {_AGAIN}")
    return NearestIndex(info, index)


def read_faiss(folder: Path, info: IndexInfo) -> Any:
    """Open faiss' object with its files mapped into memory."""
    faiss, path = require("faiss", extra="archive"), str(folder / info.files[0].name)
    if info.kind != "ivf":
        return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY)
    index = faiss.read_index(path, faiss.IO_FLAG_SKIP_IVF_DATA | faiss.IO_FLAG_READ_ONLY)
    lists = faiss.downcast_InvertedLists(index.invlists)
    lists.filename = str(folder / info.files[1].name)  # the file stores a name without a folder
    lists.do_mmap()
    return index


def check_files(folder: Path, files: Sequence[IndexFile], content: bool = True) -> None:
    """Check that files are those that were written.

    Raises:
        QLIPError: a file is missing or has another size or, with `content`, another checksum.
    """
    for file in files:
        path = folder / file.name
        try:
            if (size := path.stat().st_size) != file.bytes:
                raise QLIPError(f"{path}: damaged ({size:,} bytes of {file.bytes:,}); {_AGAIN}")
            if content and sha256_of(path) != file.sha256:
                raise QLIPError(f"{path}: damaged (another checksum); {_AGAIN}")
        except OSError as error:
            raise QLIPError(f"{path}: {error.strerror or error}; {_AGAIN}") from None


def _reason(error: Exception) -> str:
    """Return faiss' message without the line of its source."""
    return " ".join(str(error).split()).rpartition("Error: ")[2][:120]
