"""Small real images and sources for the tests of `qlip.data`: gradients with a marked corner, each its own."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qlip.data import FolderImages, TarImages
from qlip.data.shards.build_index import build_index
from qlip.data.sources.base import CaptionedImages, RawSample
from qlip.data.storage.storage import Storage

from .objects import QUICK

TEXT_LENGTH = 12


def make_image(number: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """Make a smooth asymmetric image of (width, height), different for each number."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    red = 255 * x / max(1, width - 1)
    green = 255 * y / max(1, height - 1)
    blue = np.full_like(red, number * 37 % 256)
    array = np.stack([red, green, blue], -1).round().astype(np.uint8)
    array[: height // 4, : width // 4] = 255 - number % 128
    return Image.fromarray(array)


def encoded(number: int, kind: str = "png", size: tuple[int, int] = (24, 16)) -> bytes:
    buffer = io.BytesIO()
    make_image(number, size).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of (name, content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def shard(path: Path, numbers: Iterable[int], broken: Iterable[int] = ()) -> Path:
    """A shard of numbered images; even ones have two captions, odd ones a label; those in `broken` do not decode."""
    files = []
    for number in numbers:
        data = encoded(number)
        files.append((f"{number:04d}.png", data[: len(data) // 2] if number in broken else data))
        words = (
            {"captions": [f"first {number}", f"second {number}"]}
            if number % 2 == 0
            else {"label": f"odd {number % 10}"}
        )
        files.append((f"{number:04d}.json", json.dumps(words).encode()))
    return write_tar(path, files)


def tars(folder: Path, count: int = 40, name: str = "tars", broken: Iterable[int] = ()) -> TarImages:
    half = count // 2
    shard(folder / f"{name}-00.tar", range(half), broken)
    shard(folder / f"{name}-01.tar", range(half, count), broken)
    return TarImages(f"{folder}/{name}-{{00..01}}.tar", name=name)


def folder(path: Path, count: int = 7, name: str = "folder") -> FolderImages:
    """A folder of numbered images; those divisible by three have a text beside them."""
    path.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (path / f"{number:03d}.jpg").write_bytes(encoded(number, "jpeg"))
        if number % 3 == 0:
            (path / f"{number:03d}.txt").write_text(f"image {number}")
    return FolderImages(path, name=name)


def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
    """The first bytes of each text, from 1 on, padded with 0."""
    ids = torch.zeros(len(texts), TEXT_LENGTH, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        data = text.encode()[:TEXT_LENGTH]
        row[: len(data)] = torch.tensor(list(data), dtype=torch.int64) + 1
    return ids, (ids > 0).to(torch.int64)


def index_all(*shards: Path | str, into: str | None = None) -> None:
    for one in shards:
        build_index(str(one), Storage(QUICK), into)


def everything(source: CaptionedImages) -> list[RawSample]:
    return [source.read(index) for index in range(len(source))]


def all_of(source: CaptionedImages) -> dict[str, tuple[tuple[str, ...], str | None]]:
    return {raw.key: (raw.captions, raw.label) for raw in everything(source)}
