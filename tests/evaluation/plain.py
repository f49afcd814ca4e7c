"""Small subjects and sets for tests of evaluators: no model, images that are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qlip.data.loader.eval_set import EvalSet
from qlip.data.loader.transforms import EvalTransform
from qlip.data.sources.open import open_path
from qlip.evaluation.models.base import EvalModel, Reconstructed
from qlip.modeling import Preprocessing


class Plain(EvalModel):
    """Rebuilds images as a function of their pixels in [0, 1] says."""

    def __init__(self, size: int, change: Callable[[Tensor], Tensor], num_bytes: int = 100) -> None:
        self.name, self.capabilities, self.device = "plain", frozenset({"reconstruct"}), torch.device("cpu")
        self.preprocessing, self.fingerprint = Preprocessing((size, size), size), "0" * 64
        self.change, self.num_bytes = change, num_bytes

    def reconstruct(self, pixel_values: Tensor) -> Reconstructed:
        """Each image of as many bytes."""
        pixels = self.change(self.preprocessing.denormalize(pixel_values))
        return Reconstructed(pixels, torch.full((len(pixels),), self.num_bytes))


def opened(folder: Path, model: EvalModel) -> EvalSet:
    """A folder's images, prepared for a model."""
    return EvalSet(open_path(str(folder)), EvalTransform(model.preprocessing))


def write_images(folder: Path, images: Tensor) -> list[str]:
    """(B, 3, H, W) uint8 as PNG; returns keys."""
    folder.mkdir(exist_ok=True)
    names = [f"{number:02d}.png" for number in range(len(images))]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(folder / name)
    return names
