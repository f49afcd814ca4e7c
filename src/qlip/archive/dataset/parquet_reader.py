"""Read columns of a dataset's parts by row, one row group at a time, with a cache of columns."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlip.archive.dataset.layout import Entry, Layout
from qlip.archive.dataset.schema import DatasetInfo, Views, first_difference, info_of
from qlip.data.storage.remote_file import RemoteFile
from qlip.data.storage.storage import Storage, is_remote, local_path
from qlip.errors import QLIPError, require

CACHE_BYTES = 256 << 20
OPEN_FILES = 32

RESTORE = "tokenise its shard again, or copy the dataset again"

OBJECT_BYTES = 80
"""Approximate overhead of a Python string."""

Numbers = NDArray[np.int64]
Scattered = list[tuple[Numbers, int, int, Numbers]]


class RowGroups:
    """Columns of all parts; rows are numbered through the parts in order.

    Local files are mapped into memory, remote ones read in ranges. Safe in threads; pickles without its cache.

    Args:
        layout: of the dataset.
        info: of the dataset; a part of another model is refused.
        entries: its parts, in order; a part of another size or number of rows is refused.
        cache_bytes: size of the cache of decoded columns.
    """

    _last: tuple[bytes, Scattered]

    def __init__(
        self, layout: Layout, info: DatasetInfo, entries: Sequence[Entry], cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.layout, self.info, self.cache_bytes = layout, info, cache_bytes
        self.sizes: Numbers = np.array([entry.bytes for entry in entries], dtype=np.int64)
        self.parts: list[int] = [entry.part for entry in entries]
        self.ends: Numbers = np.cumsum([entry.rows for entry in entries], dtype=np.int64)
        self._forget()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def take(self, rows: Numbers, column: str) -> Any:
        """Return a column's values of rows, in the given order, as one pyarrow array.

        Raises:
            QLIPError: a part cannot be read, or is damaged there.
        """
        arrow = require("pyarrow", extra="tables")
        pieces, order = [], []
        for places, part, group, inside in self.scattered(rows):
            pieces.append(self.column(part, group, column).take(_numbers(inside)))
            order.append(places)
        if not pieces:
            return None
        joined = arrow.concat_arrays(pieces) if len(pieces) > 1 else pieces[0]
        back = np.argsort(np.concatenate(order), kind="stable")
        return joined if len(pieces) == 1 else joined.take(_numbers(back))

    def objects(self, rows: Numbers, column: str) -> list[Any]:
        """Return a column's values of rows as Python objects, in the given order."""
        found = np.empty(len(rows), object)
        for places, part, group, inside in self.scattered(rows):
            found[places] = self._objects(part, group, column)[inside]
        values: list[Any] = found.tolist()
        return values

    def scattered(self, rows: Numbers) -> Scattered:
        """Group rows by row group: (positions in `rows`, index of the part, group, rows inside the group)."""
        rows = rows.astype(np.int64, copy=False)  # equal rows, equal bytes
        asked, last = rows.tobytes(), self._last
        if last[0] != asked:  # the columns of a batch are read one after the other
            self._last = last = (asked, self._scattered(rows))
        return last[1]  # of this thread: another may have asked since

    def _scattered(self, rows: Numbers) -> Scattered:
        found = []
        at = np.searchsorted(self.ends, rows, side="right")
        for part in np.unique(at) if len(at) != 1 else at:
            there = np.flatnonzero(at == part)
            local = rows[there] - (self.ends[part - 1] if part else 0)
            ends = self.group_ends(int(part))
            groups = np.searchsorted(ends, local, side="right")
            for group in np.unique(groups) if len(groups) != 1 else groups:
                mine = groups == group
                first = int(ends[group - 1]) if group else 0
                found.append((there[mine], int(part), int(group), local[mine] - first))
        return found

    def path(self, part: int) -> str:
        """Return the address of the part at an index of the manifest."""
        return self.layout.part_path(self.parts[part])

    def group_ends(self, part: int) -> Numbers:
        """Return the cumulative rows of a part's row groups."""
        return self._opened(part)[1]

    def views(self, part: int) -> Views:
        """Return the views of the images of a part, which may differ in a merged dataset."""
        return self._opened(part)[2]

    def column(self, part: int, group: int, name: str) -> Any:
        """Return a column of a row group as a pyarrow array."""
        key = (part, group, name)
        with self._lock:
            if (kept := self._columns.get(key)) is not None:
                self._columns.move_to_end(key)
                return kept[0]
        found = self._read(part, group, name)
        self._keep(key, found, found.nbytes)
        return found

    def _objects(self, part: int, group: int, name: str) -> NDArray[Any]:
        """Return a column of a row group as Python objects."""
        key = (part, group, f"{name} as objects")
        with self._lock:
            if (kept := self._columns.get(key)) is not None:
                self._columns.move_to_end(key)
                return kept[0]  # type: ignore[no-any-return]
        column = self._read(part, group, name)
        found = np.fromiter(column.to_pylist(), object, len(column))
        self._keep(key, found, column.nbytes + OBJECT_BYTES * len(column))
        return found

    def _keep(self, key: tuple[int, int, str], column: Any, size: int) -> None:
        with self._lock:
            if key not in self._columns:
                self._columns[key] = (column, size)
                self._bytes += size
            while self._bytes > self.cache_bytes and len(self._columns) > 1:
                self._bytes -= self._columns.popitem(last=False)[1][1]

    def table(self, part: int, group: int, columns: Sequence[str] | None = None) -> Any:
        """Return columns of a row group, all by default, as a table, without the cache."""
        return self._guarded(part, lambda file: file.read_row_group(group, columns=columns))

    def _read(self, part: int, group: int, name: str) -> Any:
        table = self._guarded(part, lambda file: file.read_row_group(group, columns=[name]))
        if name not in table.schema.names:
            raise QLIPError(f"{self.path(part)}: no column {name!r}; run `qlip tokens verify`")
        arrow = require("pyarrow", extra="tables")
        chunks = table.column(name).chunks
        return chunks[0] if len(chunks) == 1 else arrow.concat_arrays(chunks)

    def _guarded(self, part: int, read: Any) -> Any:
        arrow = require("pyarrow", extra="tables")
        try:
            with self._lock:  # pyarrow's readers are not thread-safe
                return read(self._opened(part)[0])
        except (OSError, arrow.ArrowException) as error:
            raise damaged(self.path(part), error) from None

    def _opened(self, part: int) -> tuple[Any, Numbers, Views]:
        with self._lock:
            if part in self._files:
                self._files.move_to_end(part)
                return self._files[part]
            file = open_part(self.path(part), self.layout.storage, int(self.sizes[part]))
            views = self._check(part, file)
            groups = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
            self._files[part] = (file, np.cumsum(groups, dtype=np.int64), views)
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
            return self._files[part]

    def _check(self, part: int, file: Any) -> Views:
        """Compare a part with the dataset's model and with the manifest's number of rows; return its views."""
        path, rows = self.path(part), int(np.diff(self.ends, prepend=0)[part])
        own = info_of(file.schema_arrow.metadata, path)
        differs = first_difference(self.info, own)
        if differs is not None:
            raise QLIPError(f"{path}: another dataset's part, its {differs} differs from dataset.json's; {RESTORE}")
        if file.metadata.num_rows != rows:
            raise QLIPError(f"{path}: {file.metadata.num_rows:,} rows, and the manifest says {rows:,}; {RESTORE}")
        return own.views

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._files: OrderedDict[int, tuple[Any, Numbers, Views]] = OrderedDict()
        self._columns: OrderedDict[tuple[int, int, str], tuple[Any, int]] = OrderedDict()  # with their bytes
        self._last = (b"", [])
        self._bytes = 0


def values_of(array: Any) -> NDArray[Any]:
    """Convert a pyarrow array of numbers without nulls to numpy, without a copy.

    pyarrow's own conversions import pandas if it is installed, which takes a second or two.
    """
    kind = np.dtype(array.type.to_pandas_dtype())  # a numpy type
    if not len(array):
        return np.empty(0, kind)
    return np.frombuffer(array.buffers()[1], kind, len(array), array.offset * kind.itemsize)


def _numbers(rows: Numbers) -> Any:
    """Convert a numpy array to pyarrow, without a copy."""
    arrow = require("pyarrow", extra="tables")
    return arrow.Array.from_buffers(arrow.int64(), len(rows), [None, arrow.py_buffer(np.ascontiguousarray(rows))])


def open_part(address: str, storage: Storage, size: int | None = None) -> Any:
    """Open a part as a pyarrow ParquetFile that verifies the checksums of the pages it reads.

    Args:
        address: of the file.
        storage: reads it, if it is remote.
        size: that it must have; None is any.

    Raises:
        QLIPError: no such file, another size, not Parquet, or not a part of a token dataset.
    """
    arrow, parquet = require("pyarrow", extra="tables"), require("pyarrow.parquet", extra="tables")
    try:
        if is_remote(address):
            remote = RemoteFile(storage, address)
            found = remote.seek(0, io.SEEK_END)
            file = parquet.ParquetFile(arrow.PythonFile(remote, mode="r"), page_checksum_verification=True)
        else:
            path = str(local_path(address))
            found = os.path.getsize(path)
            file = parquet.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except FileNotFoundError:
        raise QLIPError(f"{address}: missing, but listed in the manifest; {RESTORE}") from None
    except (OSError, arrow.ArrowException) as error:
        raise damaged(address, error) from None
    info_of(file.schema_arrow.metadata, address)
    if size not in (None, found):
        raise QLIPError(f"{address}: {found:,} bytes, and the manifest says {size:,}; {RESTORE}")
    return file


def keys_of(file: Any) -> set[str]:
    """Return the different keys of an opened part's rows."""
    return set(file.read(["key"]).column("key").to_pylist())


def open_bytes(data: bytes) -> Any:
    """Open a Parquet file's content as a pyarrow ParquetFile that verifies the checksums of the pages it reads."""
    arrow, parquet = require("pyarrow", extra="tables"), require("pyarrow.parquet", extra="tables")
    return parquet.ParquetFile(arrow.BufferReader(arrow_buffer(data)), page_checksum_verification=True)


def arrow_buffer(data: bytes) -> Any:
    """Copy bytes into memory of Arrow's own.

    A buffer over a Python object may be freed by a thread of Arrow's pool, which needs the GIL for that; while Python
    ends, this aborts the process.
    """
    buffer = require("pyarrow", extra="tables").allocate_buffer(len(data))
    np.frombuffer(buffer, np.uint8)[:] = np.frombuffer(data, np.uint8)
    return buffer


def damaged(address: str, error: Exception) -> QLIPError:
    """Return pyarrow's error of a damaged file as one line."""
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return QLIPError(f"{address}: damaged ({reason[:120]}); run `qlip tokens verify`")
