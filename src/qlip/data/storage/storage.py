"""Files by address: local paths, and the remote addresses that fsspec knows (s3://, gs://, https://), with retries.

Credentials and endpoints are configured as fsspec takes them: environment variables, its configuration files, the
files of the cloud's own tools.
"""

from __future__ import annotations

import glob
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from qlip.data.storage.address import public_address
from qlip.data.storage.retry import MissingError, RetryPolicy, one_line, retrying, unreadable
from qlip.errors import QLIPError, install_command, require
from qlip.files import refuse_special, write_bytes

Result = TypeVar("Result")

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Protocol -> the extra of this package that installs its client; ``remote`` for all others."""
OPEN_FILES = 32
COPIED = 8 << 20
"""Bytes of one request of a copy from a store."""
MAX_REDIRECTS = 5
"""Redirects of a web server that are followed when a whole file is read with a bound."""
THREADS = 8
"""Concurrent requests of a process, by default."""


class Storage:
    """Reads and writes whole files and ranges by address, local or remote; pickles into workers.

    Every method raises `QLIPError` for a file that is too short, `MissingError`, `DeniedError`, and `StorageError` if
    remote storage failed as often as `retry` allows.

    Args:
        retry: tries and waits.
        max_bytes: of a remote file that is read whole; a longer answer is an error, and its rest is not fetched.
        threads: concurrent requests of `prefetch` and `map`, shared by all of a process that have the same number.
    """

    def __init__(self, retry: RetryPolicy | None = None, max_bytes: int | None = None, threads: int = THREADS) -> None:
        self.retry, self.max_bytes, self.threads = retry or RetryPolicy(), max_bytes, threads
        self._open = lru_cache(maxsize=OPEN_FILES)(_opened)

    def __reduce__(self) -> tuple[type[Storage], tuple[RetryPolicy, int | None, int]]:
        return Storage, (self.retry, self.max_bytes, self.threads)

    def size(self, address: str) -> int:
        """Size of a file in bytes."""
        if not is_remote(address):
            try:
                return local_path(address).stat().st_size
            except OSError as error:
                raise unreadable(address, error) from error
        size = self._request(address, "info")["size"]
        if size is None:
            raise QLIPError(f"{public_address(address)}: the store does not give its size; copy the file to a disk")
        return int(size)

    def read(self, address: str, offset: int = 0, size: int = -1) -> bytes:
        """`size` bytes from `offset` on (-1: to the end)."""
        if not is_remote(address):
            return self._read_local(address, offset, size)
        if size == 0:
            return b""
        if size < 0 and self.max_bytes is not None:
            return self._read_bounded(address, offset, self.max_bytes)

        def check(data: bytes) -> bytes:
            if size < 0:
                return data
            if len(data) > size:
                shown = public_address(address)
                raise QLIPError(f"{shown}: the store ignores ranges and sends whole files; copy the file to a disk")
            if len(data) < size:
                raise ConnectionError(f"{len(data)} of {size} bytes came")
            return data

        end = offset + size if size > 0 else None
        data: bytes = self._request(address, "cat_file", check=check, start=offset or None, end=end)
        return data

    def read_up_to(self, address: str, size: int) -> bytes:
        """The first `size` bytes, or the whole file if it is shorter."""
        if not is_remote(address):
            return self._read_local(address, 0, size, short=True)
        data: bytes = self._request(address, "cat_file", start=0, end=size)
        return data[:size]

    def copy(self, address: str, file: BinaryIO) -> None:
        """Copy a remote file to the end of an open local one, front to back, so that no server needs ranges for it.

        A request that fails is made again, from where it ended if the server sends ranges.
        """
        system, path = _file_system(address)
        if hasattr(system, "set_session"):
            asyn = require("fsspec.asyn", extra="remote")
            start = file.tell()
            copied = partial(_copy_body, system, path, file, start, self.retry.timeout)
            retrying(lambda: asyn.sync(system.loop, copied), self.retry, address)
            return
        for offset in range(0, length := self.size(address), COPIED):
            file.write(self.read(address, offset, min(COPIED, length - offset)))

    def prefetch(self, address: str, offset: int, size: int) -> Future[bytes]:
        """Start `read` in a thread; ``result()`` of the future waits for it."""
        return _threads(self.threads).submit(self.read, address, offset, size)

    def map(self, function: Callable[[str], Result], addresses: Sequence[str]) -> list[Result]:
        """`function` of each address, in parallel if any is remote."""
        if any(is_remote(address) for address in addresses):
            return list(_threads(self.threads).map(function, addresses))
        return [function(address) for address in addresses]

    def exists(self, address: str) -> bool:
        """True if there is a file."""
        if not is_remote(address):
            return local_path(address).is_file()
        try:
            self.size(address)
        except MissingError:
            return False
        return True

    def write(self, address: str, data: bytes) -> None:
        """Write a whole file; a local one atomically, so that no reader sees half of it."""
        if is_remote(address):
            self._request(address, "pipe_file", data)
        else:
            write_bytes(local_path(address), data)
            self._open.cache_clear()  # the file that was there before may be among them

    def glob(self, pattern: str) -> list[str]:
        """Addresses of the files that match a glob, sorted."""
        if not is_remote(pattern):
            return sorted(glob.glob(str(local_path(pattern)), recursive=True))
        found = self._request(pattern, "glob")
        system, _ = _file_system(pattern)
        return sorted(str(system.unstrip_protocol(path)) for path in found)

    def find(self, folder: str) -> list[str]:
        """Paths of all files under a remote folder, relative to it, sorted."""
        system, root = _file_system(folder)
        root = root.rstrip("/")
        return sorted(str(path).removeprefix(root).lstrip("/") for path in self._request(folder, "find"))

    def _read_bounded(self, address: str, offset: int, most: int) -> bytes:
        """A remote file from `offset` on, of which no more than `most` + 1 bytes are fetched."""
        system, path = _file_system(address)
        if hasattr(system, "set_session"):  # a web server may ignore ranges

            def once() -> bytes:
                asyn = require("fsspec.asyn", extra="remote")
                data: bytes = asyn.sync(system.loop, _body, system, path, offset, most + 1, timeout=self.retry.timeout)
                return data

            data = retrying(once, self.retry, address)
        else:
            data = self._request(address, "cat_file", start=offset or None, end=offset + most + 1)
        if len(data) > most:
            raise QLIPError(f"{public_address(address)}: larger than the {most:,} bytes that are allowed")
        return data

    def _read_local(self, address: str, offset: int, size: int, short: bool = False) -> bytes:
        try:
            file = self._open(str(local_path(address)))
            end = os.fstat(file.fileno()).st_size if size < 0 else offset + size
            data = read_at(file, offset, end - offset)
        except OSError as error:
            raise unreadable(address, error) from error
        if len(data) < end - offset and not short:
            missing = end - offset - len(data)
            raise QLIPError(f"{address}: ends {missing} bytes too early; it changed after it was opened")
        return data

    def _request(
        self, address: str, method: str, *arguments: Any, check: Callable[[Any], Any] | None = None, **values: Any
    ) -> Any:
        """Call a method of the address's file system, with retries."""
        system, path = _file_system(address)

        def once() -> Any:
            answer = _call(system, method, self.retry.timeout, path, *arguments, **values)
            return answer if check is None else check(answer)

        return retrying(once, self.retry, address)


def is_remote(address: str | Path) -> bool:
    """True for an address that fsspec must read; ``file://`` is local."""
    text = str(address)
    return "://" in text and not text.startswith("file://")


def local_path(address: str | Path) -> Path:
    """The path of a local address."""
    return Path(str(address).removeprefix("file://"))


def join(folder: str, name: str) -> str:
    """Address of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else str(local_path(folder) / name)


def split(address: str) -> tuple[str, str]:
    """Folder and name of a file, a query (``?...``) left out of the name."""
    if not is_remote(address):
        path = local_path(address)
        return str(path.parent), path.name
    folder, _, name = address.partition("?")[0].rpartition("/")
    return folder, name


@lru_cache
def _threads(count: int) -> ThreadPoolExecutor:
    """The threads of this process that wait for remote storage."""
    return ThreadPoolExecutor(count, thread_name_prefix="qlip-store")


def _opened(path: str) -> Any:
    refuse_special(path)
    return open(path, "rb", buffering=0)


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """Read bytes at an offset of an open file, fewer at its end. Threads may read one file at the same time."""
    parts: list[bytes] = []  # one, unless more is asked for than the 2 GiB that Linux gives at a time
    while size > 0 and (data := _pread(file.fileno(), size, offset)):
        parts.append(data)
        offset, size = offset + len(data), size - len(data)
    return parts[0] if len(parts) == 1 else b"".join(parts)


_SEEKING = threading.Lock()


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    with _SEEKING:  # Windows: threads share a file's position
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)


def _file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system for an address (it caches one per process), and the path in it."""
    fsspec = require("fsspec", extra="remote")
    protocol = address.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(address)
    except ImportError:
        extra = EXTRAS.get(protocol, "remote")
        shown = public_address(address)
        raise QLIPError(f"{shown}: {protocol}:// needs another package: {install_command(extra)}") from None
    except ValueError as error:
        shown, reason = public_address(address), one_line(error)
        raise QLIPError(f"{shown}: {reason}; give a path, or an address such as s3:// or https://") from None
    return system, str(path)


async def _body(system: Any, url: str, offset: int, size: int) -> bytes:
    """The first `size` bytes of a web server's answer, or fewer; the connection is closed then."""
    session, headers = await system.set_session(), {"Range": f"bytes={offset}-"} if offset else {}
    chunks, missing = [], size
    async with session.get(system.encode_url(url), max_redirects=MAX_REDIRECTS, headers=headers) as answer:
        answer.raise_for_status()
        async for chunk in answer.content.iter_any():
            chunks.append(chunk[:missing])
            missing -= len(chunks[-1])
            if not missing:
                answer.close()
                break
    return b"".join(chunks)


async def _copy_body(system: Any, url: str, file: BinaryIO, start: int, timeout: float) -> None:
    """Write a web server's answer to a file that has its first bytes from `start` on; `timeout` is for each chunk."""
    aiohttp, session, done = require("aiohttp", extra="remote"), await system.set_session(), file.tell() - start
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    limits = aiohttp.ClientTimeout(sock_connect=timeout, sock_read=timeout)
    address = system.encode_url(url)
    async with session.get(address, max_redirects=MAX_REDIRECTS, headers=headers, timeout=limits) as answer:
        if done and answer.status != 206:  # the whole file, or an error
            file.seek(start)
            file.truncate()
        answer.raise_for_status()
        async for chunk in answer.content.iter_any():
            file.write(chunk)


def _call(system: Any, method: str, timeout: float, *arguments: Any, **values: Any) -> Any:
    asyn = require("fsspec.asyn", extra="remote")
    if isinstance(system, asyn.AsyncFileSystem):  # so a request that hangs is ended
        return asyn.sync(system.loop, getattr(system, f"_{method}"), *arguments, timeout=timeout, **values)
    return getattr(system, method)(*arguments, **values)
