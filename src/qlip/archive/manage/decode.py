"""Decode rows of a token dataset to images, and check that a model fits the dataset."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
from PIL import Image

from qlip import assets
from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.parquet_reader import Numbers
from qlip.archive.dataset.schema import DatasetInfo
from qlip.errors import QLIPError
from qlip.modeling import QLIPModel, QLIPProcessor
from qlip.modeling.fingerprint import text_fingerprint
from qlip.modeling.indices import regroup
from qlip.tokens.image_codec import join_images

Need = Literal["text", "images", "decode"]

LONGEST = 200
"""Bytes of a file's name without its suffix; file systems allow 255 in all."""
SORTED_BATCHES = 8
"""Batches of rows that are sorted by grid, so that rows of one grid are decoded together."""

_ENDING = re.compile(r"(?<=[^/])\.(jpe?g|jpe|png|webp|avif|bmp|gif|tiff?|jp2|ppm)$", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\]')


def check_model(
    info: DatasetInfo, where: str, model: QLIPModel, processor: QLIPProcessor, name: str, need: Sequence[Need]
) -> None:
    """Refuse a model that does not fit a dataset.

    Args:
        info, where: description and address of the dataset.
        model, processor: of one checkpoint.
        name: of the model, for errors.
        need: ``text`` and ``images`` to compare their embeddings with the dataset's, ``decode`` to decode tokens.

    Raises:
        QLIPError: another model made the dataset.
    """
    compared = "text" in need or "images" in need
    sides = [
        ("text", info.text_fingerprint, text_fingerprint(model, processor) if compared else "", compared),
        ("codes", info.code_fingerprint, model.code_fingerprint, "images" in need),
        ("decoder", info.decoder_fingerprint, model.decoder_fingerprint, "decode" in need),
    ]
    for side, theirs, ours, needed in sides:
        if needed and theirs != ours:
            what = {"text": "compare with", "codes": "compare images with", "decoder": "decode"}[side]
            raise QLIPError(
                f"{where}: made by another model ({info.model}, {side} {(theirs or 'none')[:12]}) than {name}"
                f" ({side} {ours[:12]}), which cannot {what} it; {assets.model_to_give(info.code_fingerprint)}"
            )


def file_names(dataset: TokenDataset, rows: Numbers, *, joined: bool = False) -> Iterator[str]:
    """Yield a unique file name without suffix for each row, from its key.

    Keys come from untrusted tars, so a name never leaves its folder: no leading slash, no ``..``, no character that
    a file system forbids. If images have several views, the view's number is appended, unless the views are `joined`
    to one image; to a repeated name its row is appended.
    """
    seen: set[int] = set()
    views = dataset.info.views.count != 1 and not joined
    for start in range(0, len(rows), 1024):
        some = rows[start : start + 1024]
        numbers = dataset.groups.take(some, "view").to_pylist()
        for row, key, view in zip(some.tolist(), dataset.keys(some), numbers, strict=True):
            name = _inside(_ENDING.sub("", key)) + (f"-{view}" if views else "")
            if hash(name) in seen:
                name = f"{name}~{row}"
            seen.add(hash(name))
            yield name


def _inside(key: str) -> str:
    """Return a key as a path below a folder."""
    steps = [_FORBIDDEN.sub("_", step).strip() for step in key.split("/")]
    kept = [_short(step if step.strip(".") else "_" * len(step)) for step in steps if step]
    return "/".join(kept) or "_"


def _short(step: str) -> str:
    data = step.encode()
    if len(data) <= LONGEST:
        return step
    digest = hashlib.sha256(data).hexdigest()[:16]
    return f"{data[: LONGEST - 17].decode(errors='ignore')}-{digest}"


def decode_rows(
    dataset: TokenDataset, rows: Numbers, model: QLIPModel, processor: QLIPProcessor, batch_size: int
) -> Iterator[tuple[int, Image.Image]]:
    """Decode rows; yields (row, image), in order if the dataset has one grid, else nearly in order.

    Args:
        dataset: made by the model, see `check_model`.
        rows: numbers of rows.
        model: in eval mode.
        processor: of the same checkpoint.
        batch_size: rows per forward pass.
    """
    for start in range(0, len(rows), SORTED_BATCHES * batch_size):
        some = rows[start : start + SORTED_BATCHES * batch_size]
        for batch in _of_one_grid(dataset, some, batch_size):
            yield from zip(batch, decode_batch(dataset, batch, model, processor), strict=True)


@dataclass(frozen=True)
class TiledImage:
    """The rows of one image in a dataset of tiles.

    Attributes:
        key: of the image.
        rows: numbers of its rows in the dataset, one after the other.
        tiles: (rows, columns) of all its tiles.
        complete: every tile is there, once and in order.
    """

    key: str
    rows: range
    tiles: tuple[int, int]
    complete: bool


def tiled_images(dataset: TokenDataset, rows: range | None = None) -> list[TiledImage]:
    """Find the images of a dataset of tiles, in the order of its rows: an image's rows lie together, in one part.

    Args:
        dataset: of tiles.
        rows: all rows of some parts; None is the whole dataset.
    """
    among = range(len(dataset)) if rows is None else rows
    part_starts = {0, *dataset.groups.ends.tolist()}
    found: list[tuple[int, str, list[int], list[int]]] = []  # first row, key, size, views
    for start in range(among.start, among.stop, 1024):
        some = np.arange(start, min(start + 1024, among.stop))
        columns = (dataset.groups.take(some, name).to_pylist() for name in ("original_size", "view"))
        for row, key, size, view in zip(some.tolist(), dataset.keys(some), *columns, strict=True):
            if row in part_starts or (key, size) != found[-1][1:3] or view <= found[-1][3][-1]:
                found.append((row, key, size, []))
            found[-1][3].append(view)
    images = []
    for row, key, (width, height), views in found:
        tiles = dataset.info.views.tiles_of((width, height))
        complete = views == list(range(math.prod(tiles)))
        images.append(TiledImage(key, range(row, row + len(views)), tiles, complete))
    return images


def decode_tiled(
    dataset: TokenDataset,
    images: Sequence[TiledImage],
    model: QLIPModel,
    processor: QLIPProcessor,
    batch_size: int,
) -> Iterator[tuple[TiledImage, Image.Image]]:
    """Decode images from their tiles, in order.

    Args:
        dataset: made by the model, see `check_model`.
        images: complete ones, see `tiled_images`.
        model: in eval mode.
        processor: of the same checkpoint.
        batch_size: tiles per forward pass, of one image or of several.
    """
    rows = np.array([row for one in images for row in one.rows], dtype=np.int64)
    tiles = (image for _, image in decode_rows(dataset, rows, model, processor, batch_size))
    for one in images:
        yield one, join_images(list(islice(tiles, len(one.rows))), one.tiles)


def _of_one_grid(dataset: TokenDataset, rows: Numbers, batch_size: int) -> Iterator[list[int]]:
    grids = dataset.grids(rows)
    _, which = np.unique(grids, axis=0, return_inverse=True)
    for number in range(int(which.max(initial=-1)) + 1):
        same = rows[which.reshape(-1) == number].tolist()
        for start in range(0, len(same), batch_size):
            yield same[start : start + batch_size]


@torch.inference_mode()
def decode_batch(
    dataset: TokenDataset, rows: Sequence[int], model: QLIPModel, processor: QLIPProcessor
) -> list[Image.Image]:
    """Decode rows to images, in the given order; rows of one grid are decoded together.

    Args:
        dataset: made by the model, see `check_model`.
        rows: numbers of rows.
        model: in eval mode.
        processor: of the same checkpoint.
    """
    grids = [(height, width) for height, width in dataset.grids(rows).tolist()]
    images: list[Image.Image | None] = [None] * len(rows)
    for grid in dict.fromkeys(grids):
        places = [place for place, one in enumerate(grids) if one == grid]
        stored = dataset.batch([rows[place] for place in places])
        indices = regroup(stored, model.group_size, from_group_size=dataset.group_size)
        made = processor.to_images(model.decode(indices.to(model.device), grid))
        for place, image in zip(places, made, strict=True):
            images[place] = image
    return [image for image in images if image is not None]


def chosen_rows(text: str | None, size: int, where: str) -> Numbers:
    """Parse row numbers such as ``5``, ``0:100``, ``-16:``, or several with commas; None is all rows.

    Raises:
        QLIPError: no such row, or not a number.
    """
    found: list[int] = []
    for piece in (":" if text is None else text).split(","):
        match = re.fullmatch(r"\s*(-?\d+)?\s*(:)?\s*(-?\d+)?\s*", piece)
        if match is None or not any(match.groups()) or (match[3] and not match[2]):
            raise QLIPError(f"rows {text!r}: give numbers such as 5, 0:100 or -16:, with commas between")
        first, colon, last = match.groups()
        if colon:
            found += range(*slice(first and int(first), last and int(last)).indices(size))
        elif -size <= int(first) < size:
            found.append(int(first) % size)
        else:
            raise QLIPError(
                f"row {first} of {size:,} in {where}: count from 0 to {size - 1:,}, or from the end with -1"
            )
    return np.array(list(dict.fromkeys(found)), dtype=np.int64)
