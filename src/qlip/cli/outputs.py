"""Writing results: in the format a file's name asks for, whole or not at all, never over another content unasked."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from qlip.cli.console import usage_error
from qlip.errors import QLIPError
from qlip.files import write_bytes


def png(image: Image.Image) -> bytes:
    """The image as a PNG file's content."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def picture_file(path: Path, image: Image.Image) -> bytes:
    """The image as the content of a file called ``path``.

    Its ending names the format; see `check_picture_name`.
    """
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[path.suffix.lower()], quality=92)
    return buffer.getvalue()


def check_picture_name(path: Path) -> None:
    """Refuse an ending that Pillow does not write, before any work is done.

    Raises:
        UsageError: no format that can be written.
    """
    formats = Image.registered_extensions()
    if path.suffix.lower() not in formats or formats[path.suffix.lower()] not in Image.SAVE:
        usage_error(f"{path}: {path.suffix or 'no ending'} is no picture format to write; use .png, .jpg or .webp")


def write_new(path: Path, data: bytes, overwrite: bool) -> None:
    """Write a file whose name the person did not type: never over another content, unless told so.

    Raises:
        QLIPError: it exists and holds something else, or cannot be written.
    """
    if path.exists() and not overwrite:
        if path.is_file() and path.read_bytes() == data:
            return
        raise QLIPError(
            f"{path}: exists and holds something else; --overwrite replaces it, another --output keeps both"
        )
    write_bytes(path, data)
