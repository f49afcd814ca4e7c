"""The way through: an image to the bytes of a `.qlip` file, and such bytes to an image.

Shapes: B images of H x W pixels, N tokens each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qlip.cli.console import note, usage_error
from qlip.cli.models import Tokenizer
from qlip.errors import QLIPError
from qlip.evaluation.metrics import pixel as metrics
from qlip.modeling import load_image
from qlip.tokens import TokenCodec, TokenCodecs, TokenFile, check_model


@dataclass(frozen=True)
class Fit:
    """How images are made to fit the model.

    Attributes:
        size: (height, width) to work at; None is the model's own.
        keep_aspect: the whole image, inside ``size``, instead of its middle filling ``size``.
    """

    size: tuple[int, int] | None = None
    keep_aspect: bool = False

    def check(self, tokenizer: Tokenizer) -> None:
        """Refuse sizes that are no multiples of the patch.

        Raises:
            UsageError: with the nearest size that would do.
        """
        preprocessing = tokenizer.processor.preprocessing
        if self.size is not None and (near := preprocessing.in_patches(self.size)) != self.size:
            usage_error(
                f"--size {self.size[0]} {self.size[1]}: must be multiples of the patch, {preprocessing.patch_size};"
                f" try --size {near[0]} {near[1]}"
            )

    def apply(self, tokenizer: Tokenizer, image: Image.Image) -> Image.Image:
        """The RGB image that the model will see, in 8 bits."""
        return tokenizer.processor.preprocessing.resized(image, self.keep_aspect, self.size)


@dataclass(frozen=True)
class Prepared:
    """An image ready for the model.

    Attributes:
        image: the image that the model sees, RGB.
        pixels: (3, H, W) float32, normalised.
        original_size: (width, height) before it was prepared.
    """

    image: Image.Image
    pixels: Tensor
    original_size: tuple[int, int]


def prepare(tokenizer: Tokenizer, path: Path, fit: Fit) -> Prepared:
    """Read an image and make it fit.

    Raises:
        QLIPError: it cannot be read.
    """
    original = load_image(path)
    image = fit.apply(tokenizer, original)
    return Prepared(image, tokenizer.processor.preprocessing.pixels(image), original.size)


@torch.inference_mode()
def tokenize(tokenizer: Tokenizer, pictures: Sequence[Prepared]) -> list[TokenFile]:
    """The tokens of images of one size."""
    model = tokenizer.model
    pixels = torch.stack([picture.pixels for picture in pictures]).to(model.device, model.dtype)
    return [
        TokenFile.from_indices(
            indices.cpu(),
            model.group_size,
            grid=model.grid_of(pixels),
            original_size=picture.original_size,
            code_fingerprint=model.code_fingerprint,
            decoder_fingerprint=model.decoder_fingerprint,
        )
        for indices, picture in zip(model.encode(pixels), pictures, strict=True)
    ]


@torch.inference_mode()
def rebuild(tokenizer: Tokenizer, files: Sequence[TokenFile]) -> list[Image.Image]:
    """The images of tokens of one grid, which this model made.

    Raises:
        QLIPError: another model made them.
    """
    model = tokenizer.model
    for file in files:
        check_decoder(tokenizer, file)
    indices = torch.stack([file.indices(model.group_size) for file in files])
    return tokenizer.processor.to_images(model.decode(indices.to(model.device), grid=files[0].grid))


def coders(tokenizer: Tokenizer, tables: Path | None = None) -> TokenCodecs:
    """The entropy coders of a model, or of a file of tables."""
    return TokenCodecs.of_model(tokenizer.name) if tables is None else TokenCodecs.of_file(tables)


def coder(tokenizer: Tokenizer, tables: Path | None = None) -> TokenCodec | None:
    """The one to code with; None, and a word, where the model has no tables.

    Raises:
        QLIPError: tables that cannot be read, or of another number of bits a token.
    """
    found = coder_or_none(tokenizer, tables)
    if found is None:
        note(f"note: {tokenizer.name} has no entropy tables, the bits stay raw; `qlip tokens codec train` makes them")
    return found


def coder_or_none(tokenizer: Tokenizer, tables: Path | None = None) -> TokenCodec | None:
    """The same without the word."""
    found = coders(tokenizer, tables).current
    if found is not None and found.num_bits != tokenizer.model.num_bits:
        raise QLIPError(
            f"{found.tables.source}: for tokens of {found.num_bits} bits, and {tokenizer.name} has"
            f" {tokenizer.model.num_bits}; give the tables that `qlip tokens codec train` made of this model"
        )
    return found


def check_decoder(tokenizer: Tokenizer, file: TokenFile) -> None:
    """Refuse a file that this model cannot rebuild.

    Raises:
        QLIPError: another model made it; both are named.
    """
    model = tokenizer.model
    check_model(file, tokenizer.name, model.code_fingerprint, model.decoder_fingerprint, need="decoder")


def there_and_back(tokenizer: Tokenizer, pictures: Sequence[Prepared]) -> list[tuple[TokenFile, Image.Image]]:
    """The tokens of images of one size, and what is rebuilt from nothing but the bytes of their files."""
    contents = [file.to_bytes() for file in tokenize(tokenizer, pictures)]
    files = [TokenFile.from_bytes(content) for content in contents]
    return list(zip(files, rebuild(tokenizer, files), strict=True))


def there_and_back_in_tiles(
    tokenizer: Tokenizer, picture: Prepared, batch_size: int
) -> tuple[list[TokenFile], Image.Image]:
    """The tokens of an image's tiles in raster order, and the whole rebuilt from the bytes of their files."""
    tiles = cut(picture, tokenizer.model.image_size)
    pairs = []
    for start in range(0, len(tiles), batch_size):
        pairs += there_and_back(tokenizer, tiles[start : start + batch_size])
    return [tokens for tokens, _ in pairs], join([image for _, image in pairs], picture.image.size)


def cut(picture: Prepared, side: int) -> list[Prepared]:
    """An image whose sides are multiples of ``side``, as square tiles in raster order."""
    corners = [(y, x) for y in range(0, picture.image.height, side) for x in range(0, picture.image.width, side)]
    return [
        Prepared(
            picture.image.crop((x, y, x + side, y + side)),
            picture.pixels[:, y : y + side, x : x + side],
            (side, side),
        )
        for y, x in corners
    ]


def join(tiles: Sequence[Image.Image], size: tuple[int, int]) -> Image.Image:
    """Tiles in raster order as one image of ``size`` (width, height)."""
    whole, side = Image.new("RGB", size), tiles[0].width
    columns = size[0] // side
    for i, tile in enumerate(tiles):
        whole.paste(tile, (i % columns * side, i // columns * side))
    return whole


def prepare_for_tiles(tokenizer: Tokenizer, path: Path, size: tuple[int, int] | None) -> Prepared:
    """Read an image and make it a whole number of model-size tiles each way, near its own size or ``size``.

    Raises:
        QLIPError: it cannot be read.
    """
    original, side = load_image(path), tokenizer.model.image_size
    wanted = size or (original.height, original.width)
    image = Fit(size=(_whole(wanted[0], side), _whole(wanted[1], side))).apply(tokenizer, original)
    return Prepared(image, tokenizer.processor.preprocessing.pixels(image), original.size)


def _whole(length: float, step: int) -> int:
    """The nearest multiple of ``step``, at least one."""
    return max(1, round(length / step)) * step


def psnr(original: Image.Image, rebuilt: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit RGB images; infinite for equal ones."""
    first, second = (
        torch.from_numpy(np.array(image)).movedim(-1, 0)[None].double() / 255 for image in (original, rebuilt)
    )
    return float(metrics.psnr(second, first))
