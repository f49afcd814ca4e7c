"""Result files: in the format that their name asks for, written atomically, never replacing other content unasked."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

from PIL import Image

from qlip.cli.console import usage_error
from qlip.errors import QLIPError
from qlip.files import write_bytes


def png(image: Image.Image) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def enlarged_size(image: Image.Image, original_size: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) that the encoded region had in the original, which may have another aspect ratio."""
    scale = min(original / now for original, now in zip(original_size, image.size, strict=True))
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def enlarged(image: Image.Image, original_size: tuple[int, int]) -> Image.Image:
    """Resize a reconstruction to the size that the encoded region had in the original of ``original_size``."""
    return image.resize(enlarged_size(image, original_size), Image.Resampling.BICUBIC)


def image_file(path: Path, image: Image.Image) -> bytes:
    """Encode an image in the format of the suffix of ``path``.

    Raises:
        QLIPError: the format cannot hold it; WebP and JPEG, for instance, have a largest size.
    """
    buffer, kind = io.BytesIO(), Image.registered_extensions()[path.suffix.lower()]
    try:
        image.save(buffer, kind, quality=92)
    except (ValueError, OSError, KeyError, TypeError, struct.error) as error:
        size = f"{image.width} x {image.height} pixels"
        raise QLIPError(f"{path}: {kind} cannot hold an image of {size} ({error}); use .png") from None
    return buffer.getvalue()


def check_image_name(path: Path) -> None:
    """Refuse a suffix that Pillow cannot write, before any work is done.

    Raises:
        UsageError: the suffix names no format that can be written.
    """
    try:
        image_file(path, Image.new("RGB", (16, 16)))
    except (KeyError, QLIPError):
        usage_error(
            f"{path}: {path.suffix or 'no suffix'} is not an image format that can be written; use .png, .jpg or .webp"
        )


def write_new(path: Path, data: bytes, overwrite: bool, *, folder: Path) -> None:
    """Write a file whose name follows from its input; other content is replaced only with ``overwrite``.

    Args:
        path: of the file, in ``folder`` or in a subfolder.
        data: content of the file.
        overwrite: replace other content.
        folder: that the user named; symbolic links below it are not followed, since names come from anyone's files.

    Raises:
        QLIPError: the file exists with other content, is behind a symbolic link, or cannot be written.
    """
    for parent in path.relative_to(folder).parents:
        if (folder / parent).is_symlink() and parent != Path():
            raise QLIPError(
                f"{path}: {folder / parent} is a symbolic link, which is not followed; give another --output"
            )
    if os.path.lexists(path) and not overwrite:
        if path.is_file() and path.read_bytes() == data:
            return
        raise QLIPError(f"{path}: exists with other content; --overwrite replaces it, another --output keeps both")
    write_bytes(path, data)
