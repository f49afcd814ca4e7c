"""A list of images' addresses: lines of text, or a table with a column of them; read a piece at a time.

``urls.txt`` holds one address a line. ``.jsonl`` and ``.csv`` hold the address in ``url``, ``image``, ``path``,
``file`` or ``file_name``, and words in ``caption``, ``captions``, ``label`` or the named caption field. What is no
address is a path, relative to the list's folder.
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

from qlip.data.sources.base import Annotation, CaptionedImages, RawSample, annotation_of
from qlip.data.storage.prefetch import Prefetcher
from qlip.data.storage.retry import DeniedError, RetryPolicy, StorageError
from qlip.data.storage.storage import Storage, is_remote, join, local_path, split
from qlip.errors import QLIPError

PATIENCE = RetryPolicy(tries=3, timeout=20, longest_wait=5)
"""With the servers of a list: of many, some are gone for good."""
LIST_SUFFIXES = (".txt", ".csv", ".jsonl")
ADDRESS_FIELDS = ("url", "image", "path", "file", "file_name")


PUBLIC = ("http://", "https://")
"""Whose servers refuse single images all the time."""


class UnreachableError(QLIPError):
    """One address of many whose server fails or refuses it: this image's fault, unless all do."""


@dataclass(frozen=True)
class Piece:
    """Some lines of a list, in one run of bytes.

    Attributes:
        offset, size: of the bytes.
        rows: addresses in it.
        first: number of the first of its rows, from 0 on.
        digest: of the bytes, 16 hex digits.
        header: bytes of the list's row of names, at its beginning; 0 where it has none.
    """

    offset: int
    size: int
    rows: int
    first: int
    digest: str
    header: int = 0


def list_suffix(address: str) -> str:
    """Which of `LIST_SUFFIXES` a list's name ends with; a query after it does not count. "" where it is no list."""
    name = split(address)[1]
    return next((suffix for suffix in LIST_SUFFIXES if name.endswith(suffix)), "")


def pieces(address: str, rows: int, storage: Storage) -> list[Piece]:
    """Cut a list into pieces of so many rows, the last one smaller.

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
        raise QLIPError(f"{address}: no address in it; write one a line")
    return found


class AddressList(CaptionedImages):
    """The images of one piece of a list.

    Keys are the addresses as the list has them; one that comes again is numbered: ``ADDRESS#2``.

    Args:
        address: of the list.
        piece: which lines.
        caption_field: column of the caption; by default ``caption`` and the list ``captions``.
        storage: reads the list.

    Raises:
        QLIPError: the list changed, or its rows cannot be told apart. A row without an address is one broken sample.
        DeniedError: an image on this machine or in a store may not be read; of those on the web that is their own
            fault, an `UnreachableError`.
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
        self._keys = list(_numbered(urls))
        self.remote = any(url is not None and is_remote(self._address(url)) for url, _ in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        return self._keys[index]

    def read(self, index: int) -> RawSample:
        url, record = self._rows[index]
        where = f"row {self._first + index + 1}"
        if url is None:
            raise QLIPError(f"{where}: names no picture; a field 'url' should hold its address")
        words = annotation_of(record, where, self.caption_field) if record else Annotation()
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
        return RawSample(image, words.captions, words.label, self._keys[index])

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
    """Where each row ends, and its cells, as the parser has them; of .txt and .jsonl a line is a row of one cell.

    Blank lines are no rows. A csv row may hold line breaks; the first one holds names, one of them of addresses.
    """
    table, text = list_suffix(address) == ".csv", _text(data, address)
    end = len(BOM_UTF8) if data.startswith(BOM_UTF8) else 0
    blank, number = True, 0 if table else 1

    def lines() -> Iterator[str]:
        nonlocal end, blank
        # a line more than there is: only a quote that is still open takes it for its own
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
            f"{address}: no column {', '.join(ADDRESS_FIELDS[:-1])} or {ADDRESS_FIELDS[-1]} of addresses; its first"
            f" row is {', '.join(names)[:100]!r}"
        )


def _rows(address: str, data: bytes) -> Iterator[tuple[str | None, dict[str, object]]]:
    """(address, record) of each row; no address where it holds none."""
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
    """Of a line of .jsonl; empty where it is none."""
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
