"""Captioned images in a folder: a text or json file beside each picture, or one table at the root."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

from qlip.data.sources import (
    IMAGE_SUFFIXES,
    CaptionedImages,
    RawSample,
    Words,
    read_file,
    read_json,
    read_text,
    words_of,
)
from qlip.errors import QLIPError

TABLES = ("captions.jsonl", "captions.csv")
PATH_FIELDS = ("image", "file", "file_name")
"""Columns of a table that may hold the picture's path, relative to the folder."""


class FolderImages(CaptionedImages):
    """Pictures under a folder, at any depth, in the order of their relative paths, which are their keys.

    Without a table, ``a/b.jpg`` takes its words from ``a/b.json``, else from ``a/b.txt``, else has none.
    With ``captions.jsonl`` or ``captions.csv`` at the root, the table says which pictures there are: a row
    holds the path in ``image`` (or ``file``, ``file_name``) and ``caption``, ``captions`` or ``label``; rows
    of one picture add up.

    Args:
        path: the folder.
        caption_field: the field that holds the caption; by default ``caption`` and the list ``captions``.
        name: what to call the source in logs; by default the folder's name.

    Raises:
        QLIPError: no such folder, no picture in it, a broken table, an unknown caption field.
    """

    def __init__(self, path: str | Path, caption_field: str | None = None, name: str | None = None) -> None:
        self.path = Path(path)
        self.name = name or self.path.name or str(self.path)
        self.caption_field = caption_field
        if not self.path.is_dir():
            raise QLIPError(f"{self.path}: no such folder; give a folder of pictures or a tar pattern")
        self._table = self._read_table()
        self._files = sorted(self._walk()) if self._table is None else sorted(self._table)
        if not self._files:
            raise QLIPError(f"{self.path}: no picture in it; it should hold {', '.join(IMAGE_SUFFIXES)} files")
        self._check_field()

    def __len__(self) -> int:
        return len(self._files)

    def key(self, index: int) -> str:
        return self._files[index]

    def read(self, index: int) -> RawSample:
        key = self._files[index]
        words = self._table[key] if self._table is not None else self._words(key)
        return RawSample(read_file(self.path / key), words.captions, words.label, key)

    def _walk(self) -> Iterator[str]:
        for folder, subfolders, files in os.walk(self.path):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            for file in files:
                if not file.startswith(".") and file.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
                    yield (Path(folder) / file).relative_to(self.path).as_posix()

    def _words(self, key: str) -> Words:
        stem = self.path / key.rpartition(".")[0]
        beside_json, beside_text = Path(f"{stem}.json"), Path(f"{stem}.txt")
        if beside_json.exists():
            return read_json(read_file(beside_json), str(beside_json), self.caption_field)
        if self.caption_field is not None:
            raise QLIPError(f"{beside_json}: not there, and caption field {self.caption_field!r} was asked for")
        if beside_text.exists():
            return read_text(read_file(beside_text), str(beside_text))
        return Words()

    def _read_table(self) -> dict[str, Words] | None:
        tables = [self.path / name for name in TABLES if (self.path / name).exists()]
        if len(tables) > 1:
            raise QLIPError(f"{self.path}: holds both {TABLES[0]} and {TABLES[1]}; keep one")
        if not tables:
            return None
        rows: dict[str, Words] = {}
        for where, record in _records(tables[0]):
            column = next((name for name in PATH_FIELDS if record.get(name)), None)
            if column is None or not isinstance(record[column], str):
                raise QLIPError(f"{where}: names no picture; a field 'image' should hold its path")
            key = Path(str(record[column])).as_posix()
            if Path(key).is_absolute() or ".." in Path(key).parts:
                raise QLIPError(f"{where}: {key!r} leads out of the folder; paths are relative to it")
            new, old = words_of(record, where, self.caption_field), rows.get(key, Words())
            captions = tuple(dict.fromkeys(old.captions + new.captions))
            rows[key] = Words(captions, new.label or old.label)
        return rows

    def _check_field(self) -> None:
        """A caption field that the first picture has not is a mistake in the recipe, not a broken sample."""
        if self.caption_field is not None and self._table is None:
            self._words(self._files[0])


def _records(table: Path) -> Iterator[tuple[str, dict[str, object]]]:
    try:
        text = read_file(table).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise QLIPError(f"{table}: not UTF-8 text; save it as UTF-8") from None
    if table.suffix == ".csv":
        try:
            for number, row in enumerate(csv.DictReader(io.StringIO(text, newline=""), strict=True), 2):
                yield f"{table} row {number}", {name: value for name, value in row.items() if name and value}
        except csv.Error as error:
            raise QLIPError(f"{table}: not a comma-separated table ({error})") from None
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise QLIPError(f"{table} line {number}: not valid json ({error.msg})") from None
            if not isinstance(record, dict):
                raise QLIPError(f"{table} line {number}: a json {type(record).__name__}; each line is an object")
            yield f"{table} line {number}", record
