"""Writing a small file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from qlip.errors import QLIPError


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` beside `path`, flush it to the disk, then rename it into place.

    Whatever fails, `path` holds what it held before and nothing is left beside it (a kill -9 may leave a
    `.qlip-*.tmp`). A symbolic link is followed.

    Raises:
        QLIPError: it cannot be written (no folder, no right, no space, not a regular file).
    """
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():  # renaming would replace a device or a pipe by a file
            raise QLIPError(f"{os.fspath(path)}: not a regular file; give another path")
        aside = target.with_name(f".qlip-{secrets.token_hex(8)}.tmp")
        try:
            with open(aside, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, target)
        except BaseException:  # Ctrl-C too; always raised again
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise QLIPError(
            f"{os.fspath(path)}: cannot be written ({error.strerror}); nothing was left there, "
            "free some space or give a path in a folder that you can write to"
        ) from None
