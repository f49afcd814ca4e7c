"""Captioned images in tar shards, as webdataset writes them, read at random through an index of offsets."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from qlip.data.sources import (
    IMAGE_SUFFIXES,
    CaptionedImages,
    RawSample,
    Words,
    read_file,
    read_json,
    read_text,
)
from qlip.data.tarindex import members
from qlip.errors import QLIPError

MAX_SHARDS = 1_000_000
Row = tuple[int, int, int, int, int, int, int]
"""Shard, then (offset, size) of the picture's, the text's and the json's data."""
ABSENT = (-1, -1)


class TarImages(CaptionedImages):
    """Pictures in tar files: files of one key (the path up to the first dot of its last part) are one sample.

    ``.jpg``, ``.jpeg``, ``.png``, ``.webp`` hold pixels, ``.json`` or else ``.txt`` the words; other
    files are left alone, and so is a key without a picture. The order is that of shards and files.

    Args:
        pattern: a path, braces (``train-{000..012}.tar``, ``{cats,dogs}.tar``) or a glob; or a list of these.
        caption_field: the json field of the caption; by default ``caption`` and the list ``captions``.
        name: what to call the source in logs; by default the pattern's last part.

    Raises:
        QLIPError: no such file, not a tar, truncated, a name twice in one, no picture, an unknown field.
    """

    def __init__(
        self,
        pattern: str | Path | Sequence[str | Path],
        caption_field: str | None = None,
        name: str | None = None,
    ) -> None:
        patterns = [pattern] if isinstance(pattern, str | Path) else list(pattern)
        self.shards = [Path(path) for one in patterns for path in expand(str(one))]
        self.caption_field = caption_field
        self.name = name or Path(str(patterns[0])).name
        self._keys: list[str] = []
        rows: list[Row] = []
        for number, shard in enumerate(self.shards):
            shard_keys, shard_rows = _scan(number, shard)
            self._keys += shard_keys
            rows += shard_rows
        self._rows = np.array(rows, dtype=np.int64)  # (samples, 7), compact for the way into a worker
        if not rows:
            raise QLIPError(f"{patterns[0]}: no picture in it; it should hold {', '.join(IMAGE_SUFFIXES)} files")
        if caption_field is not None:  # a field the first sample has not is a mistake in the recipe
            self._words(0)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index]

    def read(self, index: int) -> RawSample:
        shard, offset, size, *_ = self._rows[index].tolist()
        words = self._words(index)
        image = read_file(self.shards[shard], offset, size)
        return RawSample(image, words.captions, words.label, self._keys[index])

    def _words(self, index: int) -> Words:
        number, _, _, *places = self._rows[index].tolist()
        text, record = tuple(places[:2]), tuple(places[2:])
        shard = self.shards[number]
        where = f"{shard}: {self._keys[index]}"
        if record != ABSENT:
            return read_json(read_file(shard, *record), f"{where}.json", self.caption_field)
        if self.caption_field is not None:
            raise QLIPError(f"{where}.json: not there, and caption field {self.caption_field!r} was asked for")
        return Words() if text == ABSENT else read_text(read_file(shard, *text), f"{where}.txt")


def expand(pattern: str) -> list[str]:
    """Paths that a pattern means: braces as in a shell, ``{000..012}`` keeping its zeros, then globs, sorted.

    Raises:
        QLIPError: nothing matches a glob, a range runs backwards, or it means too many shards.
    """
    paths: list[str] = []
    for path in _braces(pattern):
        if glob.has_magic(path) and not os.path.exists(path):
            found = sorted(glob.glob(path, recursive=True))
            if not found:
                raise QLIPError(f"{path}: no such file; the pattern matches nothing")
            paths.extend(found)
        else:
            paths.append(path)
        if len(paths) > MAX_SHARDS:
            raise QLIPError(f"{pattern}: means more than {MAX_SHARDS} files; check its ranges")
    return paths


def _braces(pattern: str) -> Iterator[str]:
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        yield pattern
        return
    first, last, choices = match.groups()
    if choices is None:
        if int(last) < int(first):
            raise QLIPError(f"{pattern}: the range {match.group()} runs backwards; write {{{last}..{first}}}")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        parts: Iterator[str] = (str(number).zfill(width) for number in range(int(first), int(last) + 1))
    else:
        parts = iter(choices.split(","))
    for part in parts:
        yield from _braces(pattern[: match.start()] + part + pattern[match.end() :])


def split_key(name: str) -> tuple[str, str]:
    """Key and ending, split at the first dot of the name: ``a.b/c.seg.png`` -> ``a.b/c``, ``seg.png``."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return (folder + slash + stem).removeprefix("./"), suffix.lower()


def _scan(number: int, shard: Path) -> tuple[list[str], list[Row]]:
    """Keys and rows of one shard's samples, from its headers alone."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in members(shard):
        key, suffix = split_key(name)
        if suffix in IMAGE_SUFFIXES or suffix in ("txt", "json"):
            files = samples.setdefault(key, {})
            if suffix in files:
                raise QLIPError(f"{shard}: holds {key}.{suffix} twice; each file name may occur once")
            files[suffix] = (offset, size)
    keys, rows = [], []
    for key, files in samples.items():
        image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
        if image is not None:
            keys.append(key)
            rows.append((number, *image, *files.get("txt", ABSENT), *files.get("json", ABSENT)))
    return keys, rows
