"""Reconstructions made elsewhere, as a list that names both files of each pair.

A list is a ``.jsonl`` of ``{"original": "a.png", "rebuilt": "x/a.png", "bytes": 224}`` or a ``.csv`` with these
columns. Paths are relative to the list; ``bytes``, what the image took in between, may be left out of all lines.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlip.data.sources.base import CaptionedImages, RawSample, stamp_of
from qlip.data.sources.folder import records_in
from qlip.data.storage.retry import StorageError
from qlip.errors import QLIPError
from qlip.evaluation.models.base import RECONSTRUCT, EvalModel, Reconstructed
from qlip.files import refuse_special
from qlip.modeling import Preprocessing
from qlip.modeling.images import load_image


@dataclass(frozen=True)
class Pair:
    """One line of a list.

    Attributes:
        key: the original's path as the list has it.
        original, rebuilt: files.
        num_bytes: in between; 0 where the list does not say.
    """

    key: str
    original: Path
    rebuilt: Path
    num_bytes: int


Digests = Mapping[Path, bytes]
"""SHA-256 of each file as it was when the list was opened."""


class PairedOriginals(CaptionedImages):
    """The originals of a list, in its order. One that changed since the list was opened ends the measurement."""

    def __init__(self, name: str, pairs: Sequence[Pair], digests: Digests) -> None:
        self.name, self.pairs, self._digests = name, pairs, digests

    def __len__(self) -> int:
        return len(self.pairs)

    def key(self, index: int) -> str:
        return self.pairs[index].key

    def read(self, index: int) -> RawSample:
        pair = self.pairs[index]
        return RawSample(_unchanged(pair.original, self._digests), (), None, pair.key)

    def stamp(self, index: int) -> str:
        pair = self.pairs[index]
        return f"{stamp_of(pair.original)} {stamp_of(pair.rebuilt)}"


class PairedFiles(EvalModel):
    """Gives for each original the file that its list names, at the size that all files have: nothing is resized.

    Made by :func:`open_pairs`.
    """

    def __init__(
        self, name: str, pairs: Sequence[Pair], size: tuple[int, int], fingerprint: str, digests: Digests
    ) -> None:
        self.name, self.capabilities, self.device = name, frozenset({RECONSTRUCT}), torch.device("cpu")
        self.preprocessing, self.fingerprint = Preprocessing(size, None), fingerprint
        self.notes = {"bits_per_pixel": "bytes as the list of pairs gives them"}
        self._pairs, self._digests = {pair.key: pair for pair in pairs}, digests

    def reconstruct(self, pixel_values: Tensor) -> Reconstructed:
        """Refused: there is a file for each original, and for nothing else."""
        raise QLIPError(f"{self.name}: pairs of files are compared as they are; nothing else can be rebuilt")

    def reconstruct_keyed(self, pixel_values: Tensor, keys: Sequence[str]) -> Reconstructed:
        """The files beside these originals.

        Raises:
            QLIPError: a file that cannot be read, or that changed since the list was opened.
        """
        pairs = [self._pairs[key] for key in keys]
        files = [_unchanged(pair.rebuilt, self._digests) for pair in pairs]
        pixels = torch.stack([self.preprocessing.pixels(load_image(data)) for data in files])
        return Reconstructed(self.preprocessing.denormalize(pixels), torch.tensor([pair.num_bytes for pair in pairs]))


def open_pairs(path: str | Path, name: str | None = None) -> tuple[PairedFiles, PairedOriginals]:
    """A list of pairs as a model and the set to measure it on.

    Every file is looked at once: a pair that cannot be compared is found here and not after an hour.

    Args:
        path: of the list.
        name: what tables call what rebuilt the images; by default the list's own name.

    Raises:
        QLIPError: no list or an empty one, a line that is none, a file named twice, one that is missing or no image,
            or images of another size than the first.
    """
    path = Path(path)
    pairs = list(_pairs(path))
    if not pairs:
        raise QLIPError(f"{path}: names no pair; write lines with original and rebuilt")
    if len({pair.num_bytes == 0 for pair in pairs}) > 1:
        raise QLIPError(f"{path}: some lines give bytes and some do not; give them in all or in none")
    size: tuple[int, int] | None = None
    digest, seen, digests = hashlib.sha256(), set[str](), dict[Path, bytes]()
    for pair in pairs:
        for file in (pair.original, pair.rebuilt):
            if (real := os.path.realpath(file)) in seen:  # under any name
                raise QLIPError(f"{path}: {file} is named twice; a file is an original or rebuilt of one, in one pair")
            seen.add(real)
            data = _bytes(file)
            digests[file] = hashlib.sha256(data).digest()
            width, height = load_image(data, str(file)).size
            size = size or (height, width)
            if (height, width) != size:
                raise QLIPError(
                    f"{file}: {width}x{height} pixels, the first has {size[1]}x{size[0]}; pairs are compared at one"
                    " size, and none is resized here"
                )
        digest.update(digests[pair.rebuilt] + pair.num_bytes.to_bytes(8, "big"))
    assert size is not None
    rebuilt = PairedFiles(name or path.stem, pairs, size, digest.hexdigest(), digests)
    return rebuilt, PairedOriginals(str(path), pairs, digests)


def _pairs(path: Path) -> Iterator[Pair]:
    if path.suffix not in (".jsonl", ".csv"):
        raise QLIPError(f"{path}: a list of pairs is a .jsonl or .csv that names files; two folders have no pairs")
    for number, (_, record) in enumerate(records_in(str(path), _bytes(path)), start=1):
        where = f"{path}: pair {number}"
        original, rebuilt = record.get("original"), record.get("rebuilt")
        if not isinstance(original, str) or not isinstance(rebuilt, str) or not original or not rebuilt:
            raise QLIPError(f"{where}: needs original and rebuilt, paths of files")
        given: Any = record.get("bytes")
        try:
            num_bytes = int(given or 0)
        except (TypeError, ValueError):
            num_bytes = -1
        if num_bytes < 0:
            raise QLIPError(f"{where}: bytes must be a whole number, got {given!r}")
        yield Pair(original, path.parent / original, path.parent / rebuilt, num_bytes)


def _unchanged(path: Path, digests: Digests) -> bytes:
    """A file as it was when the list was opened. Another one is no fault of one sample's, to be left out."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(
            f"{path}: is gone since the list was opened ({error.strerror or error}); run again"
        ) from None
    if hashlib.sha256(data).digest() != digests[path]:
        raise StorageError(f"{path}: changed after the list was opened; run again when no other process writes there")
    return data


def _bytes(path: Path) -> bytes:
    refuse_special(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise QLIPError(f"{path}: cannot be read ({error.strerror or error}); name files that are there") from None
