"""Load images of any common type as 8-bit RGB, as a viewer shows them."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from qlip.errors import QLIPError
from qlip.runtime.finite import require_finite

ImageInput = Image.Image | np.ndarray[Any, Any] | Tensor | str | Path | bytes
"""PIL image; (H, W), (H, W, C) or (C, H, W) array or tensor, 8-bit, 16-bit or float in [0, 1]; path; bytes."""

BACKGROUND = (255, 255, 255)
"""Colour behind transparent pixels."""


def load_image(source: ImageInput, name: str | None = None) -> Image.Image:
    """Decode an image and convert it to RGB.

    EXIF orientation is applied, transparency is put on white, and 16-bit, grey, CMYK and palette become 8-bit RGB.

    Args:
        source: see ``ImageInput``.
        name: name of the image in errors; the path by default.

    Returns:
        An RGB image, fully decoded.

    Raises:
        QLIPError: no such file, not an image, truncated, too large, or an array of another shape or type.
    """
    if isinstance(source, Tensor | np.ndarray):
        return _from_array(source, name or "array")
    if isinstance(source, Image.Image):
        return _decoded(source, name or "image")
    name = name or (f"{len(source)} bytes" if isinstance(source, bytes) else str(source))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
                return _decoded(opened, name)
    except FileNotFoundError:
        raise QLIPError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise QLIPError(f"{name}: is a folder; name an image in it") from None
    except UnidentifiedImageError:
        raise QLIPError(f"{name}: not an image that can be read; convert it to PNG or JPEG") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = Image.MAX_IMAGE_PIXELS or 0
        raise QLIPError(f"{name}: more than {limit / 1e6:.0f} megapixels; shrink it first") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, QLIPError):
            raise
        raise QLIPError(f"{name}: broken image ({error}); save it again from its source") from None


def to_uint8(pixels: Tensor) -> Tensor:
    """Round pixels in [0, 1], of any shape, device and floating type, to 8 bits."""
    return (pixels.float() * 255).round().to(torch.uint8)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Convert (B, 3, H, W) pixels in [0, 1] to B RGB images. Raises QLIPError if one is not finite."""
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or pixels.shape[1] != 3:
        got = getattr(pixels, "shape", type(pixels).__name__)
        raise QLIPError(f"pixels must be a tensor (B, 3, H, W), got {got}")
    require_finite(pixels, "pixels", "check the model or the image that they come from")
    arrays = to_uint8(pixels.detach()).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def _decoded(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise QLIPError(f"{name}: broken image ({error}); save it again from its source") from None
    try:
        turned = ImageOps.exif_transpose(image)
    except (struct.error, SyntaxError, ValueError, KeyError, TypeError, EOFError):
        turned = image  # unreadable EXIF data hold no orientation
    if turned.mode.startswith("I;16") or turned.mode in ("I", "F"):
        turned = _from_deep_grey(turned)
    if turned.mode == "La":
        turned = turned.convert("LA")  # the only conversion Pillow has for it
    if turned.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in turned.info:
        with_alpha = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", with_alpha.size, (*BACKGROUND, 255)), with_alpha)
    rgb = turned.convert("RGB")
    return rgb.copy() if rgb is image else rgb


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """16-bit and 32-bit grey, which Pillow's own conversion would clip at 255 instead of scaling."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        top = 1.0 if values.size and values.max() <= 1.0 else 255.0
    else:
        top = 65535.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 255.0
    return Image.fromarray(np.clip(np.rint(values / top * 255), 0, 255).astype(np.uint8))


def _from_array(source: Tensor | np.ndarray[Any, Any], name: str) -> Image.Image:
    if isinstance(source, Tensor):
        source = (
            source.detach().cpu().float().numpy() if source.dtype == torch.bfloat16 else source.detach().cpu().numpy()
        )
    array = source
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)  # (C, H, W), as PyTorch has it
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (2, 3, 4)) or array.size == 0:
        raise QLIPError(f"{name}: shape {tuple(source.shape)} is not an image; give (H, W), (H, W, C) or (C, H, W)")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = np.rint(array / 257).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise QLIPError(f"{name}: floating pixels must lie in [0, 1]; scale them, or pass 8-bit integers")
        array = np.rint(array * 255).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.integer) and array.min() >= 0 and array.max() <= 255:
        array = array.astype(np.uint8)
    else:
        raise QLIPError(f"{name}: pixels of type {array.dtype} outside 0 to 255; give 8-bit, 16-bit or float in [0, 1]")
    return _decoded(Image.fromarray(np.ascontiguousarray(array)), name)
