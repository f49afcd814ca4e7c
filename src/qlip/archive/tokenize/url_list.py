"""Lists of image URLs: lines of text, or a table with a column of URLs; read in pieces.

``urls.txt`` holds one URL per line. ``.jsonl`` and ``.csv`` hold it in ``url``, ``image``, ``path``, ``file`` or
``file_name``, and captions in ``caption``, ``captions``, ``label`` or the named caption field. Anything but a URL is
a path, relative to the list's folder.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from qlip.data.sources.base import Annotation, CaptionedImages, RawSample, annotation_of, printable
from qlip.data.storage.prefetch import Prefetcher
from qlip.data.storage.retry import DeniedError, RetryPolicy, StorageError
from qlip.data.storage.storage import Storage, is_remote, join, local_path, split
from qlip.errors import QLIPError

PATIENCE = RetryPolicy(tries=3, timeout=20, longest_wait=5)
"""Retries for the servers of a list, some of which no longer exist as a rule."""
LIST_SUFFIXES = (".txt", ".csv", ".jsonl")
ADDRESS_FIELDS = ("url", "image", "path", "file", "file_name")


PUBLIC = ("http://", "https://")
"""Servers that often refuse single images."""


class UnreachableError(QLIPError):
    """A server failed or refused one URL: the image is skipped, unless all of a shard fail."""


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a list.

    Attributes:
        offset, size: range of bytes.
        rows: number of rows.
        first: number of the first row, from 0.
        digest: of the bytes, 16 hex digits.
        header: bytes of the row of column names at the beginning of the list; 0 if there is none.
    """

    offset: int
    size: int
    rows: int
    first: int
    digest: str
    header: int = 0


def list_suffix(address: str) -> str:
    """Return the suffix of a list's name, one of `LIST_SUFFIXES`, without a URL's query; "" if it is no list."""
    name = split(address)[1]
    return next((suffix for suffix in LIST_SUFFIXES if name.endswith(suffix)), "")


def pieces(address: str, rows: int, storage: Storage) -> list[Piece]:
    """Cut a list into pieces of so many rows; the last one may be smaller.

    Raises:
        QLIPError: no such list, nothing in it, or no column of addresses.
    """
    data = storage.read(address)
    ends = [end for end, _ in _raw_rows(address, data)]
    header = ends.pop(0) if list_suffix(address) == ".csv" and ends else 0
    found: list[Piece] = []
    for first in range(0, len(ends), rows):
        start, last = (ends[first - 1] if first else header), ends[min(first + rows, len(ends)) - 1]
        digest = hashlib.sha256(data[start:last]).hexdigest()[:16]
        found.append(Piece(start, last - start, min(rows, len(ends) - first), first, digest, header))
    if not found:
        raise QLIPError(f"{address}: no URL in it; write one per line")
    return found


class UrlList(CaptionedImages):
    """Images of one piece of a list.

    Keys are the URLs as in the list; a repeated URL is numbered: ``URL#2``.

    Args:
        address: of the list.
        piece: rows to read.
        caption_field: column of the caption; by default ``caption`` and the list ``captions``.
        storage: reads the list.

    Raises:
        QLIPError: the list changed, or its rows cannot be told apart. A row without a URL is one skipped image.
        DeniedError: an image on this machine or in a store may not be read; on the web that is an
            `UnreachableError` of this image.
    """

    def __init__(self, address: str, piece: Piece, caption_field: str | None, storage: Storage) -> None:
        self.name, self.storage, self.caption_field = split(address)[1], Storage(PATIENCE), caption_field
        self._folder, self._prefetcher = split(address)[0], Prefetcher(self.storage, keep=0)
        data = storage.read(address, piece.offset, piece.size)
        if hashlib.sha256(data).hexdigest()[:16] != piece.digest:
            raise QLIPError(f"{address}: changed after it was opened; start again")
        self._first = piece.first
        self._rows = list(_rows(address, storage.read(address, 0, piece.header) + data))
        if len(self._rows) != piece.rows:
            raise QLIPError(f"{address}: rows {piece.first + 1:,} on cannot be told apart; write it as .jsonl")
        urls = [url or f"row {piece.first + number}" for number, (url, _) in enumerate(self._rows, 1)]
        self._keys = list(_numbered([printable(url) for url in urls]))
        self.remote = any(url is not None and is_remote(self._address(url)) for url, _ in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        return self._keys[index]

    def read(self, index: int) -> RawSample:
        url, record = self._rows[index]
        where = f"row {self._first + index + 1}"
        if url is None:
            raise QLIPError(f"{where}: names no image; a field 'url' should hold its URL")
        annotation = annotation_of(record, where, self.caption_field) if record else Annotation()
        address = self._address(url)
        try:
            image = self._prefetcher.get((address, 0, -1)) if is_remote(address) else self.storage.read(address)
        except DeniedError as error:
            if address.startswith(PUBLIC):
                raise UnreachableError(str(error)) from None
            raise
        except StorageError as error:
            reason = str(error.__cause__ or error) or type(error.__cause__).__name__
            raise UnreachableError(f"{self._keys[index]}: {reason}") from None
        return RawSample(image, annotation.captions, annotation.label, self._keys[index], annotation.text_fault)

    def prefetch(self, indices: Sequence[int]) -> None:
        addresses = [self._address(url) for index in indices if (url := self._rows[index][0]) is not None]
        self._prefetcher.prefetch([(address, 0, -1) for address in addresses if is_remote(address)])

    def close(self) -> None:
        self._prefetcher.close()

    def _address(self, url: str) -> str:
        if is_remote(url) or (not is_remote(self._folder) and local_path(url).is_absolute()):
            return url
        return join(self._folder, url)


def _raw_rows(address: str, data: bytes) -> Iterator[tuple[int, list[str]]]:
    """Yield the end and the cells of each row; in .txt and .jsonl a line is a row of one cell.

    Blank lines are skipped. A csv row may hold line breaks; the first one holds column names.
    """
    table, text = list_suffix(address) == ".csv", _text(data, address)
    end = len(BOM_UTF8) if data.startswith(BOM_UTF8) else 0
    blank, number = True, 0 if table else 1

    def lines() -> Iterator[str]:
        nonlocal end, blank
        # one line more than there is: only an open quote consumes it
        for line in chain(io.StringIO(text, newline="" if table else "\n"), ["\n"] if table else []):
            end, blank = end + len(line.encode()), blank and not line.strip()
            yield line

    try:
        for cells in csv.reader(lines()) if table else ([line] for line in lines()):
            if not blank:
                if end > len(data):
                    raise csv.Error("opens a quote that nothing closes")
                if table and number == 0:
                    _check_names(address, cells)
                yield end, cells
                number += 1
            blank = True
    except csv.Error as error:
        raise QLIPError(f"{address}: row {number:,} {error}; close the quote, or write the list as .jsonl") from None


def _check_names(address: str, names: Sequence[str]) -> None:
    if not set(names) & set(ADDRESS_FIELDS):
        raise QLIPError(
            f"{address}: no column {', '.join(ADDRESS_FIELDS[:-1])} or {ADDRESS_FIELDS[-1]} with URLs; its first"
            f" row is {', '.join(names)[:100]!r}"
        )


def _rows(address: str, data: bytes) -> Iterator[tuple[str | None, dict[str, object]]]:
    """Yield (URL, record) of each row; None if it has no URL."""
    rows, kind = (cells for _, cells in _raw_rows(address, data)), list_suffix(address)
    names = next(rows, []) if kind == ".csv" else []
    for cells in rows:
        if kind == ".txt":
            yield cells[0].strip(), {}
            continue
        record: dict[str, object] = (
            _record(cells[0]) if not names else {n: cell for n, cell in zip(names, cells, strict=False) if n and cell}
        )
        url = next((record[name] for name in ADDRESS_FIELDS if record.get(name)), None)
        yield (url if isinstance(url, str) else None), record


def _record(line: str) -> dict[str, object]:
    """Parse a line of .jsonl; empty if it is no object."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return record if isinstance(record, dict) else {}


def _text(data: bytes, address: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise QLIPError(f"{address}: not UTF-8 text; save it as UTF-8") from None


def _numbered(urls: Sequence[str]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for url in urls:
        seen[url] = seen.get(url, 0) + 1
        yield url if seen[url] == 1 else f"{url}#{seen[url]}"
