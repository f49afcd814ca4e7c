"""JPEG, WebP and AVIF as subjects: what everybody's codecs make of the same images at the same bytes.

A codec may choose quality and, as a person short of bytes would, size. Of each size it takes the largest file within
the budget; of the sizes, from the whole one down, it keeps the one with the higher PSNR as long as that rises.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, features
from torch import Tensor

from qlip.errors import QLIPError
from qlip.evaluation.models.base import RECONSTRUCT, EvalModel, Reconstructed
from qlip.modeling import Preprocessing, to_images

Codec = Literal["jpeg", "webp", "avif"]
Headers = Literal["counted", "excluded"]

SCALES = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 3 / 32, 1 / 16)
"""Of the sides, for images that are shrunk before they are encoded and enlarged afterwards, both bicubically."""
HIGHEST = 100
"""Quality of every codec's best; 1 is the lowest that is tried."""
BESIDE = 2
"""Bytes counted for what a JPEG's data does not say itself without its headers: quality and scale."""

_OPTIONS: dict[tuple[Codec, Headers], dict[str, Any]] = {
    ("jpeg", "counted"): {"subsampling": "4:2:0", "optimize": True},
    # the standard's Huffman tables: without headers nobody would know of others
    ("jpeg", "excluded"): {"subsampling": "4:2:0", "optimize": False},
    ("webp", "counted"): {"method": 6},
    ("webp", "excluded"): {"method": 6},
    ("avif", "counted"): {"subsampling": "4:2:0", "speed": 6, "max_threads": 1},
    ("avif", "excluded"): {"subsampling": "4:2:0", "speed": 6, "max_threads": 1},
}
_LIBRARIES: dict[Codec, str] = {"jpeg": "jpg", "webp": "webp", "avif": "avif"}
"""Pillow's names of them."""


@dataclass(frozen=True)
class Encoded:
    """An image as a file.

    Attributes:
        data: the file.
        num_bytes: what is counted of it.
        size: (width, height) in the file.
        quality: it was written with.
    """

    data: bytes
    num_bytes: int
    size: tuple[int, int]
    quality: int


class CodecEvalModel(EvalModel):
    """A codec that keeps every image within a number of bytes.

    Images are prepared as a model's are and given to the codec as 8-bit RGB; colour at half resolution (4:2:0), JPEG
    with Huffman tables made for the image, WebP's method 6, AVIF's speed 6 (libaom's middle). Deterministic for one
    version of Pillow and its libraries, which are part of the fingerprint.

    Args:
        codec: ``jpeg``, ``webp`` or ``avif``.
        num_bytes: of an image, at most.
        preprocessing: of the model it is held against.
        headers: ``counted`` counts the whole file. ``excluded`` counts what differs between images of one size: a
            JPEG's entropy-coded data, with the standard's tables, and two bytes for quality and scale; the ``VP8``
            chunk's content of a WebP; the ``mdat`` box's content of an AVIF.
        name: what tables call it; by default codec, bytes, and ``without headers`` where they are excluded.

    Raises:
        QLIPError: no such codec, one that this Pillow lacks, or a budget that not even the smallest file keeps.
    """

    kind = "CodecSubject"

    def __init__(
        self,
        codec: Codec,
        num_bytes: int,
        preprocessing: Preprocessing,
        headers: Headers = "counted",
        name: str | None = None,
    ) -> None:
        if codec not in get_args(Codec) or headers not in get_args(Headers):
            raise QLIPError(f"codecs are jpeg, webp and avif, headers counted or excluded; got {codec} and {headers}")
        if not features.check(_LIBRARIES[codec]):
            raise QLIPError(f'this Pillow cannot write {codec}: pip install --upgrade "pillow>=11.3"')
        self.codec, self.num_bytes, self.headers = codec, num_bytes, headers
        title = "WebP" if codec == "webp" else codec.upper()
        self.name = name or f"{title}, {num_bytes} bytes" + ("" if headers == "counted" else " without headers")
        self.capabilities, self.preprocessing, self.device = (
            frozenset({RECONSTRUCT}),
            preprocessing,
            torch.device("cpu"),
        )
        height, width = preprocessing.size
        self.sizes = list(dict.fromkeys((max(1, round(width * s)), max(1, round(height * s))) for s in SCALES))
        if self._within(Image.new("RGB", (width, height), (127, 127, 127)), self.sizes[-1]) is None:
            raise QLIPError(
                f"{codec} cannot keep {width}x{height} pixels within {num_bytes} bytes, not even grey ones at"
                f" {self.sizes[-1][0]}x{self.sizes[-1][1]}; {_remedy(headers)}"
            )

    @property
    def notes(self) -> Mapping[str, str]:  # type: ignore[override]
        """What counts as a byte, and how the budget was kept."""
        whole = {"jpeg": "entropy-coded data and two bytes", "webp": "VP8 data", "avif": "AV1 data"}[self.codec]
        counted = "whole files, headers included" if self.headers == "counted" else f"{whole}, without headers"
        return MappingProxyType(
            {
                "bits_per_pixel": f"{counted}; the largest file of at most {self.num_bytes} bytes",
                "psnr": "shrunk before and enlarged after where that is nearer to the picture, or needed to fit",
            }
        )

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Of codec, budget, settings and versions."""
        height, width = self.preprocessing.size
        made_by = {
            "codec": self.codec,
            "num_bytes": self.num_bytes,
            "headers": self.headers,
            "options": _OPTIONS[self.codec, self.headers],
            "sizes": self.sizes,
            "pixels": [width, height],
            "pillow": Image.__version__,  # type: ignore[attr-defined]
            "library": features.version(_LIBRARIES[self.codec]),
        }
        return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()

    def reconstruct(self, pixel_values: Tensor) -> Reconstructed:
        """Encode each image within its bytes, and decode it."""
        pixels = self.preprocessing.denormalize(pixel_values.cpu())
        with ThreadPoolExecutor() as threads:  # codecs leave the interpreter to others
            made = list(threads.map(self.best, to_images(pixels)))
        decoded = np.stack([self.decode(one) for one in made])
        rebuilt = torch.from_numpy(decoded).permute(0, 3, 1, 2).float() / 255
        return Reconstructed(rebuilt, torch.tensor([one.num_bytes for one in made]))

    def best(self, image: Image.Image) -> Encoded:
        """The file to keep of an RGB image of the model's size.

        Raises:
            QLIPError: not even the smallest size at the lowest quality fits.
        """
        original = np.asarray(image, dtype=np.float64)
        kept, error = None, np.inf
        for size in self.sizes:
            found = self._within(image, size)
            if found is None:
                continue
            now = float(np.square(self.decode(found) - original).mean())
            if kept is not None and now >= error:
                break
            kept, error = found, now
        if kept is None:
            width, height = self.sizes[-1]
            raise QLIPError(
                f"{self.name}: a picture does not fit, not even {width}x{height} pixels at the lowest quality;"
                f" {_remedy(self.headers)}"
            )
        return kept

    def decode(self, encoded: Encoded) -> NDArray[np.uint8]:
        """(H, W, 3) at the model's size."""
        height, width = self.preprocessing.size
        with Image.open(io.BytesIO(encoded.data)) as file:
            image = file.convert("RGB")
        return np.asarray(image if image.size == (width, height) else image.resize((width, height), _BICUBIC))

    def _within(self, image: Image.Image, size: tuple[int, int]) -> Encoded | None:
        """The largest file within the budget at a size, by bisection of quality; None where the lowest is too large.

        Bytes rise with quality but for a few of them: the next quality up does not fit.
        """
        small = image if image.size == size else image.resize(size, _BICUBIC)
        low, high, kept = 1, HIGHEST, None
        while low <= high:
            quality = (low + high) // 2 if kept is not None else 1
            made = self.write(small, quality)
            if made.num_bytes <= self.num_bytes:
                kept, low = made, quality + 1
            elif kept is None:
                return None
            else:
                high = quality - 1
        return kept

    def write(self, image: Image.Image, quality: int) -> Encoded:
        """An RGB image of any size as a file."""
        file = io.BytesIO()
        image.save(file, self.codec.upper(), quality=quality, **_OPTIONS[self.codec, self.headers])
        data = file.getvalue()
        num_bytes = len(data) if self.headers == "counted" else payload(data, self.codec)
        return Encoded(data, num_bytes, image.size, quality)


_BICUBIC = Image.Resampling.BICUBIC


def payload(data: bytes, codec: Codec) -> int:
    """Bytes of a file that differ between images of one size; see :class:`CodecEvalModel`."""
    if codec == "webp":  # RIFF, size, WEBP, then the chunk: VP8, size, content
        return int.from_bytes(data[16:20], "little")
    at = 0
    if codec == "avif":  # boxes: size, type, content
        while data[at + 4 : at + 8] != b"mdat":
            at += int.from_bytes(data[at : at + 4], "big")
        return int.from_bytes(data[at : at + 4], "big") - 8
    at = 2  # segments after the start marker: marker, size, content; the scan's header is the last before the data
    while data[at + 1] != 0xDA:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return len(data) - at - 2 + BESIDE


def at_equal_bytes(
    num_bytes: int, preprocessing: Preprocessing, headers: Headers = "counted"
) -> tuple[list[CodecEvalModel], dict[str, str]]:
    """Every codec that can keep a budget, to stand beside a model of as many bytes an image.

    Returns:
        The subjects; and by the names of the others, why not.
    """
    subjects: list[CodecEvalModel] = []
    others: dict[str, str] = {}
    for codec in get_args(Codec):
        try:
            subjects.append(CodecEvalModel(codec, num_bytes, preprocessing, headers))
        except QLIPError as error:
            others[codec] = str(error)
    return subjects, others


def _remedy(headers: Headers) -> str:
    return "give more bytes" + (", or do not count headers" if headers == "counted" else "")
