"""A list of pictures' addresses: lines of text, or a table with a column of them; read a piece at a time.

``urls.txt`` holds one address a line. ``.jsonl`` and ``.csv`` hold the address in ``url``, ``image``, ``path``,
``file`` or ``file_name``, and words in ``caption``, ``captions``, ``label`` or the named caption field. What is no
address is a path, relative to the list's folder.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qlip.data.ahead import Ahead
from qlip.data.sources import CaptionedImages, RawSample, Words, words_of
from qlip.data.stores import Patience, Storage, StoreError, is_remote, join, local_path, split
from qlip.errors import QLIPError

PATIENCE = Patience(tries=3, timeout=20, longest_wait=5)
"""With the servers of a list: of many, some are gone for good."""
LIST_SUFFIXES = (".txt", ".csv", ".jsonl")
ADDRESS_FIELDS = ("url", "image", "path", "file", "file_name")


class UnreachableError(QLIPError):
    """One address of many whose server fails: this picture's fault, unless all fail."""


@dataclass(frozen=True)
class Piece:
    """Some lines of a list, in one run of bytes.

    Attributes:
        offset, size: of the bytes.
        rows: addresses in it.
        first: number of the first of its rows, from 0 on.
        digest: of the bytes, 16 hex digits.
    """

    offset: int
    size: int
    rows: int
    first: int
    digest: str


def pieces(address: str, rows: int, storage: Storage) -> list[Piece]:
    """Cut a list into pieces of so many rows, the last one smaller.

    Raises:
        QLIPError: no such list, nothing in it, or no column of addresses.
    """
    data = storage.read(address)
    _text(data, address)
    begin = _header_size(address, data)
    ends = list(_row_ends(address, data, begin))
    found: list[Piece] = []
    for first in range(0, len(ends), rows):
        start, last = (ends[first - 1] if first else begin), ends[min(first + rows, len(ends)) - 1]
        digest = hashlib.sha256(data[start:last]).hexdigest()[:16]
        found.append(Piece(start, last - start, min(rows, len(ends) - first), first, digest))
    if not found:
        raise QLIPError(f"{address}: no address in it; write one a line")
    return found


class AddressList(CaptionedImages):
    """The pictures of one piece of a list. Keys are the addresses as the list has them; one that comes again is
    numbered: ``ADDRESS#2``.

    Args:
        address: of the list.
        piece: which lines.
        caption_field: column of the caption; by default ``caption`` and the list ``captions``.
        storage: reads the list.

    Raises:
        QLIPError: the list changed, or its rows cannot be told apart. A row without an address is one broken sample.
    """

    def __init__(self, address: str, piece: Piece, caption_field: str | None, storage: Storage) -> None:
        self.name, self.storage, self.caption_field = split(address)[1], Storage(PATIENCE), caption_field
        self._folder, self._ahead = split(address)[0], Ahead(self.storage, keep=0)
        data = storage.read(address, piece.offset, piece.size)
        if hashlib.sha256(data).hexdigest()[:16] != piece.digest:
            raise QLIPError(f"{address}: changed after it was opened; start again")
        header = storage.read_up_to(address, _HEADER) if address.endswith(".csv") else b""
        self._first = piece.first
        self._rows = list(_rows(address, _text(header[: _header_size(address, header)] + data, address)))
        if len(self._rows) != piece.rows:
            raise QLIPError(f"{address}: rows {piece.first + 1:,} on cannot be told apart; write it as .jsonl")
        urls = [url or f"row {piece.first + number}" for number, (url, _) in enumerate(self._rows, 1)]
        self._keys = list(_numbered(urls))
        self.far = any(url is not None and is_remote(self._address(url)) for url, _ in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        return self._keys[index]

    def read(self, index: int) -> RawSample:
        url, record = self._rows[index]
        where = f"row {self._first + index + 1}"
        if url is None:
            raise QLIPError(f"{where}: names no picture; a field 'url' should hold its address")
        words = words_of(record, where, self.caption_field) if record else Words()
        address = self._address(url)
        try:
            image = self._ahead.get((address, 0, -1)) if is_remote(address) else self.storage.read(address)
        except StoreError as error:
            reason = str(error.__cause__ or error) or type(error.__cause__).__name__
            raise UnreachableError(f"{self._keys[index]}: {reason}") from None
        return RawSample(image, words.captions, words.label, self._keys[index])

    def prepare(self, indices: Sequence[int]) -> None:
        addresses = [self._address(url) for index in indices if (url := self._rows[index][0]) is not None]
        self._ahead.want([(address, 0, -1) for address in addresses if is_remote(address)])

    def close(self) -> None:
        self._ahead.close()

    def _address(self, url: str) -> str:
        if is_remote(url) or (not is_remote(self._folder) and local_path(url).is_absolute()):
            return url
        return join(self._folder, url)


_HEADER = 1 << 16
"""Bytes that hold the first row of a table."""


def _header_size(address: str, data: bytes) -> int:
    """Bytes of a csv table's row of names, which must name a column of addresses."""
    if not address.endswith(".csv"):
        return 0
    line = data.partition(b"\n")[0]
    names = next(csv.reader([_text(line, address)]), [])
    if not set(names) & set(ADDRESS_FIELDS):
        raise QLIPError(
            f"{address}: no column {', '.join(ADDRESS_FIELDS[:-1])} or {ADDRESS_FIELDS[-1]} of addresses; its first"
            f" row is {', '.join(names)[:100]!r}"
        )
    return min(len(line) + 1, len(data))


def _row_ends(address: str, data: bytes, begin: int) -> Iterator[int]:
    """Where each row ends; empty lines are none, and a csv row may hold line breaks."""
    end = begin
    open_quotes, wrote = False, False
    for line in io.BytesIO(data[begin:]):
        end += len(line)
        if address.endswith(".csv") and line.count(b'"') % 2:
            open_quotes = not open_quotes
        wrote = wrote or bool(line.strip())
        if wrote and not open_quotes:
            yield end
            wrote = False


def _rows(address: str, text: str) -> Iterator[tuple[str | None, dict[str, object]]]:
    """(address, record) of each row; no address where it holds none."""
    if address.endswith(".txt"):
        yield from ((line.strip(), {}) for line in text.split("\n") if line.strip())
        return
    for record in _records(address, text):
        url = next((record[name] for name in ADDRESS_FIELDS if record.get(name)), None)
        yield (url if isinstance(url, str) else None), record


def _records(address: str, text: str) -> Iterator[dict[str, object]]:
    if address.endswith(".csv"):
        for row in csv.DictReader(io.StringIO(text, newline="")):
            yield {name: value for name, value in row.items() if name and value}
        return
    for line in (line for line in text.split("\n") if line.strip()):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        yield record if isinstance(record, dict) else {}


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
