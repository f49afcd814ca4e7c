"""Images as a vision-language model sees them, in training and in use."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor

from qlip.errors import QLIPError
from qlip.modeling.images import ImageInput
from qlip.modeling.processor import Preprocessing, read_preprocessing
from qlip.vlm.config import VLMConfig

PREPROCESSING = "preprocessor_config.json"
LONGEST = 1 << 14
"""Longest side in pixels of an image that is made square, which takes 3 bytes times its square."""


def load(image: ImageInput, preprocessing: Preprocessing, pad: bool = False) -> Image.Image:
    """Load an image.

    Args:
        image: what :func:`qlip.modeling.images.load_image` takes.
        preprocessing: of the tower; says what becomes of colour profiles.
        pad: it will be made square.

    Raises:
        QLIPError: the image cannot be read, or is too long to be made square.
    """
    loaded = preprocessing.load(image)
    if pad and max(loaded.size) > LONGEST:
        name = f"{image}: " if isinstance(image, str | Path) else ""
        size = f"{loaded.width:,} x {loaded.height:,} pixels"
        raise QLIPError(f"{name}an image of {size} cannot be made square, the most is {LONGEST:,}; crop or shrink it")
    return loaded


def pixels_of(image: ImageInput, preprocessing: Preprocessing, pad: bool = False) -> Tensor:
    """Load and prepare an image.

    Args:
        image, preprocessing: see `load`.
        pad: make it square by margins of the mean colour, which become 0, instead of a crop; as LLaVA 1.5.

    Returns:
        (3, H, W) float32, normalised.

    Raises:
        QLIPError: see `load`.
    """
    loaded = load(image, preprocessing, pad)
    if pad:
        side, colour = max(loaded.size), tuple(int(255 * mean) for mean in preprocessing.mean)
        square = Image.new("RGB", (side, side), colour)
        square.paste(loaded, ((side - loaded.width) // 2, (side - loaded.height) // 2))
        loaded = square
    return preprocessing.pixels(preprocessing.resized(loaded))


def read_vlm_preprocessing(folder: Path, config: VLMConfig) -> Preprocessing:
    """Read the preprocessing in a model's folder.

    Raises:
        QLIPError: the folder lacks it, or it cannot be read.
    """
    path = folder / PREPROCESSING
    if not path.is_file():
        raise QLIPError(f"{path}: no such file; the folder of a vision-language model holds it")
    return read_preprocessing(path, config.vision_config.image_size, config.vision_config.patch_size)
