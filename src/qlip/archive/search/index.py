"""A nearest-neighbour index over a dataset's embeddings, as it lies on disk and as it is asked (docs/search.md).

::

    DATASET/index/
      index.json                what the index is, of which dataset, and its files' checksums: without it there is none
      exact-3f2a9c81.faiss      faiss' own format: plain numbers, no pickle
      ivf-3f2a9c81.ivfdata      kind ivf: the lists, beside it

Every kind keeps the embeddings as the dataset has them, in float16, so that scores are true inner products; an
approximate index may miss a neighbour, it never makes up a score.

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
_AGAIN = "make the index again with `qlip tokens index`"

Kind = Literal["exact", "hnsw", "ivf"]
Share = Annotated[float, Field(ge=0, le=1)]


class IndexFile(BaseModel):
    """A file of an index.

    Attributes:
        name: in the index's folder.
        bytes, sha256: of the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z]+-[0-9a-f]{8}\.(faiss|ivfdata)$")]
    bytes: Annotated[int, Field(ge=0)]
    sha256: Fingerprint


class Recall(BaseModel):
    """Recall@10 against exact search: the share of the ten nearest that the index finds too.

    Attributes:
        effort: efSearch of hnsw, nprobe of ivf.
        images: with embeddings of the dataset, moved by noise, as queries.
        words: with texts as queries; None where none were given.
        milliseconds: a query, one at a time, when it was measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    effort: Annotated[int, Field(ge=1)]
    pictures: Share
    words: Share | None = None
    milliseconds: Annotated[float, Field(ge=0)]

    @property
    def least(self) -> float:
        """The smaller of both."""
        return self.pictures if self.words is None else min(self.pictures, self.words)


class IndexInfo(BaseModel):
    """What an index is: ``index.json``.

    Attributes:
        version: of the format.
        kind: ``exact``, ``hnsw`` or ``ivf``.
        parameters: that it was built with.
        effort: how far it searches unless told otherwise; None of ``exact``.
        count: R, rows.
        embedding_dim: E.
        code_fingerprint, text_fingerprint: of the model that made the embeddings.
        manifest_fingerprint: of the rows and their order, see `qlip.archive.search.embeddings.manifest_fingerprint`.
        parts: digits of some parts' SHA-256, to tell a dataset that changed from another one.
        files: the index's, the one to open first.
        recall: at each effort that was tried; empty of ``exact``, whose recall is 1 by definition.
        queries: how many queries of images, and of words, recall was measured with.
        faiss: version that wrote it.
        seconds: that building took.
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
        """Of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def measured(self) -> Recall | None:
        """The recall at the effort that is used."""
        return next((one for one in self.recall if one.effort == self.effort), None)

    @classmethod
    def read(cls, folder: Path) -> IndexInfo:
        """Raises QLIPError: no index here, or its head is none."""
        path = folder / HEAD
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise QLIPError(f"{folder}: no index; make one with `qlip tokens index`") from None
        except OSError as error:
            raise QLIPError(f"{path}: {error.strerror or error}; {_AGAIN}") from None
        return validate_json(cls, data, str(path), remedy=_AGAIN, of="indexes")

    def write(self, folder: Path) -> None:
        """The last step of building: from here on the index is there."""
        write_text(folder / HEAD, self.model_dump_json(indent=1) + "\n")

    def check_dataset(self, vectors: Vectors, folder: Path) -> None:
        """Refuse an index of other rows than the dataset's.

        Raises:
            QLIPError: of another model, of another dataset, or of the dataset as it was before it changed.
        """
        again = f"`qlip tokens index {vectors.layout.address}` makes it again"
        mine = (vectors.info.code_fingerprint, vectors.text_fingerprint, vectors.dim)
        if (self.code_fingerprint, self.text_fingerprint, self.embedding_dim) != mine:
            raise QLIPError(
                f"{folder}: an index of another model's embeddings (codes {self.code_fingerprint[:12]}, text"
                f" {self.text_fingerprint[:12]}; the dataset: {mine[0][:12]}, {mine[1][:12]}); {again}"
            )
        if self.manifest_fingerprint == vectors.manifest_fingerprint:
            return
        if not set(self.parts) & {digits(entry.sha256) for entry in vectors.entries}:
            raise QLIPError(f"{folder}: an index of another dataset, they have no part in common; {again}")
        raise QLIPError(
            f"{folder}: stale, the dataset changed since it was built ({self.count:,} rows then, {len(vectors):,} now);"
            f" {again}"
        )


def digits(sha256: str) -> str:
    """So much of a part's checksum as an index remembers."""
    return sha256[:16]


class Finder(Protocol):
    """Whatever finds nearest rows."""

    def nearest(self, queries: Floats, k: int) -> Found:
        """(Q, E) float32 to scores and rows, (Q, k) each."""
        ...


class Scan:
    """No index: all embeddings are read for every search, and the answer is exact."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors

    def nearest(self, queries: Floats, k: int) -> Found:
        """(Q, E) float32 to scores and rows, (Q, k) each."""
        return exact(self.vectors, queries, k)


class NearestIndex:
    """An opened index.

    Args:
        info: its head.
        index: faiss' object.
    """

    def __init__(self, info: IndexInfo, index: Any) -> None:
        self.info, self.index = info, index

    def nearest(self, queries: Floats, k: int, effort: int | None = None) -> Found:
        """The nearest rows by inner product.

        Args:
            queries: (Q, E) float32.
            k: neighbours.
            effort: efSearch of hnsw, nprobe of ivf, other than `info.effort`.

        Returns:
            Scores, best first, and rows, (Q, k) each; -inf and -1 where fewer were found.
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
    """Where the index of a dataset lies.

    Raises:
        QLIPError: on a store, from which nothing is mapped into memory.
    """
    address = layout.path(FOLDER) if folder is None else str(folder)
    if is_remote(address):
        raise QLIPError(
            f"{address}: an index is mapped into memory, so it lies on a disk; name a folder for it with --index"
        )
    return local_path(address)


def open_index(vectors: Vectors, folder: Path, check: bool = True) -> NearestIndex:
    """Open the index of a dataset; its numbers stay on disk until they are needed.

    Args:
        vectors: of the dataset.
        folder: of the index.
        check: compare the files with their SHA-256 first, about a second a gigabyte; their size is always compared.

    Raises:
        QLIPError: no index, of other rows than the dataset's, damaged, or not what its head says.
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
    """faiss' object over files that stay on disk: mapped into memory, a page is read when it is needed."""
    faiss, path = require("faiss", extra="archive"), str(folder / info.files[0].name)
    if info.kind != "ivf":
        return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY)
    index = faiss.read_index(path, faiss.IO_FLAG_SKIP_IVF_DATA | faiss.IO_FLAG_READ_ONLY)
    lists = faiss.downcast_InvertedLists(index.invlists)
    lists.filename = str(folder / info.files[1].name)  # the file knows its name, not its folder
    lists.do_mmap()
    return index


def check_files(folder: Path, files: Sequence[IndexFile], content: bool = True) -> None:
    """Refuse files that are not those which were written.

    Raises:
        QLIPError: one is missing, of another size, or, with `content`, of another checksum.
    """
    for file in files:
        path = folder / file.name
        try:
            if (size := path.stat().st_size) != file.bytes:
                raise QLIPError(f"{path}: damaged ({size:,} bytes of {file.bytes:,}); {_AGAIN}")
            if content and sha256_of(path) != file.sha256:
                raise QLIPError(f"{path}: damaged (its checksum is another); {_AGAIN}")
        except OSError as error:
            raise QLIPError(f"{path}: {error.strerror or error}; {_AGAIN}") from None


def _reason(error: Exception) -> str:
    """What faiss says, without the place in its sources."""
    return " ".join(str(error).split()).rpartition("Error: ")[2][:120]
