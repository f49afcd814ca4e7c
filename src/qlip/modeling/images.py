"""Load images of any common type as 8-bit RGB, as a viewer shows them."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from qlip.errors import QLIPError
from qlip.files import refuse_special
from qlip.runtime.finite import require_finite

ImageInput = Image.Image | np.ndarray[Any, Any] | Tensor | str | Path | bytes | bytearray | Mapping[str, Any]
"""PIL image; (H, W), (H, W, C) or (C, H, W) array or tensor, 8-bit, 16-bit or float in [0, 1]; path; content of a file;
or a dict of ``bytes`` or ``path``, as the package ``datasets`` has it."""

ColorProfiles = Literal["convert", "ignore"]
"""Embedded ICC profiles: colours are converted to sRGB, as viewers do, or left as stored, as CLIP's processors do."""

BACKGROUND = (255, 255, 255)
"""Colour behind transparent pixels."""
_SMALL_GREY = {"L;2": 85, "L;4": 17}
"""Factor to 8 bits of Pillow's 2-bit and 4-bit grey, whose transparent level it leaves as it is."""
SRGB_TOLERANCE = 1
"""Largest change of an 8-bit level by a profile that is taken for sRGB."""


def load_image(source: ImageInput, name: str | None = None, color_profiles: ColorProfiles = "convert") -> Image.Image:
    """Decode an image and convert it to RGB.

    EXIF orientation is applied, colours become sRGB, transparency is put on white, and 16-bit, float, grey, CMYK and
    palette images become 8-bit RGB.

    Args:
        source: see ``ImageInput``.
        name: name of the image in errors; the path by default.
        color_profiles: see ``ColorProfiles``.

    Returns:
        An RGB image, fully decoded.

    Raises:
        QLIPError: no such file, not an image, truncated, too large, or an array of another shape or type.
    """
    if isinstance(source, Tensor | np.ndarray):
        return _from_array(source, name or "array")
    if isinstance(source, Image.Image):
        return _decoded(source, name or "image", color_profiles)
    if isinstance(source, Mapping):
        given = source.get("bytes") or source.get("path")
        if given is None:
            raise QLIPError(f"{name or 'image'}: a dict must have the image under 'bytes' or 'path'")
        return load_image(given, name or source.get("path"), color_profiles)
    if isinstance(source, bytes | bytearray):
        name = name or f"{len(source)} bytes"
    elif isinstance(source, str | Path):
        name = name or str(source)
    else:
        kind = type(source).__name__  # type: ignore[unreachable]  # a caller without types
        raise QLIPError(f"{name or 'image'}: {kind} is not an image; give a PIL image, an array, a path or bytes")
    if isinstance(source, str | Path):
        refuse_special(source, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            try:
                return _opened(source, name, color_profiles)
            except ValueError as error:
                if "MAX_TEXT" not in str(error):
                    raise
                data = source if isinstance(source, bytes | bytearray) else Path(source).read_bytes()
                return _opened(_without_text(data), name, color_profiles)
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


def check_pixels(pixels: Tensor) -> None:
    """Refuse what is no tensor (B, 3, H, W) of floats."""
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        got = f"{tuple(pixels.shape)} {pixels.dtype}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise QLIPError(f"pixels must be a tensor of floats (B, 3, H, W), got {got}")


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Convert (B, 3, H, W) pixels in [0, 1] to B RGB images. Raises QLIPError if one is not finite."""
    check_pixels(pixels)
    require_finite(pixels, "pixels", "check the model or the image that they come from")
    arrays = to_uint8(pixels.detach()).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def _opened(source: str | Path | bytes | bytearray, name: str, color_profiles: ColorProfiles) -> Image.Image:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes | bytearray) else source) as opened:
        return _decoded(opened, name, color_profiles)


def _without_text(png: bytes | bytearray) -> bytes:
    """Remove a PNG's texts, on which no pixel depends, and which Pillow refuses above 1 MB; XMP has the orientation."""
    kept, start = [png[:8]], 8
    while start + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, start)
        chunk = png[start : start + 12 + length]
        if kind not in (b"tEXt", b"zTXt", b"iTXt") or chunk[8:].startswith(b"XML:com.adobe.xmp\0"):
            kept.append(chunk)
        start += 12 + length
    return b"".join(kept)


def _decoded(image: Image.Image, name: str, color_profiles: ColorProfiles = "ignore") -> Image.Image:
    tiles = getattr(image, "tile", None)
    packed = tiles[0][3] if tiles else None  # Pillow's name of the stored form, known until the pixels are decoded
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise QLIPError(f"{name}: broken image ({error}); save it again from its source") from None
    try:
        turned = ImageOps.exif_transpose(image)
    except (struct.error, SyntaxError, ValueError, KeyError, TypeError, EOFError):
        turned = image  # unreadable EXIF data hold no orientation
    if turned.mode.startswith("I;16") or turned.mode in ("I", "F"):
        turned = _from_deep_grey(turned, name)
    if turned.mode == "La":
        turned = turned.convert("LA")  # the only conversion Pillow has for it
    elif turned.mode in ("PA", "RGBa") or "transparency" in turned.info:
        clear = turned.info.get("transparency")
        if isinstance(clear, tuple) and max(clear) > 255:
            turned.info["transparency"] = tuple(level >> 8 for level in clear)  # of 16-bit colour, which Pillow cuts
        elif isinstance(clear, int) and packed in _SMALL_GREY:
            turned.info["transparency"] = clear * _SMALL_GREY[packed]
        turned = turned.convert("LA" if turned.mode == "L" else "RGBA")
    if color_profiles == "convert" and (profile := image.info.get("icc_profile")):
        turned = _in_srgb(turned, profile)
    if "A" in turned.getbands():
        with_alpha = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", with_alpha.size, (*BACKGROUND, 255)), with_alpha)
    rgb = turned.convert("RGB")
    return rgb.copy() if rgb is image else rgb


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert colours from an embedded ICC profile to sRGB; alpha stays."""
    mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    transform = _transform_to_srgb(profile, mode)
    if transform is None:
        return image
    converted = ImageCms.applyTransform(image.convert(mode), transform)
    assert converted is not None  # it is None only in place
    if "A" in image.getbands():
        converted.putalpha(image.getchannel("A"))
    return converted


@lru_cache(maxsize=32)
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of colours of a mode; None for sRGB itself, a profile that does not fit, or a broken one.

    Most profiles in photographs are sRGB's, in many editions: recognised by what they do, they cost nothing.
    """
    try:
        transform = ImageCms.buildTransform(io.BytesIO(profile), ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode == "CMYK":
        return transform
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(len(levels), -1, 3)
    probe = Image.fromarray(cube if mode == "RGB" else np.ascontiguousarray(cube[..., 0]))
    converted = ImageCms.applyTransform(probe, transform)
    assert converted is not None
    changed = np.abs(np.asarray(converted, dtype=int) - np.asarray(probe.convert("RGB"), dtype=int))
    return transform if changed.max() > SRGB_TOLERANCE else None


def _from_deep_grey(image: Image.Image, name: str) -> Image.Image:
    """Scale 16-bit, 32-bit and float grey to 8 bits, which Pillow's own conversion would clip at 255."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise QLIPError(f"{name}: holds pixels that are NaN or infinite; replace them and save it again")
    largest = values.max(initial=0)
    if image.mode == "F":  # in [0, 1], 8-bit or 16-bit levels; filters overshoot a little
        top = next((top for top in (1.0, 255.0, 65535.0) if largest <= 2 * top), None)
        if top is None:
            raise QLIPError(f"{name}: float pixels of up to {largest:.3g}; scale them to [0, 1]")
    else:
        top = 65535.0 if image.mode.startswith("I;16") or largest > 255 else 255.0
    grey = Image.fromarray(np.clip(np.rint(values / top * 255), 0, 255).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


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
