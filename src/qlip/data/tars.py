"""Captioned images in tar shards, as webdataset writes them, read at random through an index of offsets."""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlip.data.sources import IMAGE_SUFFIXES, CaptionedImages, RawSample, Words, read_file, read_json, read_text
from qlip.errors import QLIPError

BLOCK = 512
MAX_SHARDS = 1_000_000


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where one sample's files lie in its shard, as (offset, size) of their data."""

    shard: int
    key: str
    image: tuple[int, int]
    text: tuple[int, int] | None
    json: tuple[int, int] | None


class TarImages(CaptionedImages):
    """Pictures in tar files: files of one key (the path up to the first dot of its last part) are one sample.

    ``.jpg``, ``.jpeg``, ``.png``, ``.webp`` hold pixels, ``.json`` or else ``.txt`` the words; other files are left
    alone, and so is a key without a picture. The order is that of the shards as given and of the files in them.

    Args:
        pattern: a path, or one with braces (``train-{000..012}.tar``, ``{cats,dogs}.tar``) or a glob; or a list.
        caption_field: the json field that holds the caption; by default ``caption`` and the list ``captions``.
        name: what to call the source in logs; by default the pattern's last part.

    Raises:
        QLIPError: no such file, not a tar, a truncated one, a file name twice in one, no picture, an unknown field.
    """

    def __init__(
        self, pattern: str | Path | Sequence[str | Path], caption_field: str | None = None, name: str | None = None
    ) -> None:
        patterns = [pattern] if isinstance(pattern, str | Path) else list(pattern)
        self.shards = [Path(path) for one in patterns for path in expand(str(one))]
        self.caption_field = caption_field
        self.name = name or Path(str(patterns[0])).name
        self._entries = [entry for number, shard in enumerate(self.shards) for entry in _scan(number, shard)]
        if not self._entries:
            raise QLIPError(f"{patterns[0]}: no picture in it; it should hold {', '.join(IMAGE_SUFFIXES)} files")
        if caption_field is not None:  # a field the first sample has not is a mistake in the recipe
            self._words(self._entries[0])

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, index: int) -> RawSample:
        entry = self._entries[index]
        words = self._words(entry)
        image = read_file(self.shards[entry.shard], *entry.image)
        return RawSample(image, words.captions, words.label, entry.key)

    def _words(self, entry: _Entry) -> Words:
        shard = self.shards[entry.shard]
        where = f"{shard}: {entry.key}"
        if entry.json is not None:
            return read_json(read_file(shard, *entry.json), f"{where}.json", self.caption_field)
        if self.caption_field is not None:
            raise QLIPError(f"{where}.json: not there, and caption field {self.caption_field!r} was asked for")
        return Words() if entry.text is None else read_text(read_file(shard, *entry.text), f"{where}.txt")


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
    """Key and ending of a file in a tar, split at the first dot of the last part: ``a.b/c.seg.png`` -> ``a.b/c, seg.png``."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return (folder + slash + stem).removeprefix("./"), suffix.lower()


def _scan(number: int, shard: Path) -> list[_Entry]:
    """Samples of one shard, from its headers alone."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in _members(shard):
        key, suffix = split_key(name)
        if suffix in IMAGE_SUFFIXES or suffix in ("txt", "json"):
            files = samples.setdefault(key, {})
            if suffix in files:
                raise QLIPError(f"{shard}: holds {key}.{suffix} twice; each file name may occur once")
            files[suffix] = (offset, size)
    entries = []
    for key, files in samples.items():
        image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
        if image is not None:
            entries.append(_Entry(number, key, image, files.get("txt"), files.get("json")))
    return entries


def _members(shard: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the data, size) of the files in an uncompressed tar."""
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isfile() and not member.issparse():
                    yield member.name, member.offset_data, member.size
            end = tar.offset
    except tarfile.ReadError as error:
        what = "truncated" if "unexpected end" in str(error) else f"not an uncompressed tar file ({error})"
        raise QLIPError(f"{shard}: {what}; fetch or write it again") from None
    except OSError as error:
        raise QLIPError(f"{shard}: {error.strerror or error}; check the path") from None
    # tarfile takes a broken header in the middle for the end: only the mark of zeros is the end
    if read_file(shard, end, min(BLOCK, max(0, os.path.getsize(shard) - end))) != bytes(BLOCK):
        raise QLIPError(f"{shard}: truncated, it has no end-of-archive mark; fetch or write it again")
