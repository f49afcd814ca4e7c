"""Index of a tar shard: its samples and their offsets, built once and stored beside the tar as ``SHARD.index``.

The file is a safetensors file: ``places`` int64 (N, 3, 2), offset and size of each sample's image, text and json, -1
for a missing file; ``checks`` uint32 (N, 3), CRC-32 of those files' tar headers; ``keys`` uint8, all keys concatenated,
and ``ends`` int64 (N,), their end positions. In version 2, written where there are ``.cls`` files, these are fourth in
``places`` (N, 4, 2) and ``checks`` (N, 4). The entry ``qlip-tar-index`` of its metadata is JSON: the format's
version, the tar's size, N, and a digest of the arrays. Each read compares the tar header before the data with its
CRC-32, so that an index of another tar is detected at once.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from qlip.data.shards.tar_index import ANNOTATIONS, BLOCK, FileSpan, SampleFiles, groups, walk
from qlip.data.storage.chunked_reader import open_reader
from qlip.data.storage.storage import Storage, join, split
from qlip.errors import QLIPError, QLIPWarning

SUFFIX = ".index"
FORMAT, VERSIONS = "qlip-tar-index", (1, 2)
HEAD = 4096
"""Upper bound of the header of an index file, bytes."""
PROGRESS_INTERVAL = 64  # samples
ABSENT = FileSpan(-1, -1, 0)
DTYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "U32": np.dtype("<u4"), "U8": np.dtype("u1")}
ARRAYS = {"places": "I64", "checks": "U32", "keys": "U8", "ends": "I64"}


@dataclass(frozen=True)
class IndexEntry:
    """Spans of one sample: its image, its text file, its JSON file and its class file, if any."""

    image: FileSpan
    text: FileSpan | None
    record: FileSpan | None
    cls: FileSpan | None


@dataclass(frozen=True)
class IndexHeader:
    """Header of an index file: the tar's size in bytes, the number of samples, and a digest of the arrays."""

    tar_size: int
    samples: int
    digest: str


class ShardIndex:
    """Samples of one shard in the order of their first files.

    Args:
        tar_size: size of the tar in bytes.
        places, checks, keys, ends: see the module; they may be views of a mapped file.
    """

    def __init__(
        self,
        tar_size: int,
        places: NDArray[np.int64],
        checks: NDArray[np.uint32],
        keys: NDArray[np.uint8],
        ends: NDArray[np.int64],
    ) -> None:
        self.tar_size, self.places, self.checks, self.keys, self.ends = tar_size, places, checks, keys, ends
        self.samples = len(ends)

    def __len__(self) -> int:
        return self.samples

    def key(self, index: int) -> str:
        """Key of a sample."""
        begin = int(self.ends[index - 1]) if index else 0
        return bytes(self.keys[begin : int(self.ends[index])]).decode("utf-8", "surrogateescape")

    def entry(self, index: int) -> IndexEntry:
        """Spans of a sample."""
        image, *beside = (
            FileSpan(offset, size, check)
            for (offset, size), check in zip(self.places[index].tolist(), self.checks[index].tolist(), strict=True)
        )
        text, record, cls = (None if span.offset < 0 else span for span in [*beside, ABSENT][:3])
        return IndexEntry(image, text, record, cls)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Return the bytes [start, end) of samples first to last - 1, headers included."""
        places = self.places[first:last]
        there = places[..., 0] >= 0
        return int(places[..., 0][there].min()) - BLOCK, int(places.sum(-1)[there].max())

    @cached_property
    def digest(self) -> str:
        """Digest of the tar's size and all arrays."""
        sha = hashlib.blake2b(str(self.tar_size).encode(), digest_size=16)
        for array in (self.places, self.checks, self.keys, self.ends):
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()

    def to_bytes(self) -> bytes:
        """Content of the index file."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in ARRAYS}
        facts = {
            "version": self.places.shape[1] - 2,
            "tar_size": self.tar_size,
            "samples": len(self),
            "digest": self.digest,
        }
        return save(arrays, {FORMAT: json.dumps(facts)})  # one entry, since safetensors writes several in any order

    @classmethod
    def from_groups(cls, tar_size: int, walked: Iterable[SampleFiles], where: str) -> ShardIndex:
        """Make an index from a walk through the tar; files of one key need not be adjacent.

        Keys without an image are left out, with a warning if they hold files that look like images (``d.seg.png``).

        Raises:
            QLIPError: a file name occurs twice.
        """
        samples: dict[str, SampleFiles] = {}
        for group in walked:
            known = samples.setdefault(group.key, group)
            duplicate = group.duplicate or next(
                (s for s in group.files if known is not group and s in known.files), None
            )
            if duplicate is not None:
                raise QLIPError(f"{where}: holds {group.key}.{duplicate} twice; each file name may occur once")
            known.files.update(group.files)
        found = [group for group in samples.values() if group.image is not None]
        files = ANNOTATIONS if any("cls" in group.files for group in found) else ANNOTATIONS[:2]
        rows = [(one.image or ABSENT, *(one.files.get(suffix, ABSENT) for suffix in files)) for one in found]
        left_out = [name for group in samples.values() if group.image is None for name in group.unused]
        if left_out:
            count = "an image file is" if len(left_out) == 1 else f"{len(left_out):,} image files are"
            warnings.warn(
                f"{where}: {count} left out, as parts of samples without a main image: {left_out[0]}"
                f"{', ...' if len(left_out) > 1 else ''}; a name's first dot before a letter begins its type",
                QLIPWarning,
                stacklevel=2,
            )
        names = [one.key.encode("utf-8", "surrogateescape") for one in found]
        shape = (len(rows), 1 + len(files))
        places = np.array([[part[:2] for part in parts] for parts in rows], dtype=np.int64).reshape(*shape, 2)
        checks = np.array([[part.check for part in parts] for parts in rows], dtype=np.uint32).reshape(shape)
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        return cls(tar_size, places, checks, np.frombuffer(b"".join(names), dtype=np.uint8), ends)

    @classmethod
    def from_file(cls, path: Path, where: str) -> ShardIndex:
        """Map an index file; processes that read it share its pages. Raises QLIPError if it is not an index."""
        try:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise QLIPError(f"{where}: {error}; make it again with `qlip data index`") from None
        head, entries, begin = _parse(data, where)
        arrays: dict[str, NDArray[Any]] = {}
        for name, kind in ARRAYS.items():
            entry = entries[name]
            first, last = (begin + int(offset) for offset in entry["data_offsets"])
            dtype, shape = DTYPES[kind], tuple(int(n) for n in entry["shape"])
            if last > len(data) or last - first != dtype.itemsize * int(np.prod(shape)):
                raise _unreadable(where)
            arrays[name] = np.frombuffer(data, dtype, int(np.prod(shape)), first).reshape(shape)
        index = cls(head.tar_size, **arrays)
        if not len(index) == len(index.places) == len(index.checks) == head.samples:
            raise _unreadable(where)
        return index


def scan(address: str, storage: Storage, on_progress: Callable[[int], None] = lambda offset: None) -> ShardIndex:
    """Index a tar by walking over its headers; a remote one is read once from front to back.

    Args:
        address: address of the tar.
        storage: reads the tar.
        on_progress: called now and then with the number of bytes that were read.

    Raises:
        QLIPError: as `walk`, or a file name occurs twice.
    """
    with open_reader(address, storage) as (fetch, length):

        def reporting() -> Iterator[SampleFiles]:
            for number, (group, _) in enumerate(groups(walk(fetch, length, address))):
                if number % PROGRESS_INTERVAL == 0:
                    on_progress(group.start)
                yield group
            on_progress(length)

        return ShardIndex.from_groups(length, reporting(), address)


def index_address(shard: str, folder: str | None = None) -> str:
    """Return the address of a shard's index: beside the shard, or in `folder`."""
    beside, name = split(shard)
    return join(folder or beside, name + SUFFIX)


def read_header(address: str, storage: Storage) -> IndexHeader:
    """Read the header of an index file, by one request. Raises QLIPError if it does not exist or is not an index."""
    return _parse(storage.read_up_to(address, HEAD), address)[0]


def _parse(data: bytes | mmap.mmap, where: str) -> tuple[IndexHeader, dict[str, Any], int]:
    """Parse the header; return it, the table of arrays, and the offset of their bytes."""
    length = int.from_bytes(data[:8], "little")
    try:
        table: dict[str, Any] = json.loads(data[8 : 8 + length]) if 0 < length <= HEAD - 8 else {}
        facts = json.loads(table["__metadata__"][FORMAT])
        if facts["version"] not in VERSIONS:
            raise QLIPError(
                f"{where}: of format {facts['version']}, not {VERSIONS[-1]}; make it again with `qlip data index`"
            )
        head = IndexHeader(int(facts["tar_size"]), int(facts["samples"]), facts["digest"])
        if any(table[name]["dtype"] != kind for name, kind in ARRAYS.items()):
            raise _unreadable(where)
    except QLIPError:
        raise
    except (TypeError, KeyError, ValueError):
        raise _unreadable(where) from None
    return head, table, 8 + length


def _unreadable(where: str) -> QLIPError:
    return QLIPError(f"{where}: no index, or a broken one; make it again with `qlip data index`")
