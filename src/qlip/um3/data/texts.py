"""Texts in files: Parquet tables, JSON Lines and plain text files, one document each.

What is no text is left out, and named by its place, in the file's order with the texts.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlip.data.shards.shard_patterns import expand
from qlip.data.sources.parquet import open_table, rows_of
from qlip.data.storage.retry import unreadable
from qlip.data.storage.storage import Storage, is_remote, local_path
from qlip.errors import QLIPError, require
from qlip.files import encodable, refuse_special

PLAIN = (".txt", ".md")
SUFFIXES = (".parquet", ".jsonl", *PLAIN)
ROWS = 256
"""Rows of a table that are read at once."""


@dataclass(frozen=True)
class Broken:
    """A place in a file without a document: its name, and the fault in one line."""

    where: str
    reason: str


def files_of(pattern: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[str]:
    """Files of a pattern, all of one of the suffixes.

    Raises:
        QLIPError: nothing matches, or a file of another suffix.
    """
    files = [path if is_remote(path) else str(local_path(path)) for path in expand(pattern)]
    wrong = next((file for file in files if not file.endswith(suffixes)), None)
    if wrong is not None:
        raise QLIPError(f"{wrong}: give files whose names end with {', '.join(suffixes)}")
    return files


def read_texts(pattern: str, field: str = "text") -> Iterator[str | Broken]:
    """Iterate over the texts of files, in order.

    Args:
        pattern: path or address, with braces and globs.
        field: column or key of the text.

    Raises:
        QLIPError: a file cannot be read, or a table has no such column.
    """
    for file in files_of(pattern):
        yield from read_file(file, field)


def read_file(file: str, field: str = "text") -> Iterator[str | Broken]:
    """Iterate over the texts of a file; see `read_texts`."""
    for where, found in _documents(file, field):
        usable = isinstance(found, Broken) or (isinstance(found, str) and found.strip() and encodable(found) == found)
        yield found if usable else Broken(where, f"{where}: {_fault(found, field)}")  # type: ignore[misc]


def _fault(found: object, field: str) -> str:
    if found is None:
        return f"has no {field!r}"
    if not isinstance(found, str):
        return f"{field!r} is a {type(found).__name__}, not a text"
    return "the text has half a surrogate pair" if found.strip() else "the text is empty"


def json_lines(file: str) -> Iterator[tuple[str, Any]]:
    """Iterate over the lines of a file, except empty ones: their places, and their values, or `Broken`.

    Raises:
        QLIPError: the file cannot be read.
    """
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        where = f"{file}: line {number:,}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError):  # also for bytes that are not UTF-8, and brackets without end
            yield where, Broken(where, f"{where}: not JSON")


def _documents(file: str, field: str) -> Iterator[tuple[str, object]]:
    """Iterate over the places of a file's documents, and the texts, other values or `Broken` there."""
    if file.endswith(".parquet"):
        yield from _rows(file, field)
    elif file.endswith(".jsonl"):
        for where, item in json_lines(file):
            if isinstance(item, dict):
                yield where, item.get(field)
            else:
                fault = Broken(where, f"{where}: not an object with {field!r}")
                yield where, item if isinstance(item, Broken) else fault
    else:
        try:
            yield file, b"".join(_lines(file)).decode()
        except UnicodeDecodeError:
            yield file, Broken(file, f"{file}: not UTF-8 text")


def _rows(file: str, column: str) -> Iterator[tuple[str, object]]:
    table = open_table(file)
    if column not in table.schema_arrow.names:
        raise QLIPError(f"{file}: no column {column!r}; it has {', '.join(table.schema_arrow.names)}")
    number, arrow = 0, require("pyarrow", extra="tables")
    try:
        for batch in table.iter_batches(ROWS, columns=[column]):
            for row in rows_of(batch):
                yield f"{file}: row {number:,}", row[column]
                number += 1
    except (OSError, arrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise QLIPError(f"{file}: cannot be read after row {number:,} ({reason}); fetch the file again") from None


def _lines(file: str) -> Iterator[bytes]:
    """Iterate over the lines of a file with their ends; a remote file is read whole."""
    if is_remote(file):
        yield from io.BytesIO(Storage().read(file))
        return
    try:
        refuse_special(file)
        with open(file, "rb") as opened:
            first = opened.readline()
            yield first.removeprefix(b"\xef\xbb\xbf")
            yield from opened
    except OSError as error:
        raise unreadable(file, error) from None
