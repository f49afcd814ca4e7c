"""The interface of all sources, `CaptionedImages`, and the parts that they share: annotations and local files.

Text beside an image never decides whether the image is read: a caption or a label that cannot be used is left out or
repaired, and the sample's `text_fault` says so.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qlip.data.storage.retry import unreadable
from qlip.errors import QLIPError
from qlip.files import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from qlip.files import encodable, refuse_special

CAPTION_FIELDS = ("caption", "captions", "text", "txt", "prompt")
"""Fields and columns that hold captions, in any case (``TEXT``): both of the first two, else the first that exists."""
LABEL_FIELDS = ("label", "labels", "class", "class_name", "fine_label", "cls")
"""Fields and columns that hold a label, the first that exists, in any case."""
PATH_FIELDS = ("image", "path", "file", "file_name", "filename", "filepath", "image_path")
"""Columns of tables and lists that hold an image's path, in any case."""
URL_FIELDS = ("url", "image_url")
"""Columns of lists that hold an image's URL, in any case; they win over `PATH_FIELDS`."""

CHECKED = 16
"""Samples that are looked at before a named caption field is refused."""


@dataclass(frozen=True)
class RawSample:
    """One undecoded sample of a source.

    Attributes:
        image: an encoded image file, of one of `IMAGE_SUFFIXES`.
        captions: texts about it; may be empty.
        label: name of its class or subject; images of one label count as equal.
        key: its name in the source, Unicode without surrogates.
        text_fault: place and reason, in one line, if a caption or the label was left out or repaired.
        record: all fields of the row, or of the JSON file, that the captions are from, as they are; may be empty.
    """

    image: bytes
    captions: tuple[str, ...]
    label: str | None
    key: str
    text_fault: str | None = None
    record: Mapping[str, object] = field(default_factory=dict, compare=False, repr=False)


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
    """Captions and label of an image, from a file beside it or a row of a table; attributes as of `RawSample`."""

    captions: tuple[str, ...] = ()
    label: str | None = None
    text_fault: str | None = None
    record: Mapping[str, object] = field(default_factory=dict, compare=False, repr=False)


def read_text(data: bytes, where: str) -> Annotation:
    """Annotation from a ``.txt`` file: the whole text is one caption; an empty file has none."""
    text, fault = _decoded(data)
    caption = " ".join(text.split())
    return Annotation((caption,) if caption else (), text_fault=fault and f"{where}: {fault}")


def read_json(data: bytes, where: str, caption_field: str | None) -> Annotation:
    """Annotation from a ``.json`` file; see `annotation_of` for the fields."""
    text, fault = _decoded(data, json.detect_encoding(data))
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Annotation(text_fault=f'{where}: not valid json ({error}); write an object such as {{"caption": "..."}}')
    if not isinstance(fields, dict):
        kind = type(fields).__name__
        return Annotation(text_fault=f'{where}: a json {kind}; write an object such as {{"caption": "..."}}')
    found = annotation_of(fields, where, caption_field)
    return Annotation(found.captions, found.label, found.text_fault or (fault and f"{where}: {fault}"), fields)


def annotation_of(fields: Mapping[str, object], where: str, caption_field: str | None) -> Annotation:
    """Captions and label from a record; what cannot be used is left out, and the `text_fault` says why.

    Without a `caption_field`, `CAPTION_FIELDS` are read. A field holds a string, a number or a list of these; None, NaN
    and "" mean that there is none. Half a surrogate pair becomes U+FFFD.
    """
    faults: list[str] = []
    filled = [name for name, value in fields.items() if value is not None and value != "" and value == value]
    if caption_field is not None and caption_field not in fields:
        faults.append(f"no field {caption_field!r}; it has {_listed(fields)}")
    captions: list[str] = []
    for name in _caption_fields(filled) if caption_field is None else (caption_field,):
        value = fields.get(name)
        for one in value if isinstance(value, list) else [value]:
            try:
                captions.append(" ".join(_text(one, name, faults).split()))
            except TypeError:
                faults.append(f"field {name!r} holds a {type(one).__name__}; left out")
    label_field, label = field_of(filled, LABEL_FIELDS) or "label", None
    value = fields.get(label_field)
    try:
        label = None if is_missing_class(value) else _text(value, label_field, faults) or None
    except TypeError:
        faults.append(f"field {label_field!r} holds a {type(value).__name__}; a label is a name or a number")
    fault = f"{where}: {faults[0]}" if faults else None
    return Annotation(tuple(dict.fromkeys(c for c in captions if c)), label, fault, fields)


def field_of(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """The first of the wanted fields or columns among `names`, in any case; None if there is none."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(name.lower(), name)
        if name.islower():  # `text` wins over `TEXT`
            found[name] = name
    return next((found[one] for one in wanted if one in found), None)


def _caption_fields(names: Sequence[str]) -> list[str]:
    both = [name for one in CAPTION_FIELDS[:2] if (name := field_of(names, (one,))) is not None]
    return both or [name for name in [field_of(names, CAPTION_FIELDS)] if name is not None]


def is_missing_class(value: object) -> bool:
    """True for None, NaN, and -1, the class of images in test splits."""
    return value is None or (isinstance(value, int | float) and not value >= 0)


def class_of(value: object) -> int | str | None:
    """Class number or name in a field of any type: 3.0 is 3; what is neither is None."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _text(value: object, name: str, faults: list[str]) -> str:
    """Text of a field's value, "" for a missing one; what is replaced in it is added to `faults`. Raises TypeError."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        value, fault = _decoded(value)
        faults += [f"field {name!r}: {fault}"] if fault else []
    if not isinstance(value, str | int | float):
        raise TypeError
    number = class_of(value)
    text = str(value if number is None else number)
    sound = encodable(text)
    if sound != text:
        faults.append(f"field {name!r} holds half a surrogate pair, replaced by U+FFFD")
    return sound


def _decoded(data: bytes, encoding: str = "utf-8-sig") -> tuple[str, str | None]:
    """Text of a small file, and what was replaced in it."""
    try:
        return data.decode(encoding), None
    except UnicodeDecodeError:
        return data.decode("utf-8-sig", "replace"), "not UTF-8 text, other bytes replaced by U+FFFD; save it as UTF-8"


def raw_sample(
    key: str,
    where: str,
    image: bytes,
    text: bytes | None,
    record: bytes | None,
    cls: bytes | None,
    caption_field: str | None,
) -> RawSample:
    """Make a sample of the bytes of its image, ``.txt``, ``.json`` and ``.cls`` files.

    The JSON file wins over the text, and its label over the class file.
    """
    if record is not None:
        annotation = read_json(record, f"{where}.json", caption_field)
    elif caption_field is not None:
        annotation = without_record(f"{where}.json", caption_field)
    else:
        annotation = Annotation() if text is None else read_text(text, f"{where}.txt")
    label = annotation.label if annotation.label is not None or cls is None else class_in(cls)
    return RawSample(image, annotation.captions, label, key, annotation.text_fault, annotation.record)


def class_in(cls: bytes) -> str | None:
    """Class in a ``.cls`` file: a number's digits, or a name; None in an empty file."""
    return cls.decode("utf-8-sig", "replace").strip() or None


def without_record(where: str, caption_field: str) -> Annotation:
    """Annotation of an image without the JSON file that should hold the caption field."""
    return Annotation(text_fault=f"{where}: not there, and caption field {caption_field!r} was asked for")


def check_captions(read: Callable[[int], RawSample | Annotation], count: int) -> None:
    """Refuse a caption field that none of the first samples has: a mistake in the recipe, not an odd sample.

    Args:
        read: reads a sample, or its annotation alone.
        count: number of samples.

    Raises:
        QLIPError: each of the first samples has a fault and no caption; the first one's.
    """
    faults = []
    for index in range(min(CHECKED, count)):
        found = read(index)
        if found.captions or found.text_fault is None:
            return
        faults.append(found.text_fault)
    if faults:
        raise QLIPError(faults[0])


def printable(name: str) -> str:
    """A file name as text: bytes that are not UTF-8, which Python keeps as surrogates, become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


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
    refuse_special(path)
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
