"""The interface of all sources, `CaptionedImages`, and the parts that they share: annotations and local files."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlip.data.storage.retry import unreadable
from qlip.errors import QLIPError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""Suffixes of image files, the preferred one first."""

CAPTION_FIELD = "caption"
"""JSON field of the caption, unless another is named; the list ``captions`` and ``label`` are read as well."""


@dataclass(frozen=True)
class RawSample:
    """One undecoded sample of a source.

    Attributes:
        image: an encoded image file: JPEG, PNG or WebP.
        captions: texts about it; may be empty.
        label: name of its class or subject; images of one label count as equal.
        key: its name in the source.
    """

    image: bytes
    captions: tuple[str, ...]
    label: str | None
    key: str


class CaptionedImages(ABC):
    """Random access to images and their annotations, cheap to pickle into a loader's worker.

    ``read(i)`` depends only on ``i`` and the files. It raises `QLIPError` for a sample that cannot be read; the caller
    decides whether to skip it.
    """

    name: str
    remote: bool = False
    """True if reads go to remote storage, so that `prefetch` pays."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """Key of sample `index`, known without reading it."""

    @abstractmethod
    def read(self, index: int) -> RawSample:
        """Read sample `index`, 0 <= index < len(self)."""

    def label(self, index: int) -> str | None:
        """Label of sample `index`, if it is known without reading the image; else None."""
        del index
        return None

    def stamp(self, index: int) -> str:
        """A string that differs once sample `index` was replaced, known without reading it; "" if it is unknown.

        For local files it is made of sizes and modification times: a hint, no proof as a digest would be.
        """
        del index
        return ""

    def chunk_sizes(self) -> list[int]:
        """Number of consecutive samples per file or row group; by default all are one chunk."""
        return [len(self)]

    def prefetch(self, indices: Sequence[int]) -> None:
        """Begin to fetch samples that will be read soon; a no-op for local sources."""
        del indices

    def close(self) -> None:
        """Cancel what was prefetched; nothing more will be read."""
        return


@dataclass(frozen=True)
class Annotation:
    """Captions and label of an image, from a file beside it or a row of a table."""

    captions: tuple[str, ...] = ()
    label: str | None = None


def read_text(data: bytes, where: str) -> Annotation:
    """Annotation from a ``.txt`` file: the whole text is one caption; an empty file has none."""
    try:
        text = " ".join(data.decode("utf-8-sig").split())
    except UnicodeDecodeError:
        raise QLIPError(f"{where}: the caption is not UTF-8 text; save it as UTF-8") from None
    return Annotation((text,) if text else ())


def read_json(data: bytes, where: str, caption_field: str | None) -> Annotation:
    """Annotation from a ``.json`` file; see `annotation_of` for the fields."""
    try:
        fields = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise QLIPError(f'{where}: not valid json ({error}); write an object such as {{"caption": "..."}}') from None
    if not isinstance(fields, dict):
        raise QLIPError(f'{where}: a json {type(fields).__name__}; write an object such as {{"caption": "..."}}')
    return annotation_of(fields, where, caption_field)


def annotation_of(fields: Mapping[str, object], where: str, caption_field: str | None) -> Annotation:
    """Captions and label from a record.

    Without a `caption_field`, the field ``caption`` and the list ``captions`` are read if they exist; a named field
    must exist. A field holds a string or a list of strings.

    Raises:
        QLIPError: the named field is absent, or a field is of another type.
    """
    if caption_field is not None and caption_field not in fields:
        raise QLIPError(f"{where}: no field {caption_field!r}; it has {_listed(fields)}")
    names = (CAPTION_FIELD, "captions") if caption_field is None else (caption_field,)
    captions: list[str] = []
    for name in names:
        value = fields.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        for text in values:
            if not isinstance(text, str):
                raise QLIPError(f"{where}: field {name!r} holds a {type(text).__name__}; captions are strings")
            captions.append(" ".join(text.split()))
    label = fields.get("label")
    if label is not None and not isinstance(label, str):
        raise QLIPError(f"{where}: field 'label' holds a {type(label).__name__}; a label is a name, a string")
    return Annotation(tuple(dict.fromkeys(c for c in captions if c)), label or None)


def raw_sample(
    key: str, where: str, image: bytes, text: bytes | None, record: bytes | None, caption_field: str | None
) -> RawSample:
    """Make a sample of the bytes of its image, ``.txt`` and ``.json`` files; the JSON file wins over the text.

    Raises:
        QLIPError: the annotation cannot be read, or a caption field was asked for and there is no JSON file.
    """
    if record is not None:
        annotation = read_json(record, f"{where}.json", caption_field)
    elif caption_field is not None:
        raise QLIPError(f"{where}.json: not there, and caption field {caption_field!r} was asked for")
    else:
        annotation = Annotation() if text is None else read_text(text, f"{where}.txt")
    return RawSample(image, annotation.captions, annotation.label, key)


def _listed(fields: Mapping[str, object]) -> str:
    return ", ".join(repr(name) for name in sorted(fields)[:8]) or "no fields"


def stamp_of(path: str | Path) -> str:
    """Size and modification time of a local file, for `CaptionedImages.stamp`; "absent" if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return "absent"
    return f"{status.st_size}-{status.st_mtime_ns}"


def read_file(path: Path, offset: int = 0, size: int = -1) -> bytes:
    """Read `size` bytes of a local file from `offset` on (-1: to the end); opens it each time, so any process may.

    Raises:
        QLIPError: the file is missing, unreadable or too short; `DeniedError` if it may not be read.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    except PermissionError as error:
        raise unreadable(path, error) from None
    except OSError as error:
        raise QLIPError(f"{path}: {error.strerror or error}") from None
    if size >= 0 and len(data) != size:
        raise QLIPError(f"{path}: ends {size - len(data)} bytes too early; it changed after it was opened")
    return data
