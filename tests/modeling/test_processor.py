"""Images and words in, tensors out, and back: what a person expects whatever the file."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qlip import QLIPError, QLIPProcessor
from qlip.modeling.images import load_image
from qlip.modeling.tokenizer import CLIPTokenizer
from tests.modeling.helpers import FIXTURES

FIXTURE = FIXTURES / "a28_swiglu_subln_rope_28bit"
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def _photo(width: int = 48, height: int = 40) -> Image.Image:
    """A smooth image with a different colour in each corner."""
    y, x = np.mgrid[0:height, 0:width]
    array = np.stack([255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), 128 + 0 * x], axis=-1)
    return Image.fromarray(array.astype(np.uint8))


def _array(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


@pytest.fixture
def processor() -> QLIPProcessor:
    return QLIPProcessor.from_pretrained(FIXTURE)


# --- what a person calls an image -------------------------------------------------------------------------------


def test_every_way_to_hand_over_a_picture_gives_the_same_pixels(processor: QLIPProcessor, tmp_path: Path) -> None:
    image = _photo()
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
    for name, picture in ways.items():
        assert torch.equal(processor(images=picture)["pixel_values"], expected), name
        assert torch.equal(processor(images=[picture])["pixel_values"], expected), name
    together = processor(images=list(ways.values()))["pixel_values"]
    assert torch.equal(together, expected.expand(len(ways), -1, -1, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = _photo(24, 16)
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
    assert np.array_equal(_array(load_image(path)), _array(upright))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "La", "RGBa"])
def test_transparency_is_laid_on_white(mode: str) -> None:
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


def test_a_png_with_one_transparent_colour_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4), GREEN)
    image.putpixel((2, 2), BLUE)
    path = tmp_path / "key.png"
    image.save(path, transparency=GREEN)
    loaded = load_image(path)
    assert (loaded.getpixel((0, 0)), loaded.getpixel((2, 2))) == (WHITE, BLUE)


def test_a_palette_picture_keeps_its_colours(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putpixel((3, 3), 2)
    for suffix in ("png", "gif"):
        path = tmp_path / f"palette.{suffix}"
        image.save(path)
        loaded = load_image(path)
        assert (loaded.getpixel((0, 0)), loaded.getpixel((3, 3))) == (GREEN, BLUE)


@pytest.mark.parametrize("mode", ["1", "L", "I", "F", "I;16"])
def test_grey_pictures_of_any_depth_are_grey(tmp_path: Path, mode: str) -> None:
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
    result = _array(loaded)
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


def test_16_bit_colour() -> None:
    photo = _photo()
    deep = np.asarray(photo).astype(np.uint16) * 257
    for source in (_png_16_bit_rgb(deep), deep, deep.transpose(2, 0, 1)):
        assert np.abs(_array(load_image(source)) - _array(photo)).max() <= 1


def test_cmyk(tmp_path: Path) -> None:
    path = tmp_path / "print.jpg"
    Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK").save(path, quality=95)
    assert np.abs(_array(load_image(path)) - np.array([200, 30, 60])).max() <= 12


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    path = tmp_path / "moving.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert load_image(path).getpixel((4, 4)) == RED


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (1, 5, 7), (5, 7, 3), (3, 5, 7), (5, 7, 4), (4, 5, 7)])
def test_array_shapes(shape: tuple[int, ...]) -> None:
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
def test_arrays_that_are_no_picture_are_refused_in_one_line(array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(QLIPError) as error:
        load_image(array)
    assert "\n" not in str(error.value)


def test_files_that_are_no_picture_are_refused_by_name(tmp_path: Path, processor: QLIPProcessor) -> None:
    buffer = BytesIO()
    _photo(200, 200).save(buffer, "JPEG")
    cases = {
        "absent.jpg": None,
        "empty.png": b"",
        "text.jpg": b"this is not a picture\n",
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


def test_loading_leaves_the_callers_image_alone() -> None:
    image = _photo()
    loaded = load_image(image)
    loaded.putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) != (1, 2, 3)


# --- resize, crop, normalise ---------------------------------------------------------------------------------


def test_without_a_preprocessor_file(processor: QLIPProcessor) -> None:
    """Mean and std 0.5, bicubic, shorter side to the model's size, centre crop."""
    image = _photo(64, 40)
    pixels = processor(images=image)["pixel_values"]
    resized = image.resize((51, 32), Image.Resampling.BICUBIC).crop((9, 0, 41, 32))
    expected = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(pixels[0], expected, rtol=0, atol=1e-6)
    assert processor.size == (32, 32)
    for colour, value in ((WHITE, 1.0), ((0, 0, 0), -1.0)):
        flat = processor(images=Image.new("RGB", (50, 50), colour))["pixel_values"]
        torch.testing.assert_close(flat, torch.full_like(flat, value))


def test_the_preprocessor_file_decides(tmp_path: Path) -> None:
    shutil.copyfile(FIXTURE / "config.json", tmp_path / "config.json")
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    settings = {
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 32, "width": 32},
        "resample": 2,
        "do_center_crop": True,
        "image_mean": mean,
        "image_std": std,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    image = _photo(80, 80)
    pixels = QLIPProcessor.from_pretrained(tmp_path)(images=image)["pixel_values"][0]
    cropped = image.resize((40, 40), Image.Resampling.BILINEAR).crop((4, 4, 36, 36))
    expected = torch.from_numpy(np.asarray(cropped).copy()).permute(2, 0, 1).float() / 255
    expected = (expected - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(pixels, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 32, "crop_size": 32},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    ],
)
def test_clips_three_ways_to_write_a_size(tmp_path: Path, settings: dict[str, Any]) -> None:
    shutil.copyfile(FIXTURE / "config.json", tmp_path / "config.json")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = QLIPProcessor.from_pretrained(tmp_path)
    assert processor(images=_photo(50, 50))["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    "settings",
    [
        "[]",
        "{",
        '{"resample": 17}',
        '{"image_mean": [0.5]}',
        '{"image_std": [0, 1, 1]}',
        '{"rescale_factor": 2}',
        '{"do_normalize": false}',
        '{"size": {"longest_edge": 3}}',
        '{"size": {"shortest_edge": 30}, "crop_size": 32}',
        '{"size": "large"}',
    ],
)
def test_a_preprocessor_file_that_cannot_be_followed_is_refused_by_name(tmp_path: Path, settings: str) -> None:
    shutil.copyfile(FIXTURE / "config.json", tmp_path / "config.json")
    (tmp_path / "preprocessor_config.json").write_text(settings)
    with pytest.raises(QLIPError) as error:
        QLIPProcessor.from_pretrained(tmp_path)
    assert "preprocessor_config.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(100, 50), (50, 100), (33, 32), (10, 60), (64, 64), (1, 5), (3000, 20)])
def test_keeping_the_shape(processor: QLIPProcessor, size: tuple[int, int]) -> None:
    """The shorter side is the model's; the longer one in proportion, cut down to a multiple of the patch."""
    pixels = processor(images=_photo(*size), keep_aspect=True)["pixel_values"]
    height, width = pixels.shape[2:]
    assert (height % 4, width % 4) == (0, 0)
    assert min(height, width) == 32
    longer = max(size) / min(size) * 32
    assert longer - 4.5 <= max(height, width) <= longer + 0.5
    assert (width >= height) == (size[0] >= size[1]) or height == width


def test_keeping_the_shape_of_pictures_that_differ_is_refused(processor: QLIPProcessor) -> None:
    with pytest.raises(QLIPError, match=r"differ in size.*one by one"):
        processor(images=[_photo(100, 50), _photo(50, 100)], keep_aspect=True)


def test_back_to_pictures(processor: QLIPProcessor) -> None:
    image = _photo(32, 32)
    pixels = processor(images=image)["pixel_values"]
    for tensor in (pixels, pixels.double(), pixels.requires_grad_()):
        (again,) = processor.to_images(tensor)
        assert again.mode == "RGB"
        assert np.array_equal(_array(again), _array(image))
    assert np.abs(_array(processor.to_images(pixels.bfloat16())[0]) - _array(image)).max() <= 1
    beyond = processor.to_images(torch.tensor([-9.0, 9.0])[:, None, None, None].expand(2, 3, 4, 6))
    assert [picture.size for picture in beyond] == [(6, 4), (6, 4)]
    assert [picture.getpixel((0, 0)) for picture in beyond] == [(0, 0, 0), WHITE]


# --- words ---------------------------------------------------------------------------------------------------

CAPTIONS = [
    "a photo of a cat",
    "A  photo of\n two CATS, and a dog's tail!",
    "a blurry photo of 1234 birds",
    "naïve café — über 日本語 🙂",
    "",
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a small vocabulary of its own."""
    folder = tmp_path_factory.mktemp("vocabulary")
    config = json.loads((FIXTURE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    CLIPTokenizer.train(CAPTIONS * 3, 560, length=12).save(folder)
    return folder


def test_clip_padding_and_truncation(vocabulary: Path) -> None:
    processor = QLIPProcessor.from_pretrained(vocabulary)
    tokenizer = processor.tokenizer
    assert tokenizer is not None
    words = processor(text=["a photo of a cat", "a photo of a cat " * 20, ""])
    ids, mask = words["input_ids"], words["attention_mask"]
    assert ids.shape == mask.shape == (3, 12)
    assert ids.dtype == mask.dtype == torch.int64
    begin, end = tokenizer.bos, tokenizer.eos
    assert ids[:, 0].tolist() == [begin] * 3
    for row, count in zip(ids.tolist(), mask.sum(1).tolist(), strict=True):
        assert row.index(end) == count - 1  # the first end token closes the text
        assert row[count:] == [end] * (12 - count)  # CLIP pads with it
    assert mask[1].tolist() == [1] * 12
    assert ids[1, -1].item() == end
    assert ids[2].tolist() == [begin] + [end] * 11
    assert mask[2].tolist() == [1, 1] + [0] * 10


def test_one_string_is_a_batch_of_one(vocabulary: Path) -> None:
    processor = QLIPProcessor.from_pretrained(vocabulary)
    assert torch.equal(processor(text="a cat")["input_ids"], processor(text=["a cat"])["input_ids"])
    both = processor(images=_photo(), text="a cat")
    assert set(both) == {"pixel_values", "input_ids", "attention_mask"}


def test_both_forms_of_the_vocabulary_agree(vocabulary: Path, tmp_path: Path) -> None:
    results = []
    for names in (("vocab.json", "merges.txt"), ("tokenizer.json",)):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in ("config.json", *names):
            shutil.copyfile(vocabulary / name, folder / name)
        results.append(QLIPProcessor.from_pretrained(folder)(text=CAPTIONS))
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(results[0][key], results[1][key])


def test_case_space_and_unseen_letters(vocabulary: Path) -> None:
    tokenizer = CLIPTokenizer.from_folder(vocabulary, 64)
    assert tokenizer is not None
    same = tokenizer(["a photo of a cat", "  A   PHOTO of\ta\ncat "])[0]
    assert torch.equal(same[0], same[1])
    ids, mask = tokenizer(["ЖШ 漢字 🚀 zzzqx"])
    assert tokenizer.decode(ids[0][mask[0].bool()].tolist()) == "жш 漢字 🚀 zzzqx"
    assert ids.max() < tokenizer.vocab_size


def test_a_tiny_clip_vocabulary_by_hand(tmp_path: Path) -> None:
    """Merges in order of rank, the end-of-word mark, numbers digit by digit, and CLIP's own special tokens."""
    vocab = ["a", "c", "t", "1", "2", "a</w>", "c</w>", "t</w>", "1</w>", "2</w>", "ca", "cat</w>"]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocab)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    tokenizer = CLIPTokenizer.from_folder(tmp_path, 10)
    assert tokenizer is not None
    ids = tokenizer(["cat CA a 12"])[0][0].tolist()
    assert ids == [12, 11, 1, 5, 5, 8, 9, 13, 13, 13]


def test_a_checkpoint_without_a_vocabulary_says_so(processor: QLIPProcessor) -> None:
    with pytest.raises(QLIPError, match=r"no vocabulary"):
        processor(text="a cat")
    with pytest.raises(QLIPError, match=r"nothing to process"):
        processor()


@pytest.mark.parametrize(
    ("name", "content"),
    [("vocab.json", "{"), ("vocab.json", "[1]"), ("vocab.json", '{"a": 0}'), ("merges.txt", "a b c\n")],
)
def test_a_broken_vocabulary_is_refused_in_one_line(vocabulary: Path, tmp_path: Path, name: str, content: str) -> None:
    for file in ("config.json", "vocab.json", "merges.txt"):
        shutil.copyfile(vocabulary / file, tmp_path / file)
    (tmp_path / name).write_text(content)
    with pytest.raises(QLIPError) as error:
        QLIPProcessor.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_broken_tokenizer_file_is_refused_in_one_line(tmp_path: Path) -> None:
    shutil.copyfile(FIXTURE / "config.json", tmp_path / "config.json")
    for content in ("{", "{}", '{"model": {"type": "BPE"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(QLIPError) as error:
            QLIPProcessor.from_pretrained(tmp_path)
        assert "tokenizer.json" in str(error.value)
        assert "\n" not in str(error.value)


def test_a_processor_saved_and_read_again_is_the_same(vocabulary: Path, tmp_path: Path) -> None:
    processor = QLIPProcessor.from_pretrained(vocabulary)
    shutil.copyfile(vocabulary / "config.json", tmp_path / "config.json")
    processor.save_pretrained(tmp_path)
    again = QLIPProcessor.from_pretrained(tmp_path)
    assert again.preprocessing == processor.preprocessing
    for key, value in processor(images=_photo(70, 50), text=CAPTIONS).items():
        assert torch.equal(again(images=_photo(70, 50), text=CAPTIONS)[key], value)
