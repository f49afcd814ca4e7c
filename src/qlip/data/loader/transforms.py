"""Transforms from a decoded image to a model's pixels: one Pillow resize of a box, a flip, normalisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from qlip.modeling.images import ImageInput
from qlip.modeling.processor import Preprocessing

Resample = Literal["bilinear", "bicubic", "lanczos"]
RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
Box = tuple[float, float, float, float]
Pixels = NDArray[np.float32]

REDUCING_GAP = 3.0
"""Factor above which Pillow first averages whole blocks: many times faster, with almost equal results."""
TRIES = 10
MAX_BLUR = 2.2
"""Maximum factor by which `blurred` shrinks; an enlarged CIFAR-10 image at 64 px has lost a factor of 2."""


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop (Szegedy et al., 2015) and flip, a function of the image and the generator alone.

    Attributes:
        size: height and width of the result, pixels.
        crop_scale: smallest and largest share of the image's area that a crop covers.
        crop_ratio: smallest and largest width over height of a crop, relative to that of `size`.
        flip: probability of a left-right flip.
        resample: filter of the resize.
        blur: probability of a random low-pass filter after the resize; see `blurred`.
        sharpen: probability of a random unsharp mask instead; see `sharpened`.
        mean, std: the normalised value is (pixel / 255 - mean) / std, per channel.
    """

    size: tuple[int, int]
    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    resample: Resample = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    blur: float = 0.0
    sharpen: float = 0.0

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """Transform an RGB image of any size to float32 (3, H, W); the number of draws from `rng` is always equal."""
        pixels = torch.empty(3, *self.size)
        self.into(image, rng, pixels.numpy())
        return pixels

    def into(self, image: Image.Image, rng: np.random.Generator, out: Pixels, may_flip: bool = True) -> bool:
        """Write the transformed image to `out`, float32 (3, H, W), such as a slot of a batch.

        Returns:
            True if it is flipped, which it never is without `may_flip`; the draws from `rng` are equal either way.
        """
        box = self.crop(image.size, rng)
        flipped = rng.random() < self.flip and may_flip
        resized = self.filtered(resize(image, self.size, box, self.resample), rng)
        to_pixels(resized, self.mean, self.std, flipped, out)
        return flipped

    def filtered(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Blur or sharpen the resized crop at random, so that sharpness does not reveal the dataset of an image.

        Draws three numbers if `blur` or `sharpen` is set, else none, so that streams without filters stay equal.
        """
        if not self.blur and not self.sharpen:
            return image
        choice, first, second = rng.random(3).tolist()
        if choice < self.blur:
            return blurred(image, MAX_BLUR**first)
        if choice < self.blur + self.sharpen:
            return sharpened(image, radius=0.5 + first, percent=round(40 + 160 * second))
        return image

    def crop(self, image_size: tuple[int, int], rng: np.random.Generator) -> Box:
        """Draw a random box (left, upper, right, lower) in an image of (width, height) pixels."""
        width, height = image_size
        draws = rng.random((TRIES, 4))
        target = self.size[1] / self.size[0]
        low, high = (math.log(ratio) for ratio in self.crop_ratio)
        for scale, ratio, x, y in draws.tolist():
            area = width * height * (self.crop_scale[0] + scale * (self.crop_scale[1] - self.crop_scale[0]))
            aspect = target * math.exp(low + ratio * (high - low))
            crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left, upper = int(x * (width - crop_width + 1)), int(y * (height - crop_height + 1))
                return (left, upper, left + crop_width, upper + crop_height)
        aspect = min(max(width / height, target * self.crop_ratio[0]), target * self.crop_ratio[1])
        return centre_box(image_size, aspect)


@dataclass(frozen=True)
class EvalTransform:
    """Preprocessing of a checkpoint's processor: evaluation uses the pixels that a user's image would give.

    Attributes:
        preprocessing: ``QLIPProcessor.preprocessing``.
    """

    preprocessing: Preprocessing

    def load(self, source: ImageInput) -> Image.Image:
        """Load an image as RGB, as the processor does."""
        return self.preprocessing.load(source)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result, pixels."""
        return self.preprocessing.size

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform an RGB image of any size to float32 (3, H, W)."""
        return self.preprocessing.pixels(self.preprocessing.resized(image))


def centre_box(image_size: tuple[int, int], aspect: float) -> Box:
    """Return the largest centred box of width / height `aspect`, in whole pixels, in an image of (width, height)."""
    width, height = image_size
    crop_width, crop_height = min(width, round(height * aspect)), min(height, round(width / aspect))
    crop_width, crop_height = max(1, crop_width), max(1, crop_height)
    left, upper = (width - crop_width) // 2, (height - crop_height) // 2
    return (left, upper, left + crop_width, upper + crop_height)


def resize(image: Image.Image, size: tuple[int, int], box: Box, resample: Resample) -> Image.Image:
    """Resize a box of the image to `size` (height, width); a box that has this size already is cut out unfiltered."""
    height, width = size
    return image.resize((width, height), RESAMPLING[resample], box=box, reducing_gap=REDUCING_GAP)


def blurred(image: Image.Image, factor: float) -> Image.Image:
    """Remove fine detail: shrink by a factor of at least 1 and enlarge again, both bicubically."""
    small = (max(1, round(image.width / factor)), max(1, round(image.height / factor)))
    return image.resize(small, Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)


def sharpened(image: Image.Image, radius: float, percent: int) -> Image.Image:
    """Sharpen by an unsharp mask: add a percentage of the difference from a Gaussian blur of a radius in pixels."""
    return image.filter(ImageFilter.UnsharpMask(radius, percent, threshold=0))


def to_pixels(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...], flipped: bool, out: Pixels) -> None:
    """Write a normalised RGB image to `out`, float32 (3, H, W)."""
    array = np.asarray(image)  # (H, W, 3)
    if flipped:
        array = array[:, ::-1]
    for channel, plane in enumerate(out):  # by planes and in place: several times faster than with (H, W, 3) floats
        np.divide(array[..., channel], np.float32(255), out=plane, dtype=np.float32)
        plane -= np.float32(mean[channel])
        plane /= np.float32(std[channel])
