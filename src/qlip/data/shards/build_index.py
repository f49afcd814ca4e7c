"""Building the index file of a tar shard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qlip.data.shards.indexed import IndexedShards, StaleIndexError
from qlip.data.shards.shard_index import index_address, read_header, scan
from qlip.data.storage.retry import MissingError, StorageError
from qlip.data.storage.storage import Storage
from qlip.errors import QLIPError

READ_ONLY = ("http://", "https://")


@dataclass(frozen=True)
class BuiltIndex:
    """A shard and its index.

    Attributes:
        shard, index: addresses.
        samples: number of samples.
        made: False if an index of this shard existed already.
    """

    shard: str
    index: str
    samples: int
    made: bool


def build_index(
    shard: str,
    storage: Storage,
    folder: str | None = None,
    force: bool = False,
    on_progress: Callable[[int], None] = lambda offset: None,
) -> BuiltIndex:
    """Build the index of one shard, unless a valid one exists.

    The index file is written atomically. A remote shard is read once from front to back.

    Args:
        shard: address of the tar.
        storage: reads the tar and writes the index.
        folder: folder of the index file; by default it is beside the shard.
        force: build it even if a valid one exists.
        on_progress: called now and then with the number of bytes that were read.

    Raises:
        QLIPError: no such file, not a tar, truncated, a duplicate file name, or the index cannot be written.
    """
    address = index_address(shard, folder)
    if address.startswith(READ_ONLY):
        raise QLIPError(f"{shard}: this storage is read-only; name a folder for the index file")
    known = None if force else _samples(shard, address, storage, folder)
    if known is not None:
        return BuiltIndex(shard, address, known, made=False)
    index = scan(shard, storage, on_progress)
    storage.write(address, index.to_bytes())
    return BuiltIndex(shard, address, len(index), made=True)


def _samples(shard: str, address: str, storage: Storage, folder: str | None) -> int | None:
    """Return the number of samples in a valid index, or None."""
    try:
        read_header(address, storage)
        return len(IndexedShards([shard], folder, storage))
    except (StaleIndexError, MissingError):
        return None
    except StorageError:
        raise
    except QLIPError:  # no index, or one of another version
        return None
