"""A network of features small enough for tests, and images to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qlip.evaluation.networks import FeatureNetwork, Inception
from qlip.evaluation.networks.base import frozen


class Tiny(FeatureNetwork):
    """Colours and edges of an image, mixed at random."""

    name = "fd_tiny"
    short = "tiny"
    dimensions = 5
    smallest = 4

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.input = "as they are"
        draw = torch.Generator().manual_seed(seed)
        self.mix = torch.nn.Parameter(torch.randn(5, 9, generator=draw))
        frozen(self)

    def features(self, images: Tensor) -> Tensor:
        """Means and mean absolute differences along both axes, mixed."""
        x = self.checked(images)
        edges = [x.diff(dim=axis).abs().mean((2, 3)) for axis in (2, 3)]
        return torch.cat([x.mean((2, 3)), *edges], 1) @ self.mix.t()


class TinyInception(Inception):
    """Inception by name, tiny inside."""

    dimensions = 5

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.input, self.tiny = "as they are", Tiny()

    def features(self, images: Tensor) -> Tensor:
        """What the tiny one sees."""
        return self.tiny.features(images)


def write_images(folder: Path, count: int, size: int, seed: int, contrast: float = 1.0) -> list[Path]:
    """PNG images of smooth noise."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, paths = np.random.default_rng(seed), []
    for number in range(count):
        coarse = (128 + contrast * (draw.integers(0, 256, (4, 4, 3)) - 128.0)).astype(np.uint8)
        image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR)
        paths.append(folder / f"{number:03d}.png")
        image.save(paths[-1])
    return paths
