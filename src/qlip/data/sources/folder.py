"""Captioned images in a folder: a text or json file beside each image, or one table at the root."""

from __future__ import annotations

import copy
import csv
import io
import json
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from qlip.data.sources.base import (
    IMAGE_SUFFIXES,
    PATH_FIELDS,
    Annotation,
    CaptionedImages,
    RawSample,
    annotation_of,
    check_captions,
    field_of,
    printable,
    read_file,
    read_json,
    read_text,
    stamp_of,
    without_record,
)
from qlip.data.storage.prefetch import Prefetcher
from qlip.data.storage.retry import RetryPolicy
from qlip.data.storage.storage import Storage, is_remote, join, local_path
from qlip.errors import QLIPError, QLIPWarning
from qlip.files import BESIDE, delimiter_of, files_under, plural, suffixes_of, text_of

TABLES = ("captions.jsonl", "captions.csv")
METADATA = ("metadata.jsonl", "metadata.csv")
"""Tables of the `datasets` library's ImageFolder, at any depth; paths in them are relative to their own folders."""
FILE_NAME = ("file_name",)
Rows = Iterator[tuple[str, dict[str, object]]]
"""Rows of a table with their places."""


class FolderImages(CaptionedImages):
    """Images under a folder, at any depth, in the order of their relative paths, which are their keys.

    The annotation of ``a/b.jpg`` is ``a/b.json``, else ``a/b.txt``, else empty. A table ``captions.jsonl`` or
    ``captions.csv`` at the root replaces these files and lists the images: a row holds the path, the captions and the
    label in fields of `base.PATH_FIELDS`, `CAPTION_FIELDS` and `LABEL_FIELDS`; captions of several rows of one image
    add up. Without it, tables ``metadata.jsonl`` or ``metadata.csv`` with a column ``file_name`` do so for the folders
    they lie in. Files that are left out, except texts and tables, are counted in a `QLIPWarning`.

    Args:
        path: of the folder, or an address that fsspec knows, where every file costs a request.
        caption_field: field of the caption; by default ``caption`` and the list ``captions``.
        name: of the source in logs; by default the folder's name.
        retry: for remote folders.

    Raises:
        QLIPError: no such folder, no image in it, a broken table, an unknown caption field.
    """

    def __init__(
        self,
        path: str | Path,
        caption_field: str | None = None,
        name: str | None = None,
        retry: RetryPolicy | None = None,
        *,
        records: bool = False,
    ) -> None:
        self.path = str(path) if is_remote(path) else str(local_path(path))
        self.name = printable(name or self.path.rstrip("/").rpartition("/")[2] or self.path)
        self.caption_field, self.storage, self.remote = caption_field, Storage(retry), is_remote(path)
        self._records = records
        self._prefetcher = Prefetcher(self.storage, keep=0)
        if not self.remote and not Path(self.path).is_dir():
            raise QLIPError(f"{self.path}: no such folder; give a folder of images or a tar pattern")
        self._listed = frozenset(self.storage.find(self.path)) if self.remote else None
        if self._listed is not None and not self._listed:
            raise QLIPError(f"{self.path}: no such folder, or nothing in it; check the address")
        names = [name for name in self._listed or files_under(self.path) if not _is_hidden(name)]
        self._table: dict[str, Annotation] = {}
        broken = list[str]()
        folders = tuple(self._read_tables(names, broken))
        images = {name for name in names if _is_image(name)}
        self._files = sorted({*self._table, *(name for name in images if not name.startswith(folders))})
        if not self._files:
            raise QLIPError(f"{self.path}: no image in it; it should hold {', '.join(IMAGE_SUFFIXES)} files")
        if left_out := _left_out(names, images - set(self._files), broken):
            warnings.warn(f"{self.path}: {left_out}", QLIPWarning, stacklevel=2)
        if caption_field is not None:
            check_captions(lambda index: self._annotation(self._files[index]), len(self))

    def __len__(self) -> int:
        return len(self._files)

    def key(self, index: int) -> str:
        return printable(self._files[index])

    def read(self, index: int) -> RawSample:
        key = self._files[index]
        annotation = self._annotation(key)
        fault, record = annotation.text_fault, annotation.record
        return RawSample(self._bytes(key), annotation.captions, annotation.label, printable(key), fault, record)

    def label(self, index: int) -> str | None:
        key = self._files[index]
        return None if self.remote and key not in self._table else self._annotation(key).label

    def record(self, index: int) -> Mapping[str, object]:
        """All fields of an image's annotation, without reading the image; of tables only if `records` are kept."""
        return self._annotation(self._files[index]).record

    def part(self, first: int, last: int) -> FolderImages:
        """A source of images `first` to `last` - 1 alone, which pickles small."""
        part = copy.copy(self)
        part._files, part._prefetcher = self._files[first:last], Prefetcher(self.storage, keep=0)
        part._table = {key: self._table[key] for key in part._files if key in self._table}
        if self._listed is not None:
            near = (f"{key.rpartition('.')[0]}.{suffix}" for key in part._files for suffix in ("json", "txt"))
            part._listed = frozenset([*part._files, *(name for name in near if name in self._listed)])
        return part

    def stamp(self, index: int) -> str:
        if self.remote:
            return ""
        key = self._files[index]
        image = stamp_of(Path(self.path, key))
        if key in self._table:
            return f"{image} {self._table[key]!r}"
        beside = self._beside(key)
        return image if beside is None else f"{image} {stamp_of(Path(self.path, beside))}"

    def prefetch(self, indices: Sequence[int]) -> None:
        if self.remote:
            keys = [self._files[index] for index in indices]
            beside = [self._beside(key) for key in keys if key not in self._table]
            names = [*keys, *(name for name in beside if name is not None and self._has(name))]
            self._prefetcher.prefetch([(join(self.path, name), 0, -1) for name in names])

    def close(self) -> None:
        self._prefetcher.close()

    def _bytes(self, name: str) -> bytes:
        if self.remote:
            return self._prefetcher.get((join(self.path, name), 0, -1))
        return read_file(Path(self.path, name))

    def _has(self, name: str) -> bool:
        return name in self._listed if self._listed is not None else Path(self.path, name).is_file()

    def _beside(self, key: str) -> str | None:
        """The annotation file of an image, or None."""
        stem = key.rpartition(".")[0]
        if self.caption_field is not None or self._has(f"{stem}.json"):
            return f"{stem}.json"
        return f"{stem}.txt" if self._has(f"{stem}.txt") else None

    def _annotation(self, key: str) -> Annotation:
        if key in self._table:
            return self._table[key]
        name = self._beside(key)
        if name is None:
            return Annotation()
        where = join(self.path, name)
        if name.endswith(".txt"):
            return read_text(self._bytes(name), where)
        if not self._has(name):
            return without_record(where, str(self.caption_field))
        return read_json(self._bytes(name), where, self.caption_field)

    def _read_tables(self, names: Sequence[str], broken: list[str]) -> Iterator[str]:
        """Read the tables, and yield the folders whose images they list: "" or a path that ends in a slash.

        Why tables of a common name that list no images cannot be read is added to `broken`.
        """
        if tables := [name for name in TABLES if name in names]:
            yield self._read_table("", {name: self._rows(name, self._bytes(name)) for name in tables})
            return
        folders: dict[str, dict[str, Rows]] = {}
        for name in sorted(names):
            folder, slash, table = name.rpartition("/")
            if table in METADATA and (rows := self._rows_of_images(name, broken)) is not None:
                folders.setdefault(folder + slash, {})[name] = rows
        for folder, found in folders.items():
            yield self._read_table(folder, found)

    def _rows(self, table: str, data: bytes) -> Rows:
        return records_in(join(self.path, table), data)

    def _rows_of_images(self, table: str, broken: list[str]) -> Rows | None:
        """Return the rows of a table of a common name if it is one of images: if its first row has a path."""
        data = self._bytes(table)
        rows = self._rows(table, data)
        try:
            first = next(rows, None)
        except QLIPError as error:
            if FILE_NAME[0].encode() in data.partition(b"\n")[0].lower():
                raise
            broken.append(str(error))
            return None
        if first is None or field_of(first[1], FILE_NAME) is None:
            return None
        return chain([first], rows)

    def _read_table(self, folder: str, tables: Mapping[str, Rows]) -> str:
        (name, rows), *others = tables.items()
        if others:
            raise QLIPError(f"{self.path}: holds both {name} and {others[0][0]}; keep one")
        fields = PATH_FIELDS if name in TABLES else FILE_NAME
        for where, record in rows:
            path = record.get(field_of((name for name, value in record.items() if value), fields) or "")
            if not path or not isinstance(path, str):
                raise QLIPError(f"{where}: names no image; a field {fields[0]!r} should hold its path")
            key = folder + Path(path).as_posix()
            if Path(path).is_absolute() or ".." in Path(path).parts:
                raise QLIPError(f"{where}: {path!r} leads out of the folder; paths are relative to it")
            new, old = annotation_of(record, where, self.caption_field), self._table.get(key, Annotation())
            captions = tuple(dict.fromkeys(old.captions + new.captions))
            kept = {**record, **old.record} if self._records else {}
            self._table[key] = Annotation(captions, new.label or old.label, old.text_fault or new.text_fault, kept)
        return folder


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def _left_out(names: Sequence[str], unlisted: Collection[str], broken: Sequence[str]) -> str:
    """Files that are no images, images that no table lists, broken tables, counted in one line; "" for none."""
    others = [name for name in names if not _is_image(name) and not name.lower().endswith(BESIDE)]
    left_out = [f"{suffixes_of(others)} left out, names of images end in {' '.join(IMAGE_SUFFIXES)}"] if others else []
    if unlisted:
        images = plural(len(unlisted), "image")
        left_out.append(f"{images} left out that no table lists, such as {printable(min(unlisted))}")
    if broken:
        left_out.append(f"{plural(len(broken), 'table')} left out that cannot be read, such as {broken[0]}")
    return "; ".join(left_out)


def records_in(table: str, data: bytes) -> Rows:
    """Rows of a table, each with its place for errors; empty cells of a CSV are left out.

    Args:
        table: name or path; a ``.csv`` begins with a row of column names, with commas, semicolons or tabs between them;
            other tables hold a JSON object per line.
        data: content.

    Raises:
        QLIPError: not UTF-8, no comma-separated table, or a line that is no object.
    """
    text = text_of(data, table)
    if table.endswith(".csv"):
        try:
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter_of(text))
            for number, row in enumerate(reader, 2):
                yield f"{table} row {number}", {name: value for name, value in row.items() if name and value}
        except csv.Error as error:
            raise QLIPError(f"{table}: not a comma-separated table ({error})") from None
        return
    for number, line in enumerate(text.split("\n"), 1):  # JSON strings may hold other line ends
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise QLIPError(f"{table} line {number}: not valid json ({error.msg})") from None
            if not isinstance(record, dict):
                raise QLIPError(f"{table} line {number}: a json {type(record).__name__}; each line is an object")
            yield f"{table} line {number}", record
