"""A remote file as a Python file object, for libraries that need one."""

from __future__ import annotations

import io
from typing import Any

from qlip.data.storage.storage import Storage


class RemoteFile(io.RawIOBase):
    """A seekable, read-only, unbuffered file object; every read is a request.

    Raises:
        QLIPError: as `Storage`.
    """

    def __init__(self, storage: Storage, address: str) -> None:
        self.storage, self.address, self._at = storage, address, 0
        self._length = storage.size(address)

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Offset of the next read."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the offset of the next read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; returns the number of bytes."""
        size = max(0, min(len(buffer), self._length - self._at))
        data = self.storage.read(self.address, self._at, size) if size else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
