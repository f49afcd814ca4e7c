"""Shards of one source with their indexes, as one sequence of numbered samples."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

from qlip.data.shards.shard_index import IndexHeader, ShardIndex, index_address, read_header, scan
from qlip.data.shards.tar_index import BLOCK
from qlip.data.storage.retry import MissingError, StorageError
from qlip.data.storage.storage import Storage, is_remote, local_path, split
from qlip.errors import QLIPError
from qlip.files import cache_folder, write_bytes

MAPPED = 4096
"""Maximum number of index files that a process keeps mapped."""


class StaleIndexError(StorageError):
    """Error for an index that belongs to another tar."""


class IndexedShards:
    """Samples 0, 1, 2, ... over all shards in their order.

    The header of a shard's index file gives its count; the rest is mapped on first use. A local shard without an index
    file is scanned, a remote one is refused. Pickles are small: workers map the index files themselves.

    Args:
        shards: addresses.
        folder: folder of the index files, which must then exist; by default they are beside the shards.
        storage: reads.

    Raises:
        QLIPError: a shard does not exist or is not a tar, an index is stale, or a remote shard has no index.
    """

    def __init__(self, shards: Sequence[str], folder: str | None, storage: Storage) -> None:
        self.shards, self.folder, self.storage = list(shards), folder, storage
        if folder is not None:
            refuse_equal_names(self.shards)
        self._headers = storage.map(self._header, self.shards)
        self._scanned = {n: scan(self.shards[n], storage) for n, head in enumerate(self._headers) if head is None}
        self.counts = [(self._scanned[n] if head is None else head).samples for n, head in enumerate(self._headers)]
        self._starts = list(accumulate(self.counts, initial=0))
        self._reset_cache()
        self._check_indexes()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "index"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset_cache()

    def locate(self, sample: int) -> tuple[int, int]:
        """Return the number of the shard that holds a sample, and the sample's position in it."""
        shard = bisect_right(self._starts, sample) - 1
        return shard, sample - self._starts[shard]

    def _reset_cache(self) -> None:
        self.index = lru_cache(maxsize=MAPPED)(self._index)

    def _index(self, shard: int) -> ShardIndex:
        """Return the index of a shard; a remote one is copied to the cache, under its digest."""
        head = self._headers[shard]
        if head is None:
            return self._scanned[shard]
        address = index_address(self.shards[shard], self.folder)
        if not is_remote(address):
            return ShardIndex.from_file(local_path(address), address)
        copy = cache_folder() / "indexes" / f"{head.digest}.index"
        if not copy.is_file():
            write_bytes(copy, self.storage.read(address))
        index = ShardIndex.from_file(copy, address)
        if (index.tar_size, index.samples) != (head.tar_size, head.samples):
            raise StorageError(f"{address}: changed during the run; start again")
        return index

    def _header(self, shard: str) -> IndexHeader | None:
        address = index_address(shard, self.folder)
        try:
            return read_header(address, self.storage)
        except MissingError:
            if self.folder is not None:
                raise QLIPError(
                    f"{address}: no index of {shard} there; make it with `qlip data index {shard} -o {self.folder}`"
                ) from None
            if not is_remote(shard):
                return None
        raise QLIPError(f"{shard}: no index beside it; make one with `qlip data index`, or set streaming: true")

    def _check_indexes(self) -> None:
        """Refuse a stale index by size, first and last sample: of every local shard and the first remote one."""
        checked = 0
        for shard, (address, head) in enumerate(zip(self.shards, self._headers, strict=True)):
            if head is None or (is_remote(address) and checked):
                continue  # every read checks the header in any case
            checked += 1
            if self.storage.size(address) != head.tar_size:
                raise stale(address)
            index = self.index(shard)
            for sample in {0, len(index) - 1} if len(index) else ():
                image = index.entry(sample).image
                if zlib.crc32(self.storage.read(address, image.offset - BLOCK, BLOCK)) != image.check:
                    raise stale(address)


def stale(shard: str) -> StaleIndexError:
    """Return the error for an index that does not belong to a shard."""
    return StaleIndexError(
        f"{shard}: its index belongs to another tar, or the tar changed; make it again with `qlip data index`"
    )


def refuse_equal_names(shards: Sequence[str]) -> None:
    """Refuse shards of equal names, whose index files would collide in one folder. Raises QLIPError."""
    seen: dict[str, str] = {}
    for shard in shards:
        name = split(shard)[1]
        if seen.setdefault(name, shard) != shard:
            raise QLIPError(f"{seen[name]} and {shard} have the same name; use an index folder per folder of shards")
