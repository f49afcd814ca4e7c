"""Atomic writes, small text files, folders, and locks that end with their process."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import stat
import tempfile
import uuid
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from qlip.errors import QLIPError, QLIPWarning

IMAGE_SUFFIXES = tuple("jpg jpeg png webp avif bmp gif tif tiff jfif jpe jp2 ppm pgm pbm tga ico".split())
"""Suffixes of image files in folders and shards, the preferred one first; a file named by itself may have any."""

BESIDE = (".txt", ".json", ".jsonl", ".csv", ".md")
"""Suffixes of captions, tables and notes beside images, whose absence among the images is no surprise."""


@contextmanager
def written_aside(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; on success it is flushed to disk and renamed to ``path``.

    An existing file stays intact until then, and nothing is left behind on failure.

    Args:
        path: of the file.
        durable: flush to disk, which takes milliseconds; without it a power failure, but no kill, can damage the file.

    Raises:
        QLIPError: the disk is full, or the folder is not writable.
    """
    start = os.fsencode(path.name)[:200].decode(errors="ignore")  # a name has 255 bytes at most
    aside = path.with_name(f".{start}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        if durable:
            flush(aside)
        os.replace(aside, path)
        if durable:
            flush(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        with suppress(OSError):  # the folder may be absent; the error above says so
            aside.unlink(missing_ok=True)


@contextmanager
def folder_written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to write files to; on success it becomes ``path``, on failure it is removed.

    If ``path`` exists, the files, at any depth, replace those of the same name in it, one by one; its other files stay.

    Raises:
        QLIPError: the disk is full, or the folder is not writable.
    """
    exists = path.is_dir()
    name = f".{uuid.uuid4().hex[:8]}.part"
    aside = path / name if exists else path.absolute().parent / name  # on the file system of its destination
    try:
        aside.mkdir(parents=True)
        yield aside
        written = sorted(aside.rglob("*"))
        for one in written:
            flush(one)
        if exists:
            for one in written:
                place = path / one.relative_to(aside)
                if one.is_dir():
                    place.mkdir(exist_ok=True)
                else:
                    os.replace(one, place)
            flush(path)
        else:
            os.replace(aside, path)
            flush(path.absolute().parent)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def unnamed_file() -> Iterator[tuple[BinaryIO, str]]:
    """Yield an open temporary file, and a path that opens it too while this runs.

    It has no name in a folder, so nothing of it outlives a killed process, except on Windows.
    """
    if os.name == "nt":
        folder = tempfile.TemporaryDirectory(prefix="qlip-", ignore_cleanup_errors=True)
        with folder as name, open(Path(name) / "file", "w+b") as file:
            yield file, file.name
    else:
        with tempfile.TemporaryFile() as file:
            yield file, f"/dev/fd/{file.fileno()}"


def write_bytes(path: Path, data: bytes, durable: bool = True) -> None:
    """Write a file atomically. Raises QLIPError as :func:`written_aside` does."""
    with written_aside(path, durable) as aside:
        aside.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    r"""Write a UTF-8 file atomically. Raises QLIPError as :func:`written_aside` does.

    Half a surrogate pair, Python's form of a byte of a file name that is not UTF-8, is written as an escape such as
    ``\udce9``: in JSON that is the character itself, so the name is read back unchanged.
    """
    write_bytes(path, text.encode(errors="backslashreplace"))


def json_values(value: Any) -> Any:
    """Replace non-finite numbers in nested dicts and lists by "NaN", "Infinity", "-Infinity", as JSON has none."""
    if isinstance(value, Mapping):
        return {key: json_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def text_of(data: bytes, where: str) -> str:
    """Decode UTF-8, with or without a byte-order mark. Raises QLIPError, which begins with `where`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise QLIPError(f"{where}: not UTF-8 text; save it as UTF-8") from None


def encodable(text: str) -> str:
    """Join halves of surrogate pairs, and replace those without the other half by U+FFFD, so that UTF-8 holds it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    r"""Escape control codes as JSON does (``\u001b``), except \n and \t, so that no name or caption steers a terminal.

    Marks that change the direction of what follows are escaped too, and halves of surrogate pairs, which stand for
    bytes of file names that are not UTF-8.
    """
    return _CONTROLS.sub(lambda code: f"\\u{ord(code[0]):04x}", text)


def lines_of(data: bytes, where: str) -> list[str]:
    r"""Lines of a small UTF-8 text file, with or without a byte-order mark; a line ends at \n or \r\n alone.

    Args:
        data: the file's content.
        where: its name, for errors.

    Raises:
        QLIPError: not UTF-8.
    """
    return text_of(data, where).removesuffix("\n").replace("\r\n", "\n").removesuffix("\r").split("\n")


def delimiter_of(table: str, usual: str = ",") -> str:
    r"""Separator of a table's cells: of comma, semicolon and \t the one that is most frequent in its first line."""
    first = table.partition("\n")[0]
    return max((usual, ",", ";", "\t"), key=first.count)


def read_lines(path: Path) -> list[str]:
    """Read a small UTF-8 text file, see :func:`lines_of`. Raises QLIPError: not there, unreadable, not UTF-8."""
    try:
        return lines_of(path.read_bytes(), str(path))
    except OSError as error:
        raise QLIPError(f"{path}: {error.strerror or error}; give a text file") from None


def is_number(text: str) -> bool:
    """Return whether a text is ASCII digits alone; Python's ``isdigit`` takes superscripts and other scripts."""
    return text.isascii() and text.isdigit()


def files_under(folder: str | Path) -> Iterator[str]:
    """Iterate over the files at any depth of a folder, as relative paths with slashes, in no order.

    Hidden files and folders are left out. Pipes, sockets and devices are left out with a `QLIPWarning` that counts
    them. Links are followed, except those that lead back to a folder they lie in; a link that leads nowhere is a file.

    Raises:
        QLIPError: a folder that may not be read.
    """
    special = list[str]()
    yield from _files_in(str(folder), "", frozenset(), special)
    if special:
        count = plural(len(special), "pipe, socket or device", "pipes, sockets or devices")
        first = min(special, key=lambda name: (name.count("/"), name))
        warnings.warn(f"{folder}: {count} left out, such as {escaped(first)}", QLIPWarning, stacklevel=3)


def _files_in(folder: str, prefix: str, around: frozenset[str], special: list[str]) -> Iterator[str]:
    around |= {os.path.realpath(folder)}
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise QLIPError(f"{folder}: {error.strerror}; make this folder readable, or move it away") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if not (entry.is_symlink() and os.path.realpath(entry.path) in around):
                yield from _files_in(entry.path, f"{prefix}{entry.name}/", around, special)
        elif entry.is_file() or not os.path.exists(entry.path):  # a link that leads nowhere is a broken image
            yield prefix + entry.name
        else:
            special.append(prefix + entry.name)


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Return a count and its noun, such as ``1 image`` or ``12 images``; `nouns` is the plural if not with an s."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def suffixes_of(names: Iterable[str]) -> str:
    """Count files by suffix, for people: ``12 .txt, 3 .heic, 1 without suffix``; "" for no file."""
    counts = Counter(Path(name).suffix.lower() or "without suffix" for name in names)
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common())


def refuse_special(path: str | Path, name: str | None = None) -> None:
    """Refuse a pipe, socket or device, whose reading may never end; a path that is not there passes.

    Args:
        path: to read.
        name: in the error; by default the path.

    Raises:
        QLIPError: it is one.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise QLIPError(f"{name or path}: not a regular file but a pipe, socket or device; copy its content to a file")


def flush(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk (fsync). Windows does neither for what is open for reading."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, message: str) -> Iterator[None]:
    """Hold a lock that one process at a time can have; the operating system releases it when the process ends.

    Args:
        path: a folder, which is locked itself, or a file, which is created with its folder and stays.
        message: error message if another process holds the lock; one line with the remedy.

    Raises:
        QLIPError: another process holds the lock, or the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows: a file beside it, held open
        with _locked_beside(path, message):
            yield
        return
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
        except OSError as error:  # a network file system without locks
            raise _unwritable(path, error) from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _locked_beside(path: Path, message: str) -> Iterator[None]:
    """Hold the lock ``PATH.lock``, which stays, where the system cannot lock a folder. Raises as :func:`locked`."""
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=0):
            yield
    except Timeout:
        raise QLIPError(message) from None


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Folder for what is fetched or computed once: `cache_dir`, else ``$QLIP_CACHE``, else ``~/.cache/qlip``."""
    return Path(cache_dir or os.environ.get("QLIP_CACHE") or Path.home() / ".cache" / "qlip")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unwritable(path: Path, error: OSError) -> QLIPError:
    return QLIPError(f"{path}: cannot write ({error.strerror or error}); free the disk or choose another folder")
