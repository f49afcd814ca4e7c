"""Resumable work in a folder: a plan of everything that its files depend on, and files written atomically.

A `Workspace` is a folder with its plan. `claim` writes the plan, or refuses a folder that holds another plan and names
the keys that differ. `done`, `read`, `write` and `writing` handle the results; a killed run continues with the files
that are missing. `lock` excludes other processes. The folder may be in remote storage: pass an object with the methods
of `Files`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from qlip.errors import QLIPError
from qlip.files import locked, unnamed_file, write_bytes, written_aside

PLAN = "plan.json"


class Files(Protocol):
    """Storage by address; `write` is atomic. `qlip.data.storage.storage.Storage` is one."""

    def exists(self, address: str) -> bool:
        """Return whether there is a file."""
        ...

    def read(self, address: str) -> bytes:
        """Read a whole file."""
        ...

    def write(self, address: str, data: bytes) -> None:
        """Write a file atomically."""
        ...


class Workspace:
    """Folder of resumable work.

    Args:
        folder: path or, with `files`, an address; the first write makes it.
        plan: JSON values by key: everything that the results depend on.
        of: noun for the work in errors, such as "measurement".
        record: name of the file that holds the plan.
        files: reads and writes a folder that is not on this machine's disk.
    """

    def __init__(
        self,
        folder: str | Path,
        plan: Mapping[str, object],
        *,
        of: str = "run",
        record: str = PLAN,
        files: Files | None = None,
    ) -> None:
        self.folder, self.of, self.record = str(folder), of, record
        self.plan: dict[str, object] = json.loads(json.dumps(plan))  # tuples become lists, as in the file
        self._files = files

    def claim(self, *, restart: bool = False) -> None:
        """Write the plan, or compare it with the stored one.

        Args:
            restart: delete the results of another plan instead of raising an error.

        Raises:
            QLIPError: the folder holds another plan, or cannot be written.
        """
        if self.done(self.record):
            changed = self.changed_keys()
            if not changed:
                return
            if not restart:
                raise QLIPError(
                    f"{self.folder}: holds another {self.of} ({', '.join(changed)} differ);"
                    " choose another folder, or delete this one"
                )
        if restart:
            self.clear()
        self.write(self.record, (json.dumps(self.plan, indent=1) + "\n").encode())

    def path(self, name: str) -> Path:
        """Path of a file on this machine's disk."""
        return Path(self.folder) / name

    def done(self, name: str) -> bool:
        """Return whether a file was written."""
        return self.path(name).exists() if self._files is None else self._files.exists(self._address(name))

    def read(self, name: str) -> bytes:
        """Read a whole file. Raises OSError, or the error of a remote storage."""
        return self.path(name).read_bytes() if self._files is None else self._files.read(self._address(name))

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically. Raises QLIPError: the folder cannot be written."""
        if self._files is None:
            write_bytes(self.path(name), data)
        else:
            self._files.write(self._address(name), data)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a temporary path to write to; the file is put in place when the context ends without an error.

        Raises:
            QLIPError: the folder cannot be written.
        """
        if self._files is None:
            with written_aside(self.path(name)) as aside:
                yield aside
            return
        with unnamed_file() as (file, path):
            yield Path(path)
            file.seek(0)
            self._files.write(self._address(name), file.read())

    def lock(self) -> AbstractContextManager[None]:
        """Lock a folder on this machine's disk. Raises QLIPError: another process holds the lock."""
        return lock_folder(Path(self.folder), f"another {self.of} is running here; wait for it, or stop it")

    def clear(self) -> None:
        """Delete everything in a folder on this machine's disk, the folder included."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def changed_keys(self) -> list[str]:
        """Return the keys of the plan that differ from the stored one; the record's name if it cannot be read."""
        try:
            stored = json.loads(self.read(self.record))
        except ValueError:
            return [self.record]
        if not isinstance(stored, dict):
            return [self.record]
        missing = object()
        keys = self.plan.keys() | stored.keys()
        return sorted(key for key in keys if self.plan.get(key, missing) != stored.get(key, missing))

    def _address(self, name: str) -> str:
        return f"{self.folder.rstrip('/')}/{name}"


@contextmanager
def lock_folder(folder: Path, message: str) -> Iterator[None]:
    """Make a folder and hold its lock, which ends with the process.

    Args:
        folder: on this machine's disk.
        message: end of the error if another process holds the lock: the work that runs there, and the remedy.

    Raises:
        QLIPError: another process holds the lock, or the folder cannot be made or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise QLIPError(f"{folder}: is a file; give a folder") from None
    except OSError as error:
        raise QLIPError(f"{folder}: cannot write ({error.strerror or error}); choose another folder") from None
    with locked(folder, f"{folder}: {message}"):
        yield
