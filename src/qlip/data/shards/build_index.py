"""Making the index files of tar shards, each once and whole."""

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
    """A shard with its index.

    Attributes:
        shard, index: addresses.
        samples: images in it.
        made: False where a right index was there already.
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
    tick: Callable[[int], None] = lambda offset: None,
) -> BuiltIndex:
    """The index of one shard, made where there is none, or one of another tar or format.

    It is put in its place only when it is whole. A remote shard is read through, once.

    Args:
        shard: address of the tar.
        storage: reads and writes.
        folder: where the index goes; beside the shard by default.
        force: make it again in any case.
        tick: told how many bytes of the shard are behind.

    Raises:
        QLIPError: no such file, not a tar, truncated, a name twice in it, or the index cannot be written.
    """
    address = index_address(shard, folder)
    if address.startswith(READ_ONLY):
        raise QLIPError(f"{shard}: nothing can be written there; say with -o in which folder its index should lie")
    known = None if force else _samples(shard, address, storage, folder)
    if known is not None:
        return BuiltIndex(shard, address, known, made=False)
    index = scan(shard, storage, tick)
    storage.write(address, index.to_bytes())
    return BuiltIndex(shard, address, len(index), made=True)


def _samples(shard: str, address: str, storage: Storage, folder: str | None) -> int | None:
    """Count of samples by a right index, or None."""
    try:
        read_header(address, storage)
        return len(IndexedShards([shard], folder, storage))
    except (StaleIndexError, MissingError):
        return None
    except StorageError:
        raise
    except QLIPError:  # not an index, or of another version
        return None
