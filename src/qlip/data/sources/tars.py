"""Captioned images in tar shards, as webdataset writes them, with random access through an index of offsets."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

from qlip.data.shards.indexed import IndexedShards, stale
from qlip.data.shards.shard_index import IndexEntry
from qlip.data.shards.shard_patterns import expand
from qlip.data.shards.tar_index import BLOCK, FileSpan
from qlip.data.sources.base import (
    IMAGE_SUFFIXES,
    CaptionedImages,
    RawSample,
    check_captions,
    class_in,
    printable,
    raw_sample,
    read_json,
    stamp_of,
)
from qlip.data.storage.prefetch import Prefetcher, Span
from qlip.data.storage.retry import RetryPolicy
from qlip.data.storage.storage import Storage, is_remote, split
from qlip.errors import QLIPError

GAP = 1 << 16
"""Bytes between two files of a sample up to which they are read together."""
LARGEST_SPAN = 1 << 28
"""Bytes of a block up to which it is read by one request."""


class TarImages(CaptionedImages):
    """Images in tar files: files of one key (the path up to a dot, see `tar_index.groups`) are one sample.

    The image ends in one of `IMAGE_SUFFIXES`, the annotation is ``.json`` or else ``.txt``; without a label in it, the
    class in a ``.cls`` file is the label. Other files and keys without an image are ignored. The order is that of
    shards and files.

    Args:
        pattern: a path or an address that fsspec knows, braces (``train-{000..012}.tar``, ``{cats,dogs}.tar``) or a
            glob; or a list of these.
        caption_field: JSON field of the caption; by default ``caption`` and the list ``captions``.
        name: of the source in logs; by default the last component of the pattern.
        index: folder of the index files; by default each is beside its shard.
        retry: for remote shards.
        block_size: number of consecutive samples per request to remote storage; by default one.
        keep_blocks: number of blocks to cache.

    Raises:
        QLIPError: no such file, no tar, a truncated one, a name twice in one, no image, an unknown field, a stale
            index, a remote shard without an index.
    """

    def __init__(
        self,
        pattern: str | Path | Sequence[str | Path],
        caption_field: str | None = None,
        name: str | None = None,
        *,
        index: str | None = None,
        retry: RetryPolicy | None = None,
        block_size: int | None = None,
        keep_blocks: int = 0,
    ) -> None:
        patterns = [pattern] if isinstance(pattern, str | Path) else list(pattern)
        self.storage = Storage(retry)
        self.shards = [path for one in patterns for path in expand(str(one), self.storage)]
        self.caption_field, self.block_size = caption_field, block_size
        self.name = printable(name or split(str(patterns[0]))[1])
        self._indexed = IndexedShards(self.shards, index, self.storage)
        self._prefetcher = Prefetcher(self.storage, keep_blocks)
        self.remote = any(is_remote(shard) for shard in self.shards)
        if not len(self._indexed):
            raise QLIPError(f"{patterns[0]}: no image in it; it should hold {', '.join(IMAGE_SUFFIXES)} files")
        if caption_field is not None:
            check_captions(self.read, len(self))

    def __len__(self) -> int:
        return len(self._indexed)

    def key(self, index: int) -> str:
        shard, number = self._indexed.locate(index)
        return printable(self._indexed.index(shard).key(number))

    def chunk_sizes(self) -> list[int]:
        return list(self._indexed.counts)

    def read(self, index: int) -> RawSample:
        return raw_sample(*self.files(index), self.caption_field)

    def files(self, index: int) -> tuple[str, str, bytes, bytes | None, bytes | None, bytes | None]:
        """Key, place for errors, and bytes of a sample's image, ``.txt`` or ``.json``, and ``.cls``; None if absent."""
        number, sample = self._indexed.locate(index)
        shard, table = self.shards[number], self._indexed.index(number)
        entry, key = table.entry(sample), printable(table.key(sample))
        parts = self._parts(entry)
        if is_remote(shard):
            data = self._cut(shard, parts, *self._remote(number, sample, parts))
        else:
            data = self._local(shard, parts)
        read = dict(zip(parts, data, strict=True))
        text, record, cls = (None if part is None else read.get(part) for part in (entry.text, entry.record, entry.cls))
        return key, f"{shard}: {key}", read[entry.image], text, record, cls

    def label(self, index: int) -> str | None:
        number, sample = self._indexed.locate(index)
        shard, entry = self.shards[number], self._indexed.index(number).entry(sample)
        parts = [part for part in (entry.record, entry.cls) if part is not None]
        if not parts or is_remote(shard):
            return None
        read = dict(zip(parts, self._local(shard, parts), strict=True))
        label = None
        if entry.record is not None:
            label = read_json(read[entry.record], f"{shard}: {self.key(index)}", self.caption_field).label
        return label or (None if entry.cls is None else class_in(read[entry.cls]))

    def stamp(self, index: int) -> str:
        shard = self.shards[self._indexed.locate(index)[0]]
        return "" if is_remote(shard) else stamp_of(shard)

    def prefetch(self, indices: Sequence[int]) -> None:
        wanted: list[Span] = []
        for index in indices:
            number, sample = self._indexed.locate(index)
            if is_remote(self.shards[number]):
                entry = self._indexed.index(number).entry(sample)
                wanted.append(self._span(number, sample, self._parts(entry)))
        if wanted:
            self._prefetcher.prefetch(wanted)

    def close(self) -> None:
        self._prefetcher.close()

    def _parts(self, entry: IndexEntry) -> list[FileSpan]:
        """Spans to read: the image, the annotation file that is used and the class file, if any."""
        annotation = entry.record if entry.record is not None or self.caption_field is not None else entry.text
        return [entry.image, *(part for part in (annotation, entry.cls) if part is not None)]

    def _local(self, shard: str, parts: list[FileSpan]) -> list[bytes]:
        begin, end = _bounds(parts)
        if end - begin <= sum(part.size for part in parts) + GAP:
            return self._cut(shard, parts, self.storage.read(shard, begin, end - begin), begin)
        cut = []
        for part in parts:
            begin = part.offset - BLOCK
            cut += self._cut(shard, [part], self.storage.read(shard, begin, part.size + BLOCK), begin)
        return cut

    def _remote(self, number: int, sample: int, parts: list[FileSpan]) -> tuple[bytes, int]:
        span = self._span(number, sample, parts)
        return self._prefetcher.get(span), span[1]

    def _span(self, number: int, sample: int, parts: list[FileSpan]) -> Span:
        """Bytes to request from remote storage: the sample's, or its whole block's."""
        begin, end = _bounds(parts)
        if self.block_size is not None:
            table, first = self._indexed.index(number), sample // self.block_size * self.block_size
            block = table.span(first, first + self.block_size)
            if block[1] - block[0] <= LARGEST_SPAN:
                begin, end = block
        return self.shards[number], begin, end

    @staticmethod
    def _cut(shard: str, parts: list[FileSpan], data: bytes, begin: int) -> list[bytes]:
        """Cut files out of the bytes around them; the header before each must be the indexed one."""
        for part in parts:
            at = part.offset - begin
            if zlib.crc32(data[at - BLOCK : at]) != part.check:
                raise stale(shard)
        return [data[part.offset - begin : part.offset - begin + part.size] for part in parts]


def _bounds(parts: list[FileSpan]) -> tuple[int, int]:
    return min(part.offset for part in parts) - BLOCK, max(part.offset + part.size for part in parts)
