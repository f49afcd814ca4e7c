"""JPEG, WebP and AVIF as baselines: reconstructions by common codecs at a model's number of bytes per image.

`CodecEvalModel` searches quality and size. For each size, from the whole one down, it takes the largest file within the
budget, as long as the PSNR rises. `at_equal_bytes` makes one of every codec.

Bytes of fixed headers are not counted, as a model's tokens have none either: at 224 bytes, the bundled model's budget,
no JPEG and no AVIF can be written at all if whole files count. `payload` is what counts.
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

SCALES = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 3 / 32, 1 / 16)
"""Factors of the sides: images may be shrunk before encoding and enlarged after decoding, both bicubically."""
HIGHEST = 100
"""Highest quality of all codecs; 1 is the lowest that is tried."""
BESIDE = 2
"""Bytes counted for a JPEG's quality and scale, which its headers hold."""

_OPTIONS: dict[Codec, dict[str, Any]] = {
    "jpeg": {"subsampling": "4:2:0", "optimize": False},  # the standard's Huffman tables, as headers do not count
    "webp": {"method": 6},
    "avif": {"subsampling": "4:2:0", "speed": 6, "max_threads": 1},
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

    Images are preprocessed as the model's are and given to the codec as 8-bit RGB; colour at half resolution (4:2:0),
    JPEG with the standard's Huffman tables, WebP's method 6, AVIF's speed 6 (libaom's middle). Deterministic for one
    version of Pillow and its libraries, which are part of the fingerprint.

    Args:
        codec: ``jpeg``, ``webp`` or ``avif``.
        num_bytes: most bytes per image, as :func:`payload` counts them.
        preprocessing: of the model that it is compared with.
        name: in tables; by default codec and bytes.

    Raises:
        QLIPError: no such codec, Pillow lacks it, or not even the smallest file is within the budget.
    """

    kind = "CodecSubject"

    def __init__(
        self,
        codec: Codec,
        num_bytes: int,
        preprocessing: Preprocessing,
        name: str | None = None,
    ) -> None:
        if codec not in get_args(Codec):
            raise QLIPError(f"{codec}: no such codec; choose jpeg, webp or avif")
        if not features.check(_LIBRARIES[codec]):
            raise QLIPError(f'this Pillow cannot write {codec}: pip install --upgrade "pillow>=11.3"')
        self.codec, self.num_bytes = codec, num_bytes
        title = "WebP" if codec == "webp" else codec.upper()
        self.name = name or f"{title}, {num_bytes} bytes without headers"
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
                f" {self.sizes[-1][0]}x{self.sizes[-1][1]}; give more bytes"
            )

    @property
    def notes(self) -> Mapping[str, str]:  # type: ignore[override]
        """How bytes are counted, and how the budget is kept."""
        counted = {"jpeg": "entropy-coded data and two bytes", "webp": "VP8 data", "avif": "AV1 data"}[self.codec]
        return MappingProxyType(
            {
                "bits_per_pixel": f"{counted}, without headers; the largest file of at most {self.num_bytes} bytes",
                "psnr": "shrunk before and enlarged after where that is nearer to the image, or needed to fit",
            }
        )

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """SHA-256 (hex) of codec, budget, settings and versions."""
        height, width = self.preprocessing.size
        made_by = {
            "codec": self.codec,
            "num_bytes": self.num_bytes,
            "headers": "excluded",
            "options": _OPTIONS[self.codec],
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
                f"{self.name}: an image does not fit, not even {width}x{height} pixels at the lowest quality;"
                " give more bytes"
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
        image.save(file, self.codec.upper(), quality=quality, **_OPTIONS[self.codec])
        data = file.getvalue()
        return Encoded(data, payload(data, self.codec), image.size, quality)


_BICUBIC = Image.Resampling.BICUBIC


def payload(data: bytes, codec: Codec) -> int:
    """Bytes of a file that differ between images of one size: its coded data.

    That is the content of a WebP's ``VP8`` chunk, of an AVIF's ``mdat`` box; a JPEG's entropy-coded data behind the
    header of its only scan (marker, length 12), without the end marker, and `BESIDE`.
    """
    if codec == "webp":  # RIFF, size, WEBP, VP8, size of the content
        return int.from_bytes(data[16:20], "little")
    if codec == "avif":  # size of the box, mdat, content
        box = data.index(b"mdat") - 4
        return int.from_bytes(data[box : box + 4], "big") - 8
    return len(data) - data.index(b"\xff\xda\x00\x0c") - 14 - 2 + BESIDE


def at_equal_bytes(num_bytes: int, preprocessing: Preprocessing) -> tuple[list[CodecEvalModel], dict[str, str]]:
    """Make every codec that can keep a budget, to compare with a model of as many bytes per image.

    Returns:
        The codecs; and by the names of the others, the reason.
    """
    models: list[CodecEvalModel] = []
    others: dict[str, str] = {}
    for codec in get_args(Codec):
        try:
            models.append(CodecEvalModel(codec, num_bytes, preprocessing))
        except QLIPError as error:
            others[codec] = str(error)
    return models, others
