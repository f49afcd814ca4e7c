"""Images as a vision-language model sees them, in training and in use."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor

from qlip.errors import QLIPError
from qlip.modeling.processor import Preprocessing, read_preprocessing
from qlip.vlm.config import VLMConfig

PREPROCESSING = "preprocessor_config.json"


def pixels_of(image: Image.Image, preprocessing: Preprocessing, pad: bool = False) -> Tensor:
    """Prepare an image.

    Args:
        image: RGB.
        preprocessing: of the tower.
        pad: make it square by margins of the mean colour, which become 0, instead of a crop; as LLaVA 1.5.

    Returns:
        (3, H, W) float32, normalised.
    """
    if pad:
        side, colour = max(image.size), tuple(int(255 * mean) for mean in preprocessing.mean)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return preprocessing.pixels(preprocessing.resized(image))


def read_vlm_preprocessing(folder: Path, config: VLMConfig) -> Preprocessing:
    """Read the preprocessing in a model's folder.

    Raises:
        QLIPError: the folder lacks it, or it cannot be read.
    """
    path = folder / PREPROCESSING
    if not path.is_file():
        raise QLIPError(f"{path}: no such file; the folder of a vision-language model holds it")
    return read_preprocessing(path, config.vision_config.image_size, config.vision_config.patch_size)
