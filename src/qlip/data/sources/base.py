"""Captioned images behind one interface, whatever they lie in; `folder.py` and `tars.py` implement it."""

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
"""Endings of the files that hold pixels, in the order in which one is preferred to another."""

CAPTION_FIELD = "caption"
"""The json field read when none is named; the list ``captions`` and ``label`` are always read."""


@dataclass(frozen=True)
class RawSample:
    """One image as it lies in its source: nothing decoded, nothing drawn yet.

    Attributes:
        image: the encoded file, JPEG, PNG or WebP.
        captions: what people wrote about it; may be empty.
        label: the name of its class, or of what it shows; images of equal label count as equal.
        key: its name inside the source.
    """

    image: bytes
    captions: tuple[str, ...]
    label: str | None
    key: str


class CaptionedImages(ABC):
    """Random access to images and their words, cheap to pickle into a loader's worker.

    ``read(i)`` depends on ``i`` and the files alone. It raises `QLIPError` for a sample that cannot be read;
    whoever reads many decides whether that is the end.
    """

    name: str
    remote: bool = False
    """Whether a read asks a store, so that it pays to announce it with `prepare`."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """Name of sample `index` inside the source, known without reading it."""

    @abstractmethod
    def read(self, index: int) -> RawSample:
        """Sample `index`, 0 <= index < len(self)."""

    def stamp(self, index: int) -> str:
        """What is another string once sample `index` was replaced, known without reading it; "" if nobody can tell.

        Of files on this machine it is their sizes and times of change: a hint, where a digest would be proof.
        """
        del index
        return ""

    def chunk_sizes(self) -> list[int]:
        """How many consecutive samples lie in one file, for each file; all in one, unless a source knows better."""
        return [len(self)]

    def prefetch(self, indices: Sequence[int]) -> None:
        """These will be read soon: begin what takes long. Nothing, unless they are far away."""
        del indices

    def close(self) -> None:
        """Nothing more will be read: end what was begun."""
        return


@dataclass(frozen=True)
class Annotation:
    """What a text or json file beside an image says."""

    captions: tuple[str, ...] = ()
    label: str | None = None


def read_text(data: bytes, where: str) -> Annotation:
    """The words of a ``.txt`` file: the whole text is one caption; an empty file is none."""
    try:
        text = " ".join(data.decode("utf-8-sig").split())
    except UnicodeDecodeError:
        raise QLIPError(f"{where}: the caption is not UTF-8 text; save it as UTF-8") from None
    return Annotation((text,) if text else ())


def read_json(data: bytes, where: str, caption_field: str | None) -> Annotation:
    """The words of a ``.json`` file; see `annotation_of` for the fields."""
    try:
        fields = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise QLIPError(f'{where}: not valid json ({error}); write an object such as {{"caption": "..."}}') from None
    if not isinstance(fields, dict):
        raise QLIPError(f'{where}: a json {type(fields).__name__}; write an object such as {{"caption": "..."}}')
    return annotation_of(fields, where, caption_field)


def annotation_of(fields: Mapping[str, object], where: str, caption_field: str | None) -> Annotation:
    """Captions and label out of a record.

    With `caption_field` None the field ``caption`` and the list ``captions`` are read where they are there; a
    named field must be there. A field holds a string or a list of strings.

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
    """A sample of its files: the image, and the bytes of its ``.txt`` and ``.json``, of which the json counts.

    Raises:
        QLIPError: the words cannot be read, or a caption field was asked for and there is no json.
    """
    if record is not None:
        words = read_json(record, f"{where}.json", caption_field)
    elif caption_field is not None:
        raise QLIPError(f"{where}.json: not there, and caption field {caption_field!r} was asked for")
    else:
        words = Annotation() if text is None else read_text(text, f"{where}.txt")
    return RawSample(image, words.captions, words.label, key)


def _listed(fields: Mapping[str, object]) -> str:
    return ", ".join(repr(name) for name in sorted(fields)[:8]) or "no fields"


def stamp_of(path: str | Path) -> str:
    """Size and time of change of a file on this machine, for `CaptionedImages.stamp`; says so where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return "absent"
    return f"{status.st_size}-{status.st_mtime_ns}"


def read_file(path: Path, offset: int = 0, size: int = -1) -> bytes:
    """`size` bytes from `offset` on (-1: to the end); opened anew each time, so safe in any process.

    Raises:
        QLIPError: the file is gone, unreadable or shorter than it was; `DeniedError` where it may not be read.
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
