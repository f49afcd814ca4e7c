"""Reading a file front to back by (offset, size): directly if it is local, by prefetched chunks if it is remote."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

from qlip.data.storage.storage import Storage, is_remote, local_path, read_at
from qlip.errors import QLIPError
from qlip.files import refuse_special

CHUNK = 2 << 20
"""Bytes of one request; a reader holds the current chunk and the next."""

Fetch = Callable[[int, int], bytes]
"""Function from (offset, size) to the bytes there, fewer at the end of the file."""


class ChunkedReader:
    """A `Fetch` of a remote file, read mostly forwards: ranged requests of `chunk` bytes, the next one prefetched.

    A request that fails is retried, so a dropped connection costs one chunk. Memory: two chunks and the result.
    """

    def __init__(self, storage: Storage, address: str, length: int, chunk: int = CHUNK) -> None:
        self.storage, self.address, self.length, self.chunk = storage, address, length, chunk
        self._pending: dict[int, Future[bytes]] = {}

    def __call__(self, offset: int, size: int) -> bytes:
        """The bytes at an offset, fewer at the end of the file."""
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
        """Cancel the chunk that is being fetched."""
        for future in self._pending.values():
            future.cancel()
        self._pending.clear()

    def _chunk(self, number: int) -> bytes:
        for wanted in (number, number + 1):
            begin = wanted * self.chunk
            if wanted not in self._pending and begin < self.length:
                size = min(self.chunk, self.length - begin)
                self._pending[wanted] = self.storage.prefetch(self.address, begin, size)
        for old in [other for other in self._pending if not number <= other <= number + 1]:
            self._pending.pop(old).cancel()
        return self._pending[number].result()


@contextmanager
def open_reader(address: str, storage: Storage) -> Iterator[tuple[Fetch, int]]:
    """Open a file; yields its `Fetch` and its length in bytes.

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
    refuse_special(local_path(address))
    try:
        file = open(local_path(address), "rb", buffering=0)  # noqa: SIM115 - closed below
    except OSError as error:
        raise QLIPError(f"{address}: {error.strerror or error}; check the path") from error
    with file:  # no mapping: a file that shrinks meanwhile would end the process
        yield partial(read_at, file), os.fstat(file.fileno()).st_size
