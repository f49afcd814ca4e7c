"""COCO and Flickr30k in Karpathy's splits: one JSON file with the captions of all images, ``dataset_coco.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlip.data.sources.base import (
    Annotation,
    CaptionedImages,
    RawSample,
    annotation_of,
    printable,
    read_file,
    stamp_of,
)
from qlip.data.storage.storage import local_path
from qlip.errors import QLIPError, nearest
from qlip.files import refuse_special

FOLDERS = ("", "images", "flickr30k-images", "flickr30k_images", "..", "../images")
"""Folders in which images are searched, relative to the JSON file, in this order."""


class KarpathyImages(CaptionedImages):
    """Images of one split, in the file's order, each with all its captions (arXiv 1412.2306).

    Each entry of ``images`` in the file has ``filename``, ``split`` and ``sentences`` with ``raw``, in COCO also
    ``filepath``, the folder (``val2014``). Keys are paths below the folder of the images.

    Args:
        path: of the JSON file.
        split: such as ``test``.
        images: folder of the images; by default it is searched beside the file (`FOLDERS`).
        name: of the source; by default ``PATH:SPLIT``.

    Raises:
        QLIPError: no such file or split, another layout, or the images are not found.
    """

    def __init__(
        self, path: str | Path, split: str = "test", images: str | Path | None = None, name: str | None = None
    ) -> None:
        file = local_path(path)
        self.name = name or f"{path}:{split}"
        entries = _entries(file)
        splits = sorted({str(entry.get("split")) for entry in entries})
        if split not in splits:
            raise QLIPError(f"{file}: no split {split!r}{nearest(split, splits)}; it has {', '.join(splits)}")
        self._samples: list[tuple[str, Annotation]] = [
            _sample(entry, file) for entry in entries if str(entry.get("split")) == split
        ]
        self.folder = _folder(file, self._samples[0][0], None if images is None else local_path(images))

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, index: int) -> str:
        return printable(self._samples[index][0])

    def read(self, index: int) -> RawSample:
        key, found = self._samples[index]
        return RawSample(read_file(self.folder / key), found.captions, None, printable(key), found.text_fault)

    def stamp(self, index: int) -> str:
        key, found = self._samples[index]
        return f"{stamp_of(self.folder / key)} {found.captions!r}"


def is_karpathy(path: str) -> bool:
    """True for a path of such a file, ``dataset_coco.json``, with or without ``:SPLIT``."""
    return _split_path(path)[0].endswith(".json")


def open_karpathy(path: str) -> KarpathyImages:
    """Open ``PATH.json`` (split ``test``) or ``PATH.json:SPLIT``."""
    file, split = _split_path(path)
    return KarpathyImages(file, split or "test", name=path)


def _split_path(path: str) -> tuple[str, str]:
    file, colon, split = path.rpartition(":")
    return (file, split) if colon and file.endswith(".json") else (path, "")


def _entries(file: Path) -> list[dict[str, Any]]:
    refuse_special(file)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no json"
        raise QLIPError(f"{file}: {reason}; give a file such as dataset_coco.json") from None
    entries = found.get("images") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(one, dict) for one in entries):
        raise QLIPError(f"{file}: has no list 'images' of objects; it should look as dataset_coco.json does")
    return entries


def _sample(entry: dict[str, Any], file: Path) -> tuple[str, Annotation]:
    name = entry.get("filename")
    try:
        captions = [sentence["raw"] for sentence in entry["sentences"]]
        key = Path(str(entry.get("filepath") or ""), str(entry["filename"])).as_posix()
    except (KeyError, TypeError, AttributeError):
        raise QLIPError(f"{file}: the entry of {name!r} lacks 'filename' or 'sentences' with 'raw'") from None
    if Path(key).is_absolute() or ".." in Path(key).parts:
        raise QLIPError(f"{file}: {key!r} leads out of the folder of the images")
    return key, annotation_of({"raw": captions}, f"{file}: {printable(key)}", "raw")


def _folder(file: Path, first: str, images: Path | None) -> Path:
    places = [file.parent / folder for folder in FOLDERS] if images is None else [images]
    found = next((place for place in places if (place / first).is_file()), None)
    if found is None:
        searched = ", ".join(str(place) for place in places[:4])
        raise QLIPError(f"{file}: its image {first} is not in {searched}; put the images or a link to them there")
    return found
