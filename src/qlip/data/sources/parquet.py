"""Captioned or labelled images in parquet tables, as the `datasets` library writes them."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from qlip.data.shards.shard_patterns import expand
from qlip.data.sources.base import (
    CAPTION_FIELDS,
    LABEL_FIELDS,
    CaptionedImages,
    RawSample,
    annotation_of,
    class_of,
    field_of,
    is_missing_class,
    printable,
    stamp_of,
)
from qlip.data.sources.classes import ClassTable
from qlip.data.storage.address import public_address
from qlip.data.storage.remote_file import RemoteFile
from qlip.data.storage.retry import StorageError
from qlip.data.storage.storage import Storage, is_remote, local_path, split
from qlip.errors import QLIPError, require
from qlip.files import refuse_special

IMAGE_FIELDS = ("image", "img", "picture", "jpg", "png", "webp")
"""Columns that hold encoded images, in any case, if several columns hold bytes."""
READ_AHEAD = 1 << 20
"""Bytes of a remote column per request."""


class SeveralColumnsError(QLIPError):
    """Several columns may hold the images, and none of them is named."""


class NoImagesError(QLIPError):
    """No column may hold images."""


class ParquetImages(CaptionedImages):
    """Rows of parquet files, in the order of files and rows; a key is ``FILE-ROW``, see `key_names` for ``FILE``.

    A column of encoded images holds bytes, or a struct with ``bytes``, as `datasets` stores its ``Image``. A label is a
    string, or an integer whose name is in the file (``ClassLabel``) or in a class table; strings must be in the table.
    Rows are read by row group, and the last groups are cached: each group is read once if rows are read in order, or
    by blocks whose windows have at most `keep` groups. `chunk_sizes` gives the groups.

    Args:
        pattern: paths, or addresses that fsspec knows, with braces or globs.
        caption_field: column of the caption, a string or strings; by default one of `base.CAPTION_FIELDS`, if any.
        name: of the source; by default the pattern.
        classes: turns integers into labels, and must hold all strings; wins over names in the file.
        keep: row groups (or windows) that are cached, with encoded images.
        image_field: column of the images; by default one of `IMAGE_FIELDS`, or the only one that holds bytes.
        window: rows to read at a time instead of a whole group, for reading large groups in order.
        key_name: ``FILE`` in the keys of a single file.
        columns: further columns to read, into `RawSample.record`.

    Raises:
        QLIPError: no such file, no parquet, no column of images, or no such caption column.
        StorageError: a row group cannot be read.
    """

    def __init__(
        self,
        pattern: str | Path,
        caption_field: str | None = None,
        name: str | None = None,
        classes: ClassTable | None = None,
        keep: int = 1,
        *,
        image_field: str | None = None,
        window: int | None = None,
        key_name: str | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        self.name, self.classes, self.keep, self._window = name or str(pattern), classes, keep, window
        self.files = [path if is_remote(path) else str(local_path(path)) for path in expand(str(pattern))]
        self._key_names = key_names(self.files) if key_name is None else [key_name]
        self._groups: list[tuple[int, int]] = []  # file, row group
        rows: list[int] = []
        schema = None
        for number, file in enumerate(self.files):
            opened = open_table(file)
            table, schema = opened.metadata, opened.schema_arrow if schema is None else schema
            self._groups += [(number, group) for group in range(table.num_row_groups)]
            rows += [table.row_group(group).num_rows for group in range(table.num_row_groups)]
        self._starts = list(accumulate(rows, initial=0))
        self._firsts = self._first_rows()
        self._fields = _fields(self.files[0], schema, caption_field, image_field)
        assert schema is not None
        if absent := [name for name in columns if name not in schema.names]:
            raise QLIPError(f"{self.files[0]}: no column {absent[0]!r}; it has {', '.join(schema.names)}")
        self._columns = tuple(columns)
        self._own_names = classes is None
        if classes is None and (names := _class_names(schema, self._fields["label"])):
            self.classes = ClassTable(self.files[0], names, names)
        self._kept: dict[range, list[dict[str, Any]]] = {}  # by their numbers, the last that were read at the end
        self._rest: Iterator[Any] = iter(())  # of a group that is read by windows
        self._last = range(0)  # that it gave
        if not len(self):
            raise QLIPError(f"{self.name}: has no row; give tables with images")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"_kept": {}, "_rest": iter(()), "_last": range(0)}

    def key(self, index: int) -> str:
        file, _ = self._groups[bisect_right(self._starts, index) - 1]
        return f"{self._key_names[file]}-{index - self._firsts[file]:06d}"

    def chunk_sizes(self) -> list[int]:
        return [after - before for before, after in zip(self._starts, self._starts[1:], strict=False)]

    def read(self, index: int) -> RawSample:
        kept = self._around(index)
        row, key = self._kept[kept][index - kept.start], self.key(index)
        where = f"{self.name}: {key}"
        image = row[str(self._fields["image"])]
        data = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(data, bytes) or not data:
            raise QLIPError(f"{where}: holds no image bytes; paths to other files are not followed")
        caption, label = self._fields["caption"], self._fields["label"]
        fields: dict[str, object] = {} if caption is None else {caption: row[caption]}
        record = {name: row[name] for name in self._columns}
        if label is None or self.classes is None:
            found = annotation_of(fields | {"label": None if label is None else row[label]}, where, caption)
            return RawSample(data, found.captions, found.label, key, found.text_fault, record)
        found = annotation_of(fields, where, caption)
        name, fault = self._label(row[label], where)
        return RawSample(data, found.captions, name, key, found.text_fault or fault, record)

    def stamp(self, index: int) -> str:
        file, _ = self._groups[bisect_right(self._starts, index) - 1]
        if is_remote(self.files[file]):
            return ""
        known = stamp_of(self.files[file])
        return known if self.classes is None else f"{known} {self.classes.digest}"

    def _label(self, value: object, where: str) -> tuple[str | None, str | None]:
        """Label by the class table, and why there is none; a table that was asked for must hold every label."""
        if is_missing_class(value):
            return None, None
        found = class_of(value)
        if found is None or self.classes is None:
            return None, f"{where}: the label is a {type(value).__name__}; it should be a name or a number"
        try:
            return self.classes.label_of(found, where), None
        except QLIPError as error:
            if not self._own_names:
                raise
            return None, str(error)

    def _around(self, index: int) -> range:
        """Range of cached rows that holds a row; reads it if it is not cached."""
        kept = next((rows for rows in self._kept if index in rows), None)
        if kept is not None:
            self._kept[kept] = self._kept.pop(kept)
            return kept
        while len(self._kept) >= self.keep:  # before reading, so that at most `keep` are held
            del self._kept[next(iter(self._kept))]
        rows = self._read_around(index)
        self._kept[self._last] = rows
        return self._last

    def _read_around(self, index: int) -> list[dict[str, Any]]:
        """Read the rows around one: its row group, or its window of the group, continuing from the last window read."""
        group = bisect_right(self._starts, index) - 1
        start, end, last = self._starts[group], self._starts[group + 1], self._last
        continues = self._window is not None and start <= last.start < last.stop <= index
        begin = last.stop if continues else start
        if not continues:
            self._rest = self._read_group(group, self._window or end - start)
        rows: list[dict[str, Any]] = []
        while index >= begin + len(rows):
            begin += len(rows)
            rows = self._next_rows(group)
        self._last = range(begin, begin + len(rows))
        return rows

    def _read_group(self, group: int, rows: int) -> Iterator[Any]:
        file, number = self._groups[group]
        columns = [name for name in dict.fromkeys((*self._fields.values(), *self._columns)) if name is not None]
        batches: Iterator[Any] = open_table(self.files[file]).iter_batches(rows, [number], columns=columns)
        return batches

    def _next_rows(self, group: int) -> list[dict[str, Any]]:
        arrow = require("pyarrow", extra="tables")
        file, number = self._groups[group]
        try:
            rows = rows_of(next(self._rest))
        except (StopIteration, OSError, arrow.ArrowException) as error:
            reason = " ".join(str(error).split())[:200] or "it has fewer rows than its footer states"
            raise StorageError(
                f"{self.files[file]}: row group {number} cannot be read ({reason}); fetch or write the file again"
            ) from None
        return rows

    def _first_rows(self) -> list[int]:
        firsts: dict[int, int] = {}
        for (file, _), start in zip(self._groups, self._starts, strict=False):
            firsts.setdefault(file, start)
        return [firsts.get(number, 0) for number in range(len(self.files))]


def key_names(files: Sequence[str]) -> list[str]:
    """Names of files in keys: without folder and suffix, or, if two are equal, without the folder that all share."""
    names = [printable(Path(split(file)[1]).stem) for file in files]
    if len(set(names)) == len(names):
        return names
    public = [public_address(file) for file in files]
    shared = os.path.commonprefix(public).rfind("/") + 1
    return [printable(str(Path(name[shared:]).with_suffix(""))) for name in public]


def rows_of(batch: Any) -> list[dict[str, Any]]:
    """Rows of a batch; strings that are not UTF-8, as some writers store them, are bytes."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError:
        columns = {name: _strings(batch.column(name)) for name in batch.schema.names}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return rows


def _strings(column: Any) -> list[Any]:
    arrow = require("pyarrow", extra="tables")
    kind = column.type
    of_list = arrow.types.is_list(kind) or arrow.types.is_large_list(kind)
    inner = kind.value_type if of_list else kind
    if not (arrow.types.is_string(inner) or arrow.types.is_large_string(inner) or arrow.types.is_string_view(inner)):
        return list(column.to_pylist())
    as_bytes = column.cast(arrow.list_(arrow.binary()) if of_list else arrow.binary()).to_pylist()
    return [[_string(one) for one in value] if isinstance(value, list) else _string(value) for value in as_bytes]


def _string(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def open_table(file: str) -> Any:
    """Open a file of a table as a pyarrow ParquetFile. Raises QLIPError: it cannot be read."""
    parquet, arrow = require("pyarrow.parquet", extra="tables"), require("pyarrow", extra="tables")
    try:
        if not is_remote(file):
            refuse_special(file)
            return parquet.ParquetFile(file)
        return _open_remote(file)  # a footer costs one or two requests, so the last ones are cached
    except QLIPError:
        raise
    except (OSError, arrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or "no parquet table"
        raise QLIPError(f"{file}: cannot be read ({reason}); give parquet files") from None


@lru_cache(maxsize=8)
def _open_remote(address: str) -> Any:
    parquet, arrow = require("pyarrow.parquet", extra="tables"), require("pyarrow", extra="tables")
    return parquet.ParquetFile(arrow.PythonFile(RemoteFile(Storage(), address), mode="r"), buffer_size=READ_AHEAD)


def _fields(file: str, schema: Any, caption_field: str | None, image_field: str | None) -> dict[str, str | None]:
    """Column names of images, captions and labels."""
    image_columns = [name for name in schema.names if _holds_images(schema, name)]
    image = image_columns[0] if len(image_columns) == 1 else field_of(image_columns, IMAGE_FIELDS)
    if image_field is not None:
        if image_field not in image_columns:
            raise QLIPError(
                f"{file}: no column {image_field!r} of images (bytes, or a struct with bytes); those are"
                f" {', '.join(image_columns) or 'none'} of {', '.join(schema.names)}"
            )
        image = image_field
    if image is None and image_columns:
        raise SeveralColumnsError(
            f"{file}: {len(image_columns)} columns may hold the images, {', '.join(image_columns)}; name the one to"
            f" read, or call it {IMAGE_FIELDS[0]!r}"
        )
    if image is None:
        raise NoImagesError(
            f"{file}: no column of images (bytes, or a struct with bytes); it has {', '.join(schema.names)}"
        )
    if caption_field is not None and caption_field not in schema.names:
        raise QLIPError(f"{file}: no column {caption_field!r}; it has {', '.join(schema.names)}")
    caption = caption_field or field_of(schema.names, CAPTION_FIELDS)
    return {"image": image, "caption": caption, "label": field_of(schema.names, LABEL_FIELDS)}


def _holds_images(schema: Any, name: str) -> bool:
    types, kind = require("pyarrow", extra="tables").types, schema.field(name).type
    if types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return any(getattr(types, f"is_{binary}")(kind) for binary in ("binary", "large_binary", "binary_view"))


def _class_names(schema: Any, label: str | None) -> tuple[str, ...]:
    """Class names of a column of integers, which `datasets` writes into a file's metadata; empty if there are none."""
    metadata = schema.metadata or {}
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(str(name) for name in names) if isinstance(names, list) else ()
