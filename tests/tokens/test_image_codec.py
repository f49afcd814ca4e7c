"""ImageCodec: the way from an image to tokens and back, against the model's own steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qlip import ImageCodec, QLIPError, TokenFile, assets
from qlip.modeling.images import load_image
from qlip.tokens.image_codec import Fit, join_tiles, split_tiles

CAT, DOG = (str(assets.path("images", f"{name}.jpg")) for name in ("cat", "dog"))


@pytest.fixture(scope="module")
def codec() -> ImageCodec:
    return ImageCodec.from_pretrained("bundled", device="cpu")


def test_image_codec__does_the_models_own_steps(codec: ImageCodec) -> None:
    files = codec.encode([CAT, DOG])
    pixels = codec.processor(images=[CAT, DOG])["pixel_values"]
    indices = codec.model.encode(pixels)
    assert all(torch.equal(file.indices(7), one) for file, one in zip(files, indices, strict=True))
    assert files[0].original_size == load_image(CAT).size and files[0].grid == (8, 8)
    expected = codec.processor.to_images(codec.model.decode(indices))
    assert codec.decode(files) == expected


def test_image_codec__takes_every_kind_of_image(codec: ImageCodec) -> None:
    image = load_image(CAT)
    kinds = [CAT, Path(CAT), Path(CAT).read_bytes(), image, np.asarray(image)]
    first, *others = codec.encode(kinds)
    assert all(other.bits == first.bits for other in others)


def test_image_codec__results_keep_the_order_of_unequal_images(codec: ImageCodec) -> None:
    wide, tall = Image.new("RGB", (200, 100), "red"), Image.new("RGB", (100, 200), "blue")
    mixed = codec.encode([wide, tall, wide, tall, wide], fit="keep-aspect", batch_size=2)
    assert [file.grid for file in mixed] == [(8, 16), (16, 8), (8, 16), (16, 8), (8, 16)]
    assert [image.size for image in codec.decode(mixed, batch_size=2)] == [(128, 64), (64, 128)] * 2 + [(128, 64)]


def test_image_codec__tiles_are_encoded_one_by_one(codec: ImageCodec) -> None:
    [file] = codec.encode([CAT], fit="tiles", size=(128, 192))
    assert (file.tiles, file.grid, file.tile_grid) == ((2, 3), (16, 24), (8, 8))
    whole = codec.prepare(CAT, Fit("tiles", (128, 192))).image
    boxes = [(x, y, x + 64, y + 64) for y in (0, 64) for x in (0, 64, 128)]
    alone = codec.encode([whole.crop(box) for box in boxes], batch_size=6)
    tiles = split_tiles(file.indices(7), file.tiles, file.tile_grid)
    assert all(torch.equal(tile, one.indices(7)) for tile, one in zip(tiles, alone, strict=True))
    [rebuilt] = codec.decode([file])
    for box, part in zip(boxes, codec.decode(alone, batch_size=6), strict=True):
        assert rebuilt.crop(box) == part


def test_image_codec__files_of_tiles_survive_entropy_coding(codec: ImageCodec, tmp_path: Path) -> None:
    [file] = codec.encode([CAT], fit="tiles", size=(128, 128))
    file.save(tmp_path / "cat.qlip", codec.coder())
    assert (tmp_path / "cat.qlip").stat().st_size < file.num_bytes
    assert TokenFile.load(tmp_path / "cat.qlip", codec.coders()) == file


def test_tiles__joining_and_splitting_are_inverse() -> None:
    tiles = torch.arange(2 * 3 * 20 * 4).view(6, 20, 4)
    whole = join_tiles(tiles, (2, 3), (4, 5))
    assert torch.equal(split_tiles(whole, (2, 3), (4, 5)), tiles)
    assert torch.equal(whole.view(8, 15, 4)[4:, 5:10].reshape(20, 4), tiles[4])  # second row, second column


def test_preparation__is_told_apart(codec: ImageCodec) -> None:
    how = [("square", None), ("keep-aspect", None), ("tiles", None), ("square", (64, 64)), ("square", (128, 64))]
    found = [codec.processor.preprocessing.fingerprint(fit, size) for fit, size in how]
    assert len(set(found)) == len(found) and all(re.fullmatch("[0-9a-f]{16}", one) for one in found)
    assert codec.encode([CAT])[0].preparation == found[0]
    # stored in files: another value for the same preparation would tell equal tokens apart
    assert found[0] == "bc99be54fc4dadd3"  # "7ba5589a27763374" by the rules of 0.1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda codec: codec.encode(["absent.jpg"]), "absent.jpg"),
        (lambda codec: codec.encode("photo.jpg"), "a list of images"),
        (lambda codec: codec.encode([CAT], size=(60, 64)), "size 60 64: must be multiples of the patch, 8; try 64 64"),
        (lambda codec: ImageCodec.from_pretrained(device="tpu"), "device tpu: this machine has cpu"),
        (lambda codec: ImageCodec.from_pretrained(dtype="float23"), "did you mean 'float32'"),
        (lambda codec: ImageCodec.from_pretrained("bundeld"), "did you mean 'bundled'"),
    ],
)
def test_image_codec__errors_name_the_input(codec: ImageCodec, call, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(QLIPError, match=re.escape(said)):
        call(codec)


def test_image_codec__another_models_tokens_are_refused(codec: ImageCodec) -> None:
    [file] = codec.encode([CAT])
    other = TokenFile.from_indices(
        file.indices(7),
        7,
        grid=file.grid,
        original_size=file.original_size,
        code_fingerprint=file.code_fingerprint,
        decoder_fingerprint="0" * 64,
        source="other.qlip",
    )
    with pytest.raises(QLIPError, match=r"other.qlip: made by another model .*not decoded by it"):
        codec.decode([other])


def test_image_codec__wrong_arguments_are_one_line(codec: ImageCodec) -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    [tokens] = codec.encode([image])
    calls: list[Callable[[Any], Any]] = [
        *(lambda c, one=one: c.encode(one) for one in (None, CAT, image, {"bytes": b""}, bytearray(b"x"), 5)),
        lambda c: c.encode([image], fit="keep_aspect"),
        *(lambda c, size=size: c.encode([image], size=size) for size in (64, (64,), (0, 64))),
        lambda c: c.encode([image], fit="tiles", size=(-64, 64)),
        lambda c: c.encode([image], batch_size=0),
        *(lambda c, one=one: c.decode(one) for one in (None, tokens, [tokens.to_bytes()], ["x.qlip"], [image], 5)),
        *(lambda c, one=one: c.embed_texts(one) for one in ("a cat", None, [None], [1.0], 5)),
    ]
    for call in calls:
        with pytest.raises(QLIPError) as error:
            call(codec)
        assert "\n" not in str(error.value)
    assert len(codec.encode(np.stack([image, image]))) == 2  # type: ignore[arg-type]


def test_image_codec__largest_number_of_tokens_is_that_of_encoding(codec: ImageCodec) -> None:
    def tokens(grid: tuple[int, int], tiles: tuple[int, int] = (1, 1)) -> TokenFile:
        count = grid[0] * grid[1]
        prints = (codec.model.code_fingerprint, codec.model.decoder_fingerprint)
        return TokenFile(bytes(count * 28 // 8), grid, (64, 64), 28, *prints, "0" * 16, tiles)

    codec.check_size(tokens((8, 2048)))  # what --fit keep-aspect makes at most
    codec.check_size(tokens((512, 512), tiles=(64, 64)))  # 4,096 tiles, as many as a dataset's image has at most
    codec.check_size(tokens((200, 100)), max_tokens=None)
    for large in (tokens((200, 100)), tokens((200, 100), tiles=(2, 1))):
        with pytest.raises(QLIPError, match="these tokens: 20,000 tokens, and 16,384 are allowed; allow more"):
            codec.decode([large])
