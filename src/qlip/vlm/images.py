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


def pixels_of(image: ImageInput, preprocessing: Preprocessing, pad: bool = False) -> Tensor:
    """Load and prepare an image.

    Args:
        image: what :func:`qlip.modeling.images.load_image` takes.
        preprocessing: of the tower; says what becomes of colour profiles too.
        pad: make it square by margins of the mean colour, which become 0, instead of a crop; as LLaVA 1.5.

    Returns:
        (3, H, W) float32, normalised.

    Raises:
        QLIPError: the image cannot be read.
    """
    loaded = preprocessing.load(image)
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
