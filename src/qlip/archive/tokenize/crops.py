"""Views of an image that are encoded: the model's own preprocessing, its mirror image, ten crops, or tiles."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qlip.archive.dataset.schema import Views
from qlip.errors import QLIPError
from qlip.modeling.processor import Preprocessing
from qlip.tokens.image_codec import resized_to_tiles

Pixels = NDArray[np.uint8]
"""(H, W, 3)."""
MAX_TILES = 4096
"""Largest number of tiles per image; an image with more is skipped."""


class ViewMaker:
    """Cut images into the 8-bit pixels of their views, in a fixed order.

    ``square`` without a size is the model's own preprocessing, to the last bit; with a size it is what
    ``qlip encode --size`` does. ``ten`` resizes and crops to `crop_range` times the size, then takes top left, top
    right, bottom left, bottom right and centre, and the same five of the mirror image (the order of torchvision's
    ``TenCrop``). ``tiles`` are those of `qlip.tokens.ImageCodec`, in raster order.

    Args:
        preprocessing: of the model.
        views: to cut.

    Raises:
        QLIPError: the size is no multiple of the patch, or makes more than `MAX_TILES` tiles.
    """

    def __init__(self, preprocessing: Preprocessing, views: Views) -> None:
        self.preprocessing, self.views = preprocessing, views
        if views.fit == "tiles":
            if views.size is not None:
                self._tiles_of((views.size[1], views.size[0]))
        elif views.size is not None and (near := preprocessing.in_patches(views.size)) != views.size:
            height, width = views.size
            raise QLIPError(
                f"size {height} {width}: must be multiples of the patch, {preprocessing.patch_size};"
                f" try --size {near[0]} {near[1]}"
            )

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of every view in pixels; None if it differs from image to image."""
        if self.views.tile is not None:
            return self.views.tile, self.views.tile
        return None if self.views.fit == "keep-aspect" else self.views.size or self.preprocessing.size

    def __call__(self, image: Image.Image) -> list[Pixels]:
        """Make the views of an RGB image, uint8 (H, W, 3) each.

        Raises:
            QLIPError: more than `MAX_TILES` tiles.
        """
        if self.views.fit == "tiles":
            return self._tiles(image)
        if self.views.crops == "ten":
            whole = self._larger(image)
            return [*self._five(whole), *self._five(whole[:, ::-1])]
        pixels = np.asarray(self._fitted(image), dtype=np.uint8)
        return [pixels] if self.views.crops == "one" else [pixels, pixels[:, ::-1]]

    def _fitted(self, image: Image.Image) -> Image.Image:
        return self.preprocessing.resized(image, self.views.fit == "keep-aspect", self.views.size)

    def _tiles(self, image: Image.Image) -> list[Pixels]:
        tiles, side = self._tiles_of(image.size), self.views.tile
        assert side is not None
        whole = np.asarray(resized_to_tiles(self.preprocessing, image, tiles, side), dtype=np.uint8)
        starts = ((row * side, column * side) for row in range(tiles[0]) for column in range(tiles[1]))
        return [whole[top : top + side, left : left + side] for top, left in starts]

    def _tiles_of(self, original_size: tuple[int, int]) -> tuple[int, int]:
        tiles, side = self.views.tiles_of(original_size), self.views.tile
        if math.prod(tiles) > MAX_TILES:
            raise QLIPError(
                f"{tiles[0]} x {tiles[1]} tiles of {side} x {side} pixels, and an image may have {MAX_TILES:,}; choose"
                " a smaller size to work at"
            )
        return tiles

    def _larger(self, image: Image.Image) -> Pixels:
        """Return the square image at `crop_range` times the size."""
        views, own = self.views, self.preprocessing
        height, width = (round(side * views.crop_range) for side in views.size or own.size)
        if views.size is not None:
            larger = own.resized(image, size=(height, width))
        else:
            edge = (
                None if own.shortest_edge is None else max(height, width, round(own.shortest_edge * views.crop_range))
            )
            larger = replace(own, size=(height, width), shortest_edge=edge).resized(image)
        return np.asarray(larger, dtype=np.uint8)

    def _five(self, whole: Pixels) -> list[Pixels]:
        size = self.size
        assert size is not None
        bottom, right = whole.shape[0] - size[0], whole.shape[1] - size[1]
        corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]
        return [whole[top : top + size[0], left : left + size[1]] for top, left in corners]


class Normalizer:
    """Normalise uint8 pixels exactly as the processor does, on any device.

    The 256 values of each channel are looked up in a table, because a GPU's division by a constant rounds differently
    from a CPU's.

    Args:
        preprocessing: of the model.
        device, dtype: of the result; the values are computed in float32.
    """

    def __init__(self, preprocessing: Preprocessing, device: torch.device, dtype: torch.dtype) -> None:
        values = (torch.arange(256).float() / 255).expand(3, 1, 256)
        self._table = preprocessing.normalize(values).to(dtype).to(device).flatten()  # (3 * 256,)
        self._channel = 256 * torch.arange(3, device=device, dtype=torch.int32)[:, None, None]

    def __call__(self, pixels: NDArray[Any]) -> Tensor:
        """Convert uint8 (B, H, W, 3) to (B, 3, H, W)."""
        own = pixels if pixels.flags.writeable else pixels.copy()  # torch warns of read-only arrays from a shared store
        channels = torch.from_numpy(own).to(self._table.device).permute(0, 3, 1, 2)
        places = channels.int() + self._channel
        return self._table.index_select(0, places.flatten()).view(places.shape)
