"""Files that are written whole or not at all."""

from __future__ import annotations

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
        raise QLIPError(
            f"{path}: cannot write ({error.strerror or error}); free the disk or choose another folder"
        ) from None
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
