"""Files that are written whole or not at all, and locks that die with their process."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlip.errors import QLIPError


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a path beside ``path`` to write to; on success it is flushed to disk and renamed into place.

    The old file, if any, stays whole until then, and nothing is left behind on failure.

    Raises:
        QLIPError: the disk is full, or the folder cannot be written.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        flush(aside)
        os.replace(aside, path)
        flush(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        with suppress(OSError):  # no folder, no name: the error above says so
            aside.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically. Raises QLIPError as :func:`written_aside` does."""
    with written_aside(path) as aside:
        aside.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically. Raises QLIPError as :func:`written_aside` does."""
    write_bytes(path, text.encode())


def flush(path: Path) -> None:
    """Make a file, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, message: str) -> Iterator[None]:
    """Hold a lock that one process at a time can have; it goes with the process, however that ends.

    Args:
        path: a folder, which is locked itself, or a file, which is made, with its folder, and left.
        message: of the error where somebody else holds it; one line that names what, and the remedy.

    Raises:
        QLIPError: somebody else holds it, or there can be no lock.
    """
    import fcntl  # not on Windows, where all else here works

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise QLIPError(message) from None
        except OSError as error:  # a network's file system without locks
            raise _unwritable(path, error) from None
        yield
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unwritable(path: Path, error: OSError) -> QLIPError:
    return QLIPError(f"{path}: cannot write ({error.strerror or error}); free the disk or choose another folder")
