"""Helpers that the data sets share: trusted large images, and encoding."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image


@contextmanager
def large_images_allowed() -> Iterator[None]:
    """Lift Pillow's guard against decompression bombs, for files whose checksum is known."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def encode(image: Image.Image, kind: str) -> bytes:
    """An image as the bytes of a file: "png", "jpg" (95, colour at full size) or "webp" (95)."""
    buffer = io.BytesIO()
    match kind:
        case "png":
            image.save(buffer, "png")
        case "jpg":
            image.save(buffer, "jpeg", quality=95, subsampling=0)
        case "webp":
            image.save(buffer, "webp", quality=95, method=4)
        case _:
            raise AssertionError(kind)
    return buffer.getvalue()
