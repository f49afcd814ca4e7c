"""Image to tokens and back: the one implementation for commands, datasets, evaluation and other systems.

`ImageCodec` holds a model with its processor. `encode` and `decode` do everything; `prepare`, `encode_prepared` and
`decode_files` are their steps, for callers that read and write files while the model works. `Fit` says how an image is
fitted to the model.

Shapes: B images or tiles of H x W pixels, N tokens of K groups, R x C tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from PIL import Image
from torch import Tensor

from qlip.errors import QLIPError, check_integer
from qlip.modeling.images import ImageInput
from qlip.modeling.loading import LoadedModel
from qlip.modeling.processor import MAX_TOKENS, Preprocessing, Size
from qlip.tokens.entropy.coder import TokenCodec
from qlip.tokens.entropy.registry import TokenCodecs
from qlip.tokens.token_file import TokenFile, check_model

Item = TypeVar("Item")
Result = TypeVar("Result")
FitMode = Literal["square", "keep-aspect", "tiles"]


@dataclass(frozen=True)
class Fit:
    """How an image is fitted to a model.

    Attributes:
        mode: ``square`` is the model's own preprocessing, a resize and a centre crop; ``keep-aspect`` keeps the aspect
            ratio, with another grid; ``tiles`` cuts the image into tiles of the model's size, so that detail is kept.
        size: (height, width) to resize to, multiples of the patch; None is the model's size or, for tiles, the image's.
    """

    mode: FitMode = "square"
    size: Size | None = None

    def check(self, preprocessing: Preprocessing) -> None:
        """Refuse an unknown mode, and a size that is not a multiple of the patch.

        Raises:
            QLIPError: names the modes, or the nearest valid size.
        """
        if self.mode not in get_args(FitMode):
            raise QLIPError(f"fit {self.mode!r}: take {', '.join(get_args(FitMode))}")
        if self.size is not None and (
            not isinstance(self.size, Sequence)
            or len(self.size) != 2
            or not all(isinstance(side, int) and side > 0 for side in self.size)
        ):
            raise QLIPError(f"size {self.size!r}: give (height, width) in pixels, integers")
        if self.size is None or self.mode == "tiles":
            return
        near = preprocessing.in_patches(self.size)
        if near != self.size:
            raise QLIPError(
                f"size {self.size[0]} {self.size[1]}: must be multiples of the patch, {preprocessing.patch_size};"
                f" try {near[0]} {near[1]}"
            )


@dataclass(frozen=True)
class Prepared:
    """An image ready for the model.

    Attributes:
        image: RGB, as the model sees it.
        pixels: float32 (3, H, W), normalised.
        original_size: (width, height) before preparation.
        fit: how it was prepared.
        tiles: (rows, columns) that it will be cut into.
    """

    image: Image.Image
    pixels: Tensor
    original_size: tuple[int, int]
    fit: Fit = Fit()
    tiles: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class ImageCodec(LoadedModel):
    """A model that turns images into tokens and back.

    codec = ImageCodec.from_pretrained("bundled")
    [tokens] = codec.encode(["photo.jpg"])
    tokens.save("photo.qlip")
    [image] = codec.decode([TokenFile.load("photo.qlip")])
    """

    def encode(
        self, images: Sequence[ImageInput], *, fit: FitMode = "square", size: Size | None = None, batch_size: int = 32
    ) -> list[TokenFile]:
        """Encode images.

        Args:
            images: paths, Pillow images, arrays, tensors or the bytes of image files.
            fit, size: see `Fit`.
            batch_size: images, or tiles, per model call.

        Returns:
            The tokens of each image, in order.

        Raises:
            QLIPError: an image that cannot be read, or a size that does not fit the model.
        """
        several = isinstance(images, Iterable) and not isinstance(images, str | bytes | bytearray | Path | Mapping)
        if not several or isinstance(images, Image.Image) or getattr(images, "ndim", 4) != 4:
            raise QLIPError("encode takes a list of images; write [image] for one")
        how = Fit(fit, size)
        how.check(self.processor.preprocessing)
        prepared = [self.prepare(image, how) for image in images]
        return _by_shape(prepared, lambda one: (one.pixels.shape, one.tiles), self.encode_prepared, batch_size)

    def decode(
        self, files: Sequence[TokenFile], *, batch_size: int = 32, max_tokens: int | None = MAX_TOKENS
    ) -> list[Image.Image]:
        """Reconstruct images from their tokens, in the size that the model saw.

        Args:
            files: tokens that this model made.
            batch_size: images, or tiles, per model call.
            max_tokens: of one file, see `check_size`.

        Raises:
            QLIPError: another model made them, not a list of token files, or one of too many tokens.
        """
        wrong = [one for one in files if not isinstance(one, TokenFile)] if isinstance(files, Iterable) else [files]
        if wrong or not isinstance(files, Sequence):
            kind = type(wrong[0] if wrong else files).__name__
            raise QLIPError(f"decode takes a list of TokenFile, got {kind}; TokenFile.load and from_bytes make them")
        for file in files:
            self.check_size(file, max_tokens)
        return _by_shape(files, lambda one: (one.grid, one.tiles), self.decode_files, batch_size)

    # ---------------------------------------------------------------- steps

    def prepare(self, source: ImageInput, fit: Fit = Fit()) -> Prepared:
        """Read an image and fit it to the model.

        Raises:
            QLIPError: the image cannot be read.
        """
        preprocessing = self.processor.preprocessing
        original = preprocessing.load(source)
        tiles = (1, 1)
        if fit.mode == "tiles":
            tiles = tiles_of(original.size, self.model.image_size, fit.size)
            image = resized_to_tiles(preprocessing, original, tiles, self.model.image_size)
        else:
            image = preprocessing.resized(original, fit.mode == "keep-aspect", fit.size)
        return Prepared(image, preprocessing.pixels(image), original.size, fit, tiles)

    @torch.inference_mode()
    def encode_prepared(self, images: Sequence[Prepared], batch_size: int | None = None) -> list[TokenFile]:
        """Encode images of one size and one number of tiles.

        Args:
            images: B prepared images.
            batch_size: tiles per model call; None takes all at once.
        """
        model, tiles = self.model, images[0].tiles
        pixels = torch.cat([_cut(one.pixels, tiles) for one in images]).to(model.device, model.dtype)
        height, width = model.grid_of(pixels)
        indices = torch.cat([model.encode(part).cpu() for part in pixels.split(batch_size or len(pixels))])
        per_image = indices.unflatten(0, (len(images), tiles[0] * tiles[1]))  # (B, R * C, n, K)
        return [
            TokenFile.from_indices(
                join_tiles(one, tiles, (height, width)),
                model.group_size,
                grid=(tiles[0] * height, tiles[1] * width),
                original_size=image.original_size,
                code_fingerprint=model.code_fingerprint,
                decoder_fingerprint=model.decoder_fingerprint,
                preparation=self.processor.preprocessing.fingerprint(image.fit.mode, image.fit.size),
                tiles=tiles,
            )
            for one, image in zip(per_image, images, strict=True)
        ]

    @torch.inference_mode()
    def decode_files(self, files: Sequence[TokenFile], batch_size: int | None = None) -> list[Image.Image]:
        """Reconstruct images of one grid and one number of tiles.

        Args:
            files: B token files, made by this model.
            batch_size: tiles per model call; None takes all at once.

        Raises:
            QLIPError: another model made them.
        """
        for file in files:
            self.check_decoder(file)
        model, tiles, grid = self.model, files[0].tiles, files[0].tile_grid
        indices = torch.cat([split_tiles(file.indices(model.group_size), tiles, grid) for file in files])
        parts = indices.to(model.device).split(batch_size or len(indices))
        rebuilt = [image for part in parts for image in self.processor.to_images(model.decode(part, grid=grid))]
        count = tiles[0] * tiles[1]
        return [join_images(rebuilt[start : start + count], tiles) for start in range(0, len(rebuilt), count)]

    def round_trip(
        self, images: Sequence[Prepared], batch_size: int | None = None
    ) -> list[tuple[TokenFile, Image.Image]]:
        """Encode images of one size, and reconstruct them from the bytes of their files alone."""
        files = [TokenFile.from_bytes(file.to_bytes()) for file in self.encode_prepared(images, batch_size)]
        return list(zip(files, self.decode_files(files, batch_size), strict=True))

    @torch.inference_mode()
    def embed_prepared(self, images: Sequence[Prepared]) -> Tensor:
        """Embed images of one size as unit vectors, (B, E) float32 on the CPU."""
        return self.model.embed_images(torch.stack([image.pixels for image in images])).cpu()

    # ---------------------------------------------------------------- files

    def check_decoder(self, file: TokenFile) -> None:
        """Refuse tokens that this model cannot decode.

        Raises:
            QLIPError: another model made them; the error names both.
        """
        check_model(file, self.name, self.model.code_fingerprint, self.model.decoder_fingerprint, need="decoder")

    def check_size(self, file: TokenFile, max_tokens: int | None = MAX_TOKENS) -> None:
        """Refuse a file that takes minutes to decode: the time grows with the square of the tokens.

        Args:
            file: to be decoded; tiles of the model's own size are exempt, since their time grows with their number.
            max_tokens: largest number of tokens; None is no bound.

        Raises:
            QLIPError: it has more.
        """
        if max_tokens is not None:
            max_tokens = check_integer("max_tokens", max_tokens)
        in_tiles = math.prod(file.tile_grid) <= math.prod(self.model.grid)
        if max_tokens is not None and file.num_tokens > max_tokens and not in_tiles:
            raise QLIPError(f"{file.source}: {file.num_tokens:,} tokens, and {max_tokens:,} are allowed; allow more")

    def coders(self, tables: Path | None = None) -> TokenCodecs:
        """Return the entropy coders of the model, or of a file of tables, to read files with."""
        return TokenCodecs.of_model(self.name) if tables is None else TokenCodecs.of_file(tables)

    def coder(self, tables: Path | None = None) -> TokenCodec | None:
        """Return the entropy coder to write files with; None if the model has no tables.

        Raises:
            QLIPError: the tables cannot be read, or are for another number of bits per token.
        """
        found = self.coders(tables).current
        if found is not None and found.num_bits != self.model.num_bits:
            raise QLIPError(
                f"{found.tables.source}: for tokens of {found.num_bits} bits, but {self.name} has"
                f" {self.model.num_bits}; give tables that `qlip tokens codec train` made for this model"
            )
        return found


@cache
def codec_of_process(name: str) -> ImageCodec:
    """Codec of a model on the CPU, loaded once per process, for data that are encoded while they are read."""
    return ImageCodec.from_pretrained(name, device="cpu")


def _by_shape(
    items: Sequence[Item],
    shape: Callable[[Item], object],
    run: Callable[[Sequence[Item], int], Sequence[Result]],
    batch_size: int,
) -> list[Result]:
    """Run items in batches of equal shape; return the results in the order of the items."""
    batch_size = check_integer("batch_size", batch_size)
    groups: dict[object, list[int]] = {}
    for number, item in enumerate(items):
        groups.setdefault(shape(item), []).append(number)
    results: dict[int, Result] = {}
    for numbers in groups.values():
        for start in range(0, len(numbers), batch_size):
            part = numbers[start : start + batch_size]
            results.update(zip(part, run([items[number] for number in part], batch_size), strict=True))
    return [results[number] for number in range(len(items))]


def tiles_of(original_size: tuple[int, int], side: int, size: Size | None = None) -> tuple[int, int]:
    """Return (rows, columns) of the tiles that an image is cut into.

    Args:
        original_size: (width, height) of the image.
        side: height and width of a tile in pixels.
        size: (height, width) that the tiles together should have, or nearly; None is the image's own.
    """
    height, width = size or (original_size[1], original_size[0])
    return max(1, round(height / side)), max(1, round(width / side))


def resized_to_tiles(
    preprocessing: Preprocessing, image: Image.Image, tiles: tuple[int, int], side: int
) -> Image.Image:
    """Resize an RGB image so that (rows, columns) tiles of `side` x `side` pixels cover it."""
    return preprocessing.resized(image, size=(tiles[0] * side, tiles[1] * side))


def join_tiles(indices: Tensor, tiles: tuple[int, int], tile_grid: tuple[int, int]) -> Tensor:
    """Join the indices of tiles, (R * C, n, K), to the whole grid in raster order, (R * C * n, K)."""
    joined: Tensor = indices.unflatten(0, tiles).unflatten(2, tile_grid).transpose(1, 2).flatten(0, 3)
    return joined


def split_tiles(indices: Tensor, tiles: tuple[int, int], tile_grid: tuple[int, int]) -> Tensor:
    """Split indices of a whole grid, (R * C * n, K), by tiles, (R * C, n, K): the inverse of `join_tiles`."""
    (rows, columns), (height, width) = tiles, tile_grid
    parts: Tensor = indices.unflatten(0, (rows, height, columns, width)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return parts


def _cut(pixels: Tensor, tiles: tuple[int, int]) -> Tensor:
    """Cut (3, H, W) pixels into tiles in raster order, (R * C, 3, H / R, W / C)."""
    rows, columns = tiles
    cells = pixels.unflatten(2, (columns, -1)).unflatten(1, (rows, -1))  # (3, R, h, C, w)
    parts: Tensor = cells.permute(1, 3, 0, 2, 4).flatten(0, 1)
    return parts


def join_images(images: Sequence[Image.Image], tiles: tuple[int, int]) -> Image.Image:
    """Join the images of (rows, columns) tiles, in raster order, to one image."""
    if len(images) == 1:
        return images[0]
    width, height = images[0].size
    whole = Image.new("RGB", (tiles[1] * width, tiles[0] * height))
    for number, image in enumerate(images):
        row, column = divmod(number, tiles[1])
        whole.paste(image, (column * width, row * height))
    return whole
