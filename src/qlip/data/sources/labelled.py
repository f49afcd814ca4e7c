"""Labelled datasets without captions: class folders, tars with class numbers, a list of labels."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qlip.data.sources.base import (
    LABEL_FIELDS,
    CaptionedImages,
    RawSample,
    class_in,
    class_of,
    field_of,
    read_file,
)
from qlip.data.sources.classes import ClassTable, load_classes
from qlip.data.sources.folder import FolderImages
from qlip.data.sources.open import is_tars, open_path
from qlip.data.sources.parquet import ParquetImages
from qlip.data.sources.tars import TarImages
from qlip.data.storage.storage import is_remote, local_path
from qlip.errors import QLIPError
from qlip.files import is_number, lines_of

_WORDNET_ID = re.compile(r"n\d{8}(?!\d)")


class ClassFolders(FolderImages):
    """Images in a folder per class, ``n01440764/x.JPEG``: the name of the topmost folder is the label.

    Args:
        path: the folder of class folders.
        name: of the source; by default the path.
        classes: allowed folders.

    Raises:
        QLIPError: as `FolderImages`; an image outside all class folders, or a folder that is no class.
    """

    def __init__(self, path: str | Path, name: str | None = None, classes: ClassTable | None = None) -> None:
        super().__init__(path, name=name or str(path))
        keys = [self.key(index) for index in range(len(self))]
        loose = next((key for key in keys if "/" not in key), None)
        if loose is not None:
            raise QLIPError(f"{path}: {loose} is in no class folder; give a folder that holds one folder per class")
        if classes is not None:
            for label in dict.fromkeys(key.partition("/")[0] for key in keys):
                classes.label_of(label, f"{path}: {label}/")

    def read(self, index: int) -> RawSample:
        return replace(super().read(index), label=self.label(index))

    def label(self, index: int) -> str:
        return self.key(index).partition("/")[0]


class ClassTars(TarImages):
    """Tar shards whose classes are numbers or part of the key, as ImageNet's.

    A sample's label is the first of these that exists: ``label`` in its JSON file, a number or a name; its ``.cls``
    file, a number; the WordNet id in its key (``n01440764_10026``); the topmost folder of its key.

    Args:
        pattern: of local shards.
        name: of the source; by default the pattern.
        classes: turns numbers into labels.

    Raises:
        QLIPError: as `TarImages`; a number without a class table or outside it, or no label.
    """

    def __init__(self, pattern: str | Path, name: str | None = None, classes: ClassTable | None = None) -> None:
        if is_remote(pattern):
            raise QLIPError(f"{pattern}: labels are only read from local tars; copy them to a disk")
        super().__init__(pattern, name=name or str(pattern))
        self.classes = classes
        self.read(0)

    def read(self, index: int) -> RawSample:
        key, where, image, _, record, cls = self.files(index)
        found = _label_in(record)
        if found is None and cls is not None:
            text = class_in(cls) or ""
            found = int(text) if is_number(text) else text
        label = _label_of_key(key) if found is None else label_of(found, self.classes, where)
        if label is None:
            raise QLIPError(f"{where}: has no class: no label in a JSON file, no .cls file, no class in its name")
        return RawSample(image, (), label, key)

    def stamp(self, index: int) -> str:
        known = super().stamp(index)
        return known if self.classes is None else f"{known} {self.classes.digest}"


class LabelList(CaptionedImages):
    """Another source with labels from a text file, one per line, in the order of the images' keys.

    Args:
        source: such as a flat folder of validation images.
        path: of the text file with names, or numbers from 0 on with a class table.
        classes: turns numbers into labels; names must be in it.

    Raises:
        QLIPError: the numbers of lines and images differ, or a label is no class.
    """

    def __init__(self, source: CaptionedImages, path: str | Path, classes: ClassTable | None = None) -> None:
        self.source, self.name, self.remote = source, source.name, source.remote
        lines = lines_of(read_file(local_path(path)), str(path))
        while lines and not lines[-1].strip():
            lines.pop()
        if len(lines) != len(source):
            raise QLIPError(
                f"{path}: {len(lines):,} labels for the {len(source):,} images of {source.name}; write one per line,"
                " in the order of the images' names"
            )
        self._labels = [
            label_of(int(text) if is_number(text) else text, classes, f"{path} line {number}")
            for number, text in enumerate((line.strip() for line in lines), 1)
        ]

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> str:
        return self.source.key(index)

    def read(self, index: int) -> RawSample:
        return replace(self.source.read(index), label=self._labels[index])

    def label(self, index: int) -> str:
        return self._labels[index]

    def stamp(self, index: int) -> str:
        known = self.source.stamp(index)
        return known and f"{known} {self._labels[index]}"

    def chunk_sizes(self) -> list[int]:
        return self.source.chunk_sizes()

    def prefetch(self, indices: Sequence[int]) -> None:
        self.source.prefetch(indices)

    def close(self) -> None:
        self.source.close()


def open_labelled(path: str, classes: str | None = None, labels: str | None = None) -> CaptionedImages:
    """Open a labelled dataset: a folder of class folders, tar shards, parquet tables, or images and a list of labels.

    Args:
        path: as for `open_path`.
        classes: ``imagenet`` or a text file, see `load_classes`; turns class numbers into labels and checks names.
        labels: a text file of labels, one per line, for images without labels.

    Raises:
        QLIPError: it cannot be opened, or a label is no class.
    """
    table = None if classes is None else load_classes(classes)
    if labels is not None:
        return LabelList(open_path(path), labels, table)
    if is_tars(path):
        return ClassTars(path, classes=table)
    if path.endswith(".parquet"):
        return ParquetImages(path, classes=table)
    return ClassFolders(path, classes=table)


def label_of(value: int | str, classes: ClassTable | None, where: str) -> str:
    """The label for a name or a number (from 0 on) in a dataset's files.

    Raises:
        QLIPError: a number without a table or outside it, a name that is not in the table, or an empty value.
    """
    if value == "":
        raise QLIPError(f"{where}: is empty; each image needs a label")
    if classes is not None:
        return classes.label_of(value, where)
    if isinstance(value, int):
        raise QLIPError(f"{where}: the class number {value} has no name; give a class table, such as imagenet")
    return value


def _label_in(record: bytes | None) -> int | str | None:
    try:
        found = None if record is None else json.loads(record)
    except ValueError:
        return None
    return class_of(found.get(field_of(found, LABEL_FIELDS) or "")) if isinstance(found, dict) else None


def _label_of_key(key: str) -> str | None:
    match = _WORDNET_ID.search(key)
    if match is not None:
        return match.group()
    return key.partition("/")[0] if "/" in key else None
