"""Images of every common type, loaded as 8-bit RGB."""

from __future__ import annotations

import os
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from qlip import QLIPError, QLIPProcessor
from qlip.modeling.images import load_image
from tests.modeling.helpers import BLUE, GREEN, RED, WHITE, as_array, assert_one_line, photo


def test_load_image__every_source_type_gives_equal_pixels(processor: QLIPProcessor, tmp_path: Path) -> None:
    image = photo()
    array = np.asarray(image)
    path = tmp_path / "photo.png"
    image.save(path)
    ways: dict[str, Any] = {
        "PIL": image,
        "path": path,
        "string": str(path),
        "bytes": path.read_bytes(),
        "array": array,
        "array, channels first": array.transpose(2, 0, 1),
        "array of floats": array / 255,
        "tensor": torch.from_numpy(array.copy()),
        "tensor, channels first": torch.from_numpy(array.copy()).permute(2, 0, 1),
        "tensor of floats": torch.from_numpy(array.copy()).permute(2, 0, 1) / 255,
        "tensor of int64": torch.from_numpy(array.copy()).long(),
    }
    expected = processor(images=image)["pixel_values"]
    assert expected.shape == (1, 3, 32, 32)
    assert expected.dtype == torch.float32
    for name, source in ways.items():
        assert torch.equal(processor(images=source)["pixel_values"], expected), name
        assert torch.equal(processor(images=[source])["pixel_values"], expected), name
    together = processor(images=list(ways.values()))["pixel_values"]
    assert torch.equal(together, expected.expand(len(ways), -1, -1, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_load_image__exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = photo(24, 16)
    stored = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    stored.save(path, exif=exif)
    assert np.array_equal(as_array(load_image(path)), as_array(upright))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "La", "RGBa"])
def test_load_image__transparency_is_put_on_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 2), (*RED, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.putpixel((1, 0), (*RED, 128))
    if mode in ("LA", "La"):
        loaded = load_image(image.convert("LA").convert(mode))
    elif mode in ("P", "PA"):
        palette = Image.new(mode, (4, 2), 1 if mode == "P" else (1, 255))
        palette.putpalette([0, 0, 0, *RED])
        palette.putpixel((0, 0), 0 if mode == "P" else (0, 0))
        if mode == "P":
            palette.info["transparency"] = 0
        loaded = load_image(palette)
    else:
        loaded = load_image(image.convert(mode))
    assert loaded.mode == "RGB"
    assert loaded.getpixel((0, 0)) == WHITE
    if mode in ("RGBA", "RGBa"):
        assert loaded.getpixel((1, 0)) == pytest.approx((255, 127, 127), abs=2)
    if mode not in ("LA", "La"):
        assert loaded.getpixel((3, 1)) == RED


def test_load_image__one_transparent_colour_is_put_on_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4), GREEN)
    image.putpixel((2, 2), BLUE)
    path = tmp_path / "key.png"
    image.save(path, transparency=GREEN)
    loaded = load_image(path)
    assert (loaded.getpixel((0, 0)), loaded.getpixel((2, 2))) == (WHITE, BLUE)


def test_load_image__palette_keeps_its_colours(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putpixel((3, 3), 2)
    for suffix in ("png", "gif"):
        path = tmp_path / f"palette.{suffix}"
        image.save(path)
        loaded = load_image(path)
        assert (loaded.getpixel((0, 0)), loaded.getpixel((3, 3))) == (GREEN, BLUE)


@pytest.mark.parametrize("mode", ["1", "L", "I", "F", "I;16"])
def test_load_image__grey_of_any_depth_is_grey(tmp_path: Path, mode: str) -> None:
    ramp = np.linspace(0, 255, 32).astype(np.uint8)[None].repeat(8, axis=0)
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
        path = tmp_path / "deep.png"
        image.save(path)
        loaded = load_image(path)
    elif mode == "I":
        loaded = load_image(Image.fromarray(ramp.astype(np.int32) * 257))
    else:
        loaded = load_image(Image.fromarray(ramp).convert(mode))
    result = as_array(loaded)
    assert np.array_equal(result[..., 0], result[..., 1])
    if mode == "1":
        assert set(np.unique(result)) == {0, 255}
    else:
        assert np.abs(result[..., 0] - ramp.astype(int)).max() <= 1


def _png_16_bit_rgb(array: np.ndarray[Any, Any]) -> bytes:
    """A 16-bit RGB PNG, which Pillow cannot write."""
    height, width, _ = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_load_image__16_bit_colour() -> None:
    image = photo()
    deep = np.asarray(image).astype(np.uint16) * 257
    for source in (_png_16_bit_rgb(deep), deep, deep.transpose(2, 0, 1)):
        assert np.abs(as_array(load_image(source)) - as_array(image)).max() <= 1


def test_load_image__cmyk(tmp_path: Path) -> None:
    path = tmp_path / "print.jpg"
    Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK").save(path, quality=95)
    assert np.abs(as_array(load_image(path)) - np.array([200, 30, 60])).max() <= 12


def test_load_image__animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    path = tmp_path / "moving.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert load_image(path).getpixel((4, 4)) == RED


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (1, 5, 7), (5, 7, 3), (3, 5, 7), (5, 7, 4), (4, 5, 7)])
def test_load_image__array_shapes(shape: tuple[int, ...]) -> None:
    for dtype, value in ((np.uint8, 77), (np.float32, 77 / 255), (np.bool_, True)):
        array = np.full(shape, value, dtype=dtype)
        if 4 in shape:  # opaque
            array[(..., 3) if shape[-1] == 4 else 3] = 255 if dtype == np.uint8 else 1
        loaded = load_image(array)
        assert loaded.size == (7, 5)
        assert loaded.getpixel((3, 3)) == ((255,) * 3 if dtype == np.bool_ else (77,) * 3)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3, 4, 5), np.uint8),
        np.zeros((5,), np.uint8),
        np.zeros((5, 7, 9), np.uint8),
        np.zeros((0, 7, 3), np.uint8),
        np.full((5, 7, 3), 1.5),
        np.full((5, 7, 3), -0.1),
        np.full((5, 7, 3), np.nan),
        np.full((5, 7, 3), 256, np.int64),
        np.full((5, 7, 3), -1, np.int16),
        np.full((5, 7), 1j),
        np.array([["a", "b"]]),
    ],
    ids=["4-D", "1-D", "9 channels", "empty", "above 1", "below 0", "nan", "256", "-1", "complex", "text"],
)
def test_load_image__other_arrays_are_refused_in_one_line(array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(QLIPError) as error:
        load_image(array)
    assert "\n" not in str(error.value)


def test_load_image__other_files_are_refused_by_name(tmp_path: Path, processor: QLIPProcessor) -> None:
    buffer = BytesIO()
    photo(200, 200).save(buffer, "JPEG")
    cases = {
        "absent.jpg": None,
        "empty.png": b"",
        "text.jpg": b"this is not an image\n",
        "cut.jpg": buffer.getvalue()[:900],
        "cut.png": _png_16_bit_rgb(np.zeros((64, 64, 3), np.uint16))[:60],
    }
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(QLIPError) as error:
            processor(images=tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(QLIPError) as error:
        processor(images=tmp_path)
    assert str(tmp_path) in str(error.value)


def test_load_image__does_not_modify_its_argument() -> None:
    image = photo()
    loaded = load_image(image)
    loaded.putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) != (1, 2, 3)


# --- colours and depths ------------------------------------------------------------------------------------------


def icc_profile(swap: bool) -> bytes:
    """An sRGB profile; ``swap`` exchanges red and blue by exchanging their tags in the profile's table."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    if swap:
        red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
        profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_load_image__colour_profile_is_converted_to_srgb(tmp_path: Path, mode: str) -> None:
    colours = Image.new("RGB", (8, 8), (200, 80, 20))
    image = colours.convert(mode) if mode != "P" else colours.quantize(4)
    path = tmp_path / "swapped.png"
    image.save(path, icc_profile=icc_profile(swap=True))
    shown = as_array(load_image(path))[4, 4]
    assert np.abs(shown - (20, 80, 200)).max() <= 8  # red is blue
    assert as_array(load_image(path, color_profiles="ignore"))[4, 4].tolist() == [200, 80, 20]


def test_load_image__alpha_survives_a_colour_profile(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (200, 80, 20, 255))
    image.putpixel((0, 0), (200, 80, 20, 0))
    image.save(tmp_path / "x.png", icc_profile=icc_profile(swap=True))
    assert load_image(tmp_path / "x.png").getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("profile", [icc_profile(swap=False), b"no profile", b""], ids=["sRGB", "broken", "empty"])
def test_load_image__srgb_and_broken_profiles_change_nothing(tmp_path: Path, profile: bytes) -> None:
    for image in (photo(), photo().convert("L"), photo().convert("CMYK")):
        path = tmp_path / "x.tif"
        image.save(path, icc_profile=profile)
        assert np.array_equal(as_array(load_image(path)), as_array(image.convert("RGB")))


def test_load_image__16_bit_grey_with_a_transparent_level() -> None:
    levels = np.full((8, 8), 20_000, np.uint16)
    levels[0, 0] = 40_000
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 0, 0, 0, 0)),
        (b"tRNS", struct.pack(">H", 40_000)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels))),
        (b"IEND", b""),
    ]
    image = load_image(_png(chunks))
    assert image.getpixel((0, 0)) == WHITE and image.getpixel((5, 5)) == (78, 78, 78)


def test_load_image__16_bit_colour_with_a_transparent_one() -> None:
    levels = np.full((8, 8, 3), 20_000, np.uint16)
    levels[0, 0] = (60_000, 100, 100)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)),
        (b"tRNS", struct.pack(">HHH", 60_000, 100, 100)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels))),
        (b"IEND", b""),
    ]
    image = load_image(_png(chunks))
    assert image.getpixel((0, 0)) == WHITE and image.getpixel((5, 5)) == (78, 78, 78)


@pytest.mark.parametrize(
    ("depth", "row", "shown"), [(2, b"\x1b", (0, 255, 170, 255)), (4, b"\x01\x5a", (0, 255, 85, 170))]
)
def test_load_image__small_grey_with_a_transparent_level(depth: int, row: bytes, shown: tuple[int, ...]) -> None:
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 4, 1, depth, 0, 0, 0, 0)),
        (b"tRNS", struct.pack(">H", 1)),
        (b"IDAT", zlib.compress(b"\0" + row)),
        (b"IEND", b""),
    ]
    assert as_array(load_image(_png(chunks)))[0, :, 0].tolist() == list(shown)


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("top", "odd"), [(1.0, 1.001), (1.0, -0.2), (1.0, 1.7), (255.0, 256.0), (65535.0, 65535.0)], ids=str
)
def test_load_image__float_tiff_is_scaled_by_its_range(tmp_path: Path, top: float, odd: float) -> None:
    """A filter's overshoot does not turn the image black."""
    values = np.full((8, 8), 0.5 * top, np.float32)
    values[0, 0], values[1, 1] = odd, top
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert load_image(tmp_path / "x.tif").getpixel((5, 5)) == (128, 128, 128)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 1e9])
def test_load_image__float_tiff_that_cannot_be_scaled_is_refused(tmp_path: Path, odd: float) -> None:
    values = np.full((8, 8), 0.5, np.float32)
    values[0, 0] = odd
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(QLIPError, match=r"x\.tif: .*(NaN or infinite|scale them)"):
        load_image(tmp_path / "x.tif")


@pytest.mark.parametrize("after", [False, True], ids=["before the pixels", "after the pixels"])
def test_load_image__png_with_long_texts(tmp_path: Path, after: bool) -> None:
    """Workflows and histories of editors; Pillow refuses compressed texts above 1 MB."""
    plain = BytesIO()
    photo().save(plain, "PNG")
    data = plain.getvalue()
    text = b"workflow\0\0" + zlib.compress(b"x" * 2_000_000)
    chunk = _png([(b"zTXt", text)])[8:]
    place = len(data) - 12 if after else 33  # before IEND, or after IHDR
    long = data[:place] + chunk + data[place:]
    (tmp_path / "x.png").write_bytes(long)
    for source in (long, bytearray(long), tmp_path / "x.png"):
        assert np.array_equal(as_array(load_image(source)), as_array(photo()))


def test_load_image__dicts_of_datasets(tmp_path: Path) -> None:
    photo().save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    for source in ({"bytes": data, "path": None}, {"bytes": None, "path": str(tmp_path / "x.png")}):
        assert np.array_equal(as_array(load_image(source)), as_array(photo()))


@pytest.mark.parametrize("source", [None, 5, {}, {"bytes": None, "path": None}, object(), iter([])])
def test_load_image__other_objects_are_one_line(source: Any) -> None:
    with pytest.raises(QLIPError) as error:
        load_image(source, "x")
    assert_one_line(error, "x: ")


def test_load_image__pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    for path in (tmp_path / "x.png", "/dev/zero"):
        with pytest.raises(QLIPError, match=f"{path}: not a regular file"):
            load_image(path)
