"""LlamaGen's folders of codes (arXiv 2406.06525): a file of codes and a file with the class for each image.

    imagenet256_codes/{i}.npy      integers (1, A, N): A views of image i, such as ten crops, of N codes each
    imagenet256_labels/{i}.npy     integers (1,): its class

A step reads a random view. Of several folders, such as those of two crop ranges, each is drawn as often. All draws are
functions of the seed, the epoch and the image.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qlip.archive.dataset.stream import TokenBatch
from qlip.data.loader.batch import SkippedSample
from qlip.data.loader.feed import PositionFeed
from qlip.data.loader.sampler import Mixture, Numbers
from qlip.errors import QLIPError
from qlip.runtime.rng import generator
from qlip.t2i.token_source import ConditionKind, TokenSource

CODES, LABELS = "_codes", "_labels"
"""Ends of the names of the two folders."""
LOOKED_AT = 16
"""First files of which one must be readable, to know the number of codes."""


@dataclass(frozen=True)
class CodeRows:
    """Reads the images at positions; pickles into workers.

    Attributes:
        folders: pairs of a folder of codes and a folder of classes.
        images: int64 (images,), the numbers of the files.
        num_codes: N.
        codebook_size: number of values of a code.
        num_classes: number of classes.
        seed: of all draws.
        with_classes: read the classes too.
    """

    folders: tuple[tuple[Path, Path], ...]
    images: Numbers
    num_codes: int
    codebook_size: int
    num_classes: int
    seed: int
    with_classes: bool

    @cached_property
    def _order(self) -> Mixture:
        return Mixture(["codes"], [len(self.images)], [1.0], self.seed)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def batch(self, positions: Numbers) -> TokenBatch:
        """Read the images at positions, int64 (B,); those that cannot be read are skipped."""
        _, epochs, rows = self._order.places(positions)
        kept, codes, classes, keys, skipped = list[int](), [], list[int](), list[str](), list[SkippedSample]()
        for place, (epoch, row) in enumerate(zip(epochs.tolist(), rows.tolist(), strict=True)):
            rng = generator(self.seed, "codes", epoch, row)
            folder, labels = self.folders[int(rng.random() * len(self.folders))]
            name = f"{self.images[row]}.npy"
            try:
                one = self._codes(folder / name, rng.random())
                label = self._class(labels / name) if self.with_classes else 0
            except QLIPError as error:
                skipped.append(SkippedSample(name, str(folder), str(error)))
                continue
            kept.append(place)
            codes.append(one)
            classes.append(label)
            keys.append(name)
        stacked = np.stack(codes) if codes else np.empty((0, self.num_codes), np.int64)
        return TokenBatch(
            indices=torch.from_numpy(stacked)[..., None],  # (B, N, 1)
            rows=torch.from_numpy(rows[kept]),
            epochs=torch.from_numpy(epochs[kept]),
            keys=keys,
            class_ids=torch.tensor(classes, dtype=torch.int64) if self.with_classes else None,
            skipped=skipped,
        )

    def _codes(self, path: Path, draw: float) -> NDArray[np.int64]:
        """Return a random view of an image, int64 (N,)."""
        views = read_codes(path)
        if views.shape[1] != self.num_codes:
            raise QLIPError(f"{path}: {views.shape[1]} codes, and the first file has {self.num_codes}")
        view = np.array(views[int(draw * len(views))], np.int64)
        if view.min() < 0 or view.max() >= self.codebook_size:
            wrong = view.min() if view.min() < 0 else view.max()
            raise QLIPError(f"{path}: code {wrong} is out of range: 0 to {self.codebook_size - 1}")
        return view

    def _class(self, path: Path) -> int:
        values = _array(path)
        if values.shape != (1,) or not 0 <= int(values[0]) < self.num_classes:
            raise QLIPError(f"{path}: no class from 0 to {self.num_classes - 1}, one number")
        return int(values[0])


def read_codes(path: Path) -> NDArray[Any]:
    """Read the codes of an image, integers (A, N), without loading views that are not read.

    Raises:
        QLIPError: the file is not there, damaged, or of another shape or type.
    """
    values = _array(path)
    if values.ndim != 3 or values.shape[0] != 1 or not values.size:
        raise QLIPError(f"{path}: shape {values.shape}; need (1, views, codes)")
    views: NDArray[Any] = values[0]
    return views


def _array(path: Path) -> NDArray[Any]:
    """Map an array of integers into memory; nothing is unpickled."""
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise QLIPError(f"{path}: no such file") from None
    except Exception as error:  # noqa: BLE001 (a damaged header fails in many ways)
        raise QLIPError(f"{path}: not a NumPy array, or cut off ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu":
        raise QLIPError(f"{path}: not an array of integers")
    return values


def open_codes(
    folders: Sequence[str], codebook_size: int, num_classes: int, seed: int, batch_size: int, num_workers: int
) -> TokenSource:
    """Open LlamaGen's folders of codes.

    Args:
        folders: each is a ``*_codes`` beside its ``*_labels``, or holds one such pair; all have the same files.
        codebook_size: number of values of a code.
        num_classes: number of classes.
        seed: of all draws.
        batch_size: of all ranks together.
        num_workers: reading processes.

    Raises:
        QLIPError: no such pair, no file, or a number of codes that is no square.
    """
    pairs = tuple(_pair(Path(folder).expanduser()) for folder in folders)
    first = pairs[0][0]
    stems = [name[:-4] for name in os.listdir(first) if name.endswith(".npy")]
    images = np.sort(np.array([int(stem) for stem in stems if stem.isdecimal()], dtype=np.int64))
    if not len(images):
        raise QLIPError(f"{first}: no file such as 0.npy")
    num_codes = _num_codes(first, images)
    side = math.isqrt(num_codes)
    if side * side != num_codes:
        raise QLIPError(f"{first}: {num_codes} codes per image, which is no square grid")
    name = ", ".join(map(str, folders))
    identity = {"seed": seed, "codes": [folder.name for folder, _ in pairs], "images": len(images)}

    def open_feed(kind: ConditionKind) -> PositionFeed[TokenBatch]:
        rows = CodeRows(pairs, images, num_codes, codebook_size, num_classes, seed, kind == "class")
        return PositionFeed(rows.batch, identity, batch_size, num_workers, name=name)

    return TokenSource(name, (side, side), codebook_size, 1, None, f"{len(images):,} images", open_feed)


def _pair(folder: Path) -> tuple[Path, Path]:
    if not folder.is_dir():
        raise QLIPError(f"{folder}: no such folder of LlamaGen's codes")
    found = [folder]
    if not folder.name.endswith(CODES):
        found = sorted(one for one in folder.iterdir() if one.name.endswith(CODES) and one.is_dir())
    if len(found) != 1:
        names = ", ".join(one.name for one in found) or "none"
        raise QLIPError(f"{folder}: need one folder such as imagenet256{CODES}, and there is {names}; name it itself")
    labels = found[0].with_name(found[0].name.removesuffix(CODES) + LABELS)
    if not labels.is_dir():
        raise QLIPError(f"{labels}: no such folder of classes, which belongs to {found[0].name}")
    return found[0], labels


def _num_codes(folder: Path, images: Numbers) -> int:
    """Number of codes per image, of the first file that can be read."""
    fault = None
    for image in images[:LOOKED_AT]:
        try:
            return int(read_codes(folder / f"{image}.npy").shape[1])
        except QLIPError as error:
            fault = fault or error
    assert fault is not None
    raise fault
