"""Lists of image URLs: lines of text, or a table with a column of URLs; read in pieces.

``urls.txt`` holds one URL per line. ``.jsonl``, ``.csv`` and ``.tsv`` hold it in one of `ADDRESS_FIELDS`, captions and
label in one of `base.CAPTION_FIELDS` (or the named caption field) and `LABEL_FIELDS`, in small or capital letters, as
LAION's ``URL`` and ``TEXT``. Cells of a ``.csv`` may be separated by semicolons. Anything but a URL is a path, relative
to the list's folder.

A list may come from anyone: rows name web servers and stores, and files of this machine only if `Fetching` allows it.
Keys are URLs without users, passwords and queries, see `public_address`.
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

from qlip.data.sources.base import (
    PATH_FIELDS,
    URL_FIELDS,
    Annotation,
    CaptionedImages,
    RawSample,
    annotation_of,
    field_of,
    printable,
)
from qlip.data.storage.address import is_malformed, public_address
from qlip.data.storage.prefetch import Prefetcher
from qlip.data.storage.retry import DeniedError, RetryPolicy, StorageError, one_line
from qlip.data.storage.storage import THREADS, Storage, is_remote, join, local_path, split
from qlip.errors import QLIPError
from qlip.files import delimiter_of, text_of

LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl")
TABLES = {".csv": ",", ".tsv": "\t"}
"""Suffixes of tables with a row of column names, and what separates their cells."""
ADDRESS_FIELDS = (*URL_FIELDS, *PATH_FIELDS)
STORES = ("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf")
"""Protocols of rows; others may read files of this machine."""
PUBLIC = ("http://", "https://")
"""Servers that often refuse single images."""


@dataclass(frozen=True)
class Fetching:
    """Limits of fetching the images of a list.

    Attributes:
        tries: of one image; some servers of a list no longer exist as a rule.
        timeout: seconds for one whole answer.
        threads: concurrent requests.
        max_bytes: of one answer; a longer one is a broken image.
        allow_local: rows may name files of this machine, and other protocols than `STORES`.
    """

    tries: int = 3
    timeout: float = 20.0
    threads: int = THREADS
    max_bytes: int = 64 << 20
    allow_local: bool = False

    @property
    def storage(self) -> Storage:
        """Storage with these limits."""
        return Storage(
            RetryPolicy(tries=self.tries, timeout=self.timeout, longest_wait=5), self.max_bytes, self.threads
        )


class UnreachableError(QLIPError):
    """A server failed or refused one URL: the image is skipped, unless all of a shard fail."""


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a list.

    Attributes:
        offset, size: range of bytes.
        rows: number of rows.
        first: number of the first row, from 0.
        digest: 16 hex digits, of the bytes; of the rows without secrets if there are some, so that a list with new
            signatures is equal.
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


def pieces(address: str, rows: int, storage: Storage, columns: Sequence[str] = ()) -> list[Piece]:
    """Cut a list into pieces of so many rows; the last one may be smaller.

    Raises:
        QLIPError: no such list, nothing in it, no column of addresses, or one of `columns` in no row.
    """
    data = storage.read(address)
    ends = [end for end, _ in _raw_rows(address, data)]
    header = ends.pop(0) if list_suffix(address) in TABLES and ends else 0
    found: list[Piece] = []
    for first in range(0, len(ends), rows):
        start, last = (ends[first - 1] if first else header), ends[min(first + rows, len(ends)) - 1]
        digest = _digest(address, data[:header], data[start:last])
        found.append(Piece(start, last - start, min(rows, len(ends) - first), first, digest, header))
    if not found:
        raise QLIPError(f"{public_address(address)}: no URL in it; write one per line")
    for name in columns:
        _check_column(address, data, name)
    return found


def _check_column(address: str, data: bytes, name: str) -> None:
    """Refuse a column that a table's first row does not name, or that no row of a .jsonl has."""
    if list_suffix(address) in TABLES:
        names = next(_raw_rows(address, data))[1]
    elif any(name in record for _, record in _rows(address, data)):
        return
    else:
        names = list(next(_rows(address, data))[1])
    if name not in names:
        raise QLIPError(f"{public_address(address)}: no column {name!r}; it has {', '.join(names) or 'none'}")


def _digest(address: str, header: bytes, data: bytes) -> str:
    if b"://" in data and (b"?" in data or b"@" in data or b"#" in data):
        rows = list(_rows(address, header + data))
        public = [(url and public_address(url), {**record, _url_field(record): None}) for url, record in rows]
        if [url for url, _ in public] != [url for url, _ in rows]:
            data = json.dumps(public).encode()
    return hashlib.sha256(data).hexdigest()[:16]


class UrlList(CaptionedImages):
    """Images of one piece of a list.

    Keys are the public forms of the URLs; a repeated one is numbered: ``URL#2``.

    Args:
        address: of the list.
        piece: rows to read.
        caption_field: column of the caption; by default ``caption`` and the list ``captions``.
        storage: reads the list.
        fetching: limits of fetching the images.

    Raises:
        QLIPError: the list changed, or its rows cannot be told apart. A row without a URL is one skipped image.
        DeniedError: an image on this machine or in a store may not be read; on the web that is an
            `UnreachableError` of this image.
    """

    def __init__(
        self, address: str, piece: Piece, caption_field: str | None, storage: Storage, fetching: Fetching | None = None
    ) -> None:
        data, header = storage.read(address, piece.offset, piece.size), storage.read(address, 0, piece.header)
        if _digest(address, header, data) != piece.digest:
            raise QLIPError(f"{public_address(address)}: changed after it was opened; start again")
        rows = list(_rows(address, header + data))
        if len(rows) != piece.rows:
            shown = public_address(address)
            raise QLIPError(f"{shown}: rows {piece.first + 1:,} on cannot be told apart; write it as .jsonl")
        self._open(address, rows, piece.first, caption_field, fetching)

    def _open(
        self,
        address: str,
        rows: Sequence[tuple[str | None, dict[str, object]]],
        first: int,
        caption_field: str | None,
        fetching: Fetching | None,
    ) -> None:
        """Take (URL, record) of each row."""
        self.fetching = fetching or Fetching()
        self.name, self.storage, self.caption_field = split(address)[1], self.fetching.storage, caption_field
        self._folder, self._prefetcher = split(address)[0], Prefetcher(self.storage, keep=0)
        self._first, self._rows = first, rows
        urls = [public_address(url) if url else f"row {first + n}" for n, (url, _) in enumerate(self._rows, 1)]
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
        if reason := self._refused(address):
            raise UnreachableError(f"{self._keys[index]}: {reason}")
        if is_remote(address) and is_malformed(address):
            raise QLIPError(f"{self._keys[index]}: no address that can be read; check it")
        try:
            image = self._prefetcher.get((address, 0, -1)) if is_remote(address) else self.storage.read(address)
        except DeniedError as error:
            if address.startswith(PUBLIC):
                raise UnreachableError(str(error)) from None
            raise
        except StorageError as error:
            raise UnreachableError(f"{self._keys[index]}: {one_line(error.__cause__ or error)}") from None
        fault = annotation.text_fault
        return RawSample(image, annotation.captions, annotation.label, self._keys[index], fault, record)

    def prefetch(self, indices: Sequence[int]) -> None:
        addresses = [self._address(url) for index in indices if (url := self._rows[index][0]) is not None]
        far = [one for one in addresses if is_remote(one) and not self._refused(one) and not is_malformed(one)]
        self._prefetcher.prefetch([(address, 0, -1) for address in far])

    def close(self) -> None:
        self._prefetcher.close()

    def _address(self, url: str) -> str:
        if is_remote(url) or (not is_remote(self._folder) and local_path(url).is_absolute()):
            return _without_chain(url)
        return join(self._folder, url)

    def _refused(self, address: str) -> str | None:
        """Return why a row may not be read, or None."""
        if self.fetching.allow_local:
            return None
        if not is_remote(address):
            return "a path on this machine, which lists may hold only where local files are allowed"
        protocol = address.partition("://")[0].lower()
        if protocol not in STORES or "::" in address.partition("://")[2].partition("/")[2]:
            return f"an address of {protocol} that may name files of this machine, which are not allowed here"
        return None


def _without_chain(url: str) -> str:
    """Escape two colons in the path of a web address, at which fsspec would cut it."""
    protocol, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{protocol}{mark}{host}{slash}{path.replace('::', '%3A%3A')}" if url.lower().startswith(PUBLIC) else url


def _raw_rows(address: str, data: bytes) -> Iterator[tuple[int, list[str]]]:
    """Yield the end and the cells of each row; in .txt and .jsonl a line is a row of one cell.

    Blank lines are skipped. A row of a table may hold line breaks; the first one holds column names.
    """
    cut, text = TABLES.get(list_suffix(address)), text_of(data, public_address(address))
    table = cut is not None
    cut = delimiter_of(text, cut) if cut is not None else None
    end = len(BOM_UTF8) if data.startswith(BOM_UTF8) else 0
    blank, number = True, 0 if table else 1

    def lines() -> Iterator[str]:
        nonlocal end, blank
        # one line more than there is: only an open quote consumes it
        for line in chain(io.StringIO(text, newline="" if table else "\n"), ["\n"] if table else []):
            end, blank = end + len(line.encode()), blank and not line.strip()
            yield line

    try:
        for cells in csv.reader(lines(), delimiter=cut) if cut else ([line] for line in lines()):
            if not blank:
                if end > len(data):
                    raise csv.Error("opens a quote that nothing closes")
                if table and number == 0:
                    _check_names(address, cells)
                yield end, cells
                number += 1
            blank = True
    except csv.Error as error:
        raise QLIPError(
            f"{public_address(address)}: row {number:,} {error}; close the quote, or write the list as .jsonl"
        ) from None


def _check_names(address: str, names: Sequence[str]) -> None:
    if field_of(names, ADDRESS_FIELDS) is None:
        raise QLIPError(
            f"{public_address(address)}: no column url, image, path or file with URLs;"
            f" its first row is {', '.join(names)[:100]!r}"
        )


def _rows(address: str, data: bytes) -> Iterator[tuple[str | None, dict[str, object]]]:
    """Yield (URL, record) of each row; None if it has no URL."""
    rows, kind = (cells for _, cells in _raw_rows(address, data)), list_suffix(address)
    names = next(rows, []) if kind in TABLES else []
    for cells in rows:
        if kind == ".txt":
            yield cells[0].strip(), {}
            continue
        record: dict[str, object] = (
            _record(cells[0]) if not names else {n: cell for n, cell in zip(names, cells, strict=False) if n and cell}
        )
        yield url_of(record), record


def url_of(record: dict[str, object]) -> str | None:
    """Return the URL or path in a row of a table; None if there is none."""
    url = record.get(_url_field(record))
    return url if isinstance(url, str) else None


def _url_field(record: dict[str, object]) -> str:
    """Return the name of the field that holds the URL; "" if there is none."""
    return field_of((name for name, value in record.items() if value), ADDRESS_FIELDS) or ""


def _record(line: str) -> dict[str, object]:
    """Parse a line of .jsonl; empty if it is no object."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return record if isinstance(record, dict) else {}


def _numbered(urls: Sequence[str]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for url in urls:
        seen[url] = seen.get(url, 0) + 1
        yield url if seen[url] == 1 else f"{url}#{seen[url]}"
