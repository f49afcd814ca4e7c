"""Documents as ids in a file of the cache, and the rows of one length that they are cut into.

`store` writes the documents of each file one behind the other; a training run after that maps them into memory. An
image is one number there, `IMAGE` - n for image n of the documents. `StoredRows` cuts the documents into rows in the
order of the files; row n holds what fits behind row n - 1. A document that crosses the end of a row continues in the
next one as a document of its own; an image is never cut. Shapes: S stored numbers, D documents, T positions per row.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlip.data.loader.batch import SkippedSample
from qlip.data.loader.sampler import Numbers
from qlip.errors import QLIPError, QLIPWarning
from qlip.files import cache_folder, folder_written_aside, plural, write_text
from qlip.runtime.progress import OnProgress, progress
from qlip.runtime.ranks import rank, world_size
from qlip.runtime.rng import hash_int
from qlip.um3.batch import DocumentKind, Row
from qlip.um3.data.documents import DocumentBuilder
from qlip.um3.data.texts import Broken
from qlip.um3.sequence import whole_image

IMAGE = -1
"""Stored number of the first image; the next is one less."""
VERSION = 1
IDS, ENDS, INFO = "ids.bin", "ends.bin", "info.json"


@dataclass(frozen=True)
class StoredFile:
    """Documents of a file, in a folder of the cache; pickles into workers as the folder's path.

    Attributes:
        folder: of the files.
        digest: hash of the ids.
        images: names of the images, in order.
        broken: number of the documents that were left out; `first_broken` is the first one's fault.
    """

    folder: Path
    digest: str
    images: tuple[str, ...]
    broken: int
    first_broken: str | None

    @cached_property
    def ids(self) -> NDArray[np.int32]:
        """Ids and images of the documents, int32 (S,)."""
        path = self.folder / IDS
        return np.memmap(path, np.int32, "r") if path.stat().st_size else np.empty(0, np.int32)

    @cached_property
    def ends(self) -> Numbers:
        """End of each document in `ids`, int64 (D,)."""
        return np.fromfile(self.folder / ENDS, np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("ids", "ends")}

    @classmethod
    def open(cls, folder: Path) -> StoredFile:
        """Open a folder that `store` wrote."""
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        return cls(folder, info["digest"], tuple(info["images"]), info["broken"], info["first_broken"])


@dataclass(frozen=True)
class StoredDocuments:
    """Documents of several files, one behind the other; pickles into workers."""

    files: tuple[StoredFile, ...]

    @property
    def digest(self) -> str:
        """Hash of the ids."""
        digests = [file.digest for file in self.files]
        return digests[0] if len(digests) == 1 else f"{hash_int(*digests):032x}"[:16]

    @cached_property
    def begins(self) -> Numbers:
        """Place of each file's first number among all, and the end of the last, int64 (files + 1,)."""
        return np.cumsum([0, *(file.ends[-1] if len(file.ends) else 0 for file in self.files)])

    @cached_property
    def ends(self) -> Numbers:
        """End of each document, int64 (D,)."""
        return np.concatenate([file.ends + begin for file, begin in zip(self.files, self.begins[:-1], strict=True)])

    @cached_property
    def images(self) -> tuple[str, ...]:
        """Names of all images, in order."""
        return tuple(name for file in self.files for name in file.images)

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files}

    def read(self, begin: int, end: int) -> NDArray[np.int32]:
        """Ids and images at places `begin` to `end` - 1, int32 (end - begin,)."""
        found, images = list[NDArray[np.int32]](), 0
        for file, first, last in zip(self.files, self.begins[:-1].tolist(), self.begins[1:].tolist(), strict=True):
            if first < end and begin < last:
                ids = file.ids[max(begin - first, 0) : end - first]
                found.append(np.where(ids <= IMAGE, ids - images, ids))
            images += len(file.images)
        return np.concatenate(found)


Documents = Iterable[tuple[Sequence[int], Sequence[str]] | Broken]
"""Ids of documents, with numbers from `IMAGE` down for images, and the names of these."""


def store(
    name: str,
    files: Sequence[tuple[Sequence[object], Callable[[], Documents]]],
    cache_dir: str | Path | None = None,
) -> StoredDocuments:
    """Write the documents of files into the cache, unless they are there; warn of those that were left out.

    What was written stays when a run is killed. Ranks begin with different files, and take those of the others.

    Args:
        name: of the documents, for messages.
        files: for each, all that its ids depend on, and a function that makes an iterator over its documents.
        cache_dir: see :func:`qlip.files.cache_folder`.

    Raises:
        QLIPError: there is no document.
    """
    home = cache_folder(cache_dir) / "documents"
    folders = [home / f"{hash_int(VERSION, *key):032x}" for key, _ in files]
    first, world = rank(), world_size()
    with progress(f"{name} to ids", None) as bar:
        for number in sorted(range(len(files)), key=lambda one: ((one - first) % world, one)):
            _store(folders[number], files[number][1], bar.advance)
    found = StoredDocuments(tuple(map(StoredFile.open, folders)))
    broken = sum(file.broken for file in found.files)
    fault = next((file.first_broken for file in found.files if file.broken), None)
    if not len(found.ends):
        raise QLIPError(f"{name}: holds no document{f'; {fault}' if fault else ''}")
    if broken:
        total = plural(broken + len(found.ends), "document")
        warnings.warn(f"{name}: {broken:,} of {total} left out; the first: {fault}", QLIPWarning, stacklevel=2)
    return found


def _store(folder: Path, documents: Callable[[], Documents], on_progress: OnProgress) -> None:
    if (folder / INFO).is_file():
        return
    try:
        with folder_written_aside(folder) as aside:
            _write(documents(), aside, on_progress)
    except QLIPError:
        if not (folder / INFO).is_file():  # no other rank was faster, and wrote the same
            raise


def _write(documents: Documents, folder: Path, on_progress: OnProgress) -> None:
    digest, images = hashlib.sha256(), list[str]()
    size, broken, first = 0, 0, None
    with open(folder / IDS, "wb") as ids, open(folder / ENDS, "wb") as ends:
        for one in documents:
            on_progress(1)
            if isinstance(one, Broken):
                broken, first = broken + 1, first or one.reason
                continue
            numbers = np.array(one[0], np.int32)
            numbers[numbers <= IMAGE] -= len(images)
            images += one[1]
            size += len(numbers)
            for file, data in ((ids, numbers.tobytes()), (ends, np.int64(size).tobytes())):
                file.write(data)
                digest.update(data)
    info = {"digest": digest.hexdigest()[:16], "images": images, "broken": broken, "first_broken": first}
    write_text(folder / INFO, json.dumps(info))


ReadImages = Callable[[Sequence[str]], list[Tensor | str]]
"""Names of images to their indices, int64 (N, K) each, or the fault in one line; it pickles, to run in workers."""


@dataclass(frozen=True)
class StoredRows:
    """Rows of stored documents, a `qlip.um3.data.feed.RowSource`.

    Attributes:
        kind: of the documents.
        name: of the source, for messages.
        documents: to cut.
        builder: makes ids of images.
        length: T.
        read: reads the documents' images.
    """

    kind: DocumentKind
    name: str
    documents: StoredDocuments
    builder: DocumentBuilder
    length: int
    read: ReadImages | None = None

    @cached_property
    def begins(self) -> Numbers:
        """Place in the stored numbers at which each row begins, and the end of the last, int64 (rows + 1,)."""
        size = int(self.documents.begins[-1])
        if not self.documents.images:
            return np.append(np.arange(0, size, self.length), size)
        sizes = [np.where(file.ids <= IMAGE, self.builder.image_cost, 1) for file in self.documents.files]
        before = np.cumsum(np.concatenate([[0], *sizes]))  # positions before each stored number
        begins = [0]
        while begins[-1] < size:
            begins.append(int(np.searchsorted(before, before[begins[-1]] + self.length, side="right")) - 1)
        return np.array(begins)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "begins"}

    @property
    def size(self) -> int:
        """Number of rows per epoch."""
        return len(self.begins) - 1

    @property
    def identity(self) -> dict[str, Any]:
        """Values that the rows depend on."""
        return {"name": self.name, "digest": self.documents.digest}

    def rows(self, epochs: Numbers, indices: Numbers) -> tuple[list[Row], list[SkippedSample]]:
        """Read rows by their numbers; they are the same in every epoch."""
        del epochs
        rows, skipped = list[Row](), list[SkippedSample]()
        for index in indices.tolist():
            row = Row(self.kind)
            for number, piece in self._pieces(index):
                try:
                    row.documents.append(self._expanded(piece))
                except QLIPError as error:
                    row.dropped += int(np.where(piece <= IMAGE, self.builder.image_cost, 1).sum())
                    skipped.append(SkippedSample(f"document {number:,}", self.name, str(error)))
            rows.append(row)
        return rows, skipped

    def _pieces(self, index: int) -> list[tuple[int, NDArray[np.int32]]]:
        """Documents, or pieces of them, in a row: their numbers and stored ids."""
        begin, end = self.begins[index : index + 2].tolist()
        ends = self.documents.ends
        first = int(np.searchsorted(ends, begin, side="right"))
        last = int(np.searchsorted(ends, end, side="left"))
        borders = [begin, *ends[first:last].tolist(), end]
        ids = self.documents.read(begin, end)
        pairs = enumerate(itertools.pairwise(borders))
        return [(first + place, ids[low - begin : high - begin]) for place, (low, high) in pairs]

    def _expanded(self, piece: NDArray[np.int32]) -> Tensor:
        """Ids of a piece, int64 (S,). Raises QLIPError: one of its images cannot be read."""
        ids = torch.from_numpy(piece.astype(np.int64))
        places = np.flatnonzero(piece <= IMAGE).tolist()
        if not places:
            return ids
        assert self.read is not None
        found, begin = list[Tensor](), 0
        images = self.read([self.documents.images[IMAGE - int(piece[place])] for place in places])
        for place, indices in zip(places, images, strict=True):
            if isinstance(indices, str):
                raise QLIPError(indices)
            found += [ids[begin:place], whole_image(self.builder.config, indices)]
            begin = place + 1
        return torch.cat([*found, ids[begin:]])
