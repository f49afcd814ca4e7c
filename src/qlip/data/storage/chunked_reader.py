"""A tar as a function from (offset, size) to bytes: directly where it is local, by chunks where it is not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from qlip.data.shards.tar_index import Fetch
from qlip.data.storage.storage import Storage, is_remote, local_path
from qlip.errors import QLIPError

CHUNK = 2 << 20
"""Bytes of one request; a reader holds this one and the next."""


class ChunkedReader:
    """A remote file read mostly forwards: ranged requests of `CHUNK` bytes, the next one always under way.

    A request that fails is made again, so a dropped connection costs one chunk. Memory: two chunks and the answer.
    """

    def __init__(self, storage: Storage, address: str, length: int, chunk: int = CHUNK) -> None:
        self.storage, self.address, self.length, self.chunk = storage, address, length, chunk
        self._under_way: dict[int, Future[bytes]] = {}

    def __call__(self, offset: int, size: int) -> bytes:
        """The bytes there, fewer at the end of the file."""
        end = min(offset + size, self.length)
        if end <= offset:
            return b""
        first, last = offset // self.chunk, (end - 1) // self.chunk
        parts = []
        for number in range(first, last + 1):
            data, begin = self._chunk(number), number * self.chunk
            parts.append(data[max(0, offset - begin) : end - begin])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Ask for nothing more."""
        for future in self._under_way.values():
            future.cancel()
        self._under_way.clear()

    def _chunk(self, number: int) -> bytes:
        for wanted in (number, number + 1):
            begin = wanted * self.chunk
            if wanted not in self._under_way and begin < self.length:
                size = min(self.chunk, self.length - begin)
                self._under_way[wanted] = self.storage.prefetch(self.address, begin, size)
        for old in [one for one in self._under_way if not number <= one <= number + 1]:
            self._under_way.pop(old).cancel()
        return self._under_way[number].result()


@contextmanager
def open_reader(address: str, storage: Storage) -> Iterator[tuple[Fetch, int]]:
    """A file as `Fetch`, and its length.

    Raises:
        QLIPError: it cannot be opened.
    """
    if is_remote(address):
        window = ChunkedReader(storage, address, storage.size(address))
        try:
            yield window, window.length
        finally:
            window.close()
        return
    try:
        file = open(local_path(address), "rb", buffering=0)  # noqa: SIM115 - closed below
    except OSError as error:
        raise QLIPError(f"{address}: {error.strerror or error}; check the path") from error
    with file:  # no mapping: a file that shrinks meanwhile would end the process
        descriptor = file.fileno()
        yield (lambda offset, size: os.pread(descriptor, size, offset)), os.fstat(descriptor).st_size
