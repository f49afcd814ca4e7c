"""Images of originals above reconstructions, written while a model trains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from qlip.files import written_aside
from qlip.modeling import to_images
from qlip.training.log.eval_context import Applied, evaluating
from qlip.training.log.runlog import RunLog

ENLARGE_TO = 128
"""Small images are shown larger, pixel by pixel."""


class ImageHook:
    """Write ``step-<number>.png`` with some images and their reconstructions.

    Args:
        reconstruct: (B, 3, H, W) normalised pixels to originals and reconstructions in [0, 1].
        pixel_values: (B, 3, H, W) normalised, on the model's device.
        every: steps between two.
        folder: where to.
    """

    def __init__(
        self,
        reconstruct: Callable[[Tensor], tuple[Tensor, Tensor]],
        pixel_values: Tensor,
        every: int,
        folder: Path,
    ) -> None:
        self.reconstruct, self.pixel_values, self.every = reconstruct, pixel_values, every
        self.folder = folder

    def __call__(self, step: int, log: RunLog, applied: Applied = nullcontext) -> None:
        """Write the image if it is due; all ranks reconstruct, for they may share the model, and the first writes."""
        if step % self.every or not len(self.pixel_values):
            return
        with evaluating(self.pixel_values.device, log.clock, applied):
            originals, rebuilt = self.reconstruct(self.pixel_values)
            if not log.silent:
                self._write(step, log, originals, rebuilt)

    def _write(self, step: int, log: RunLog, originals: Tensor, rebuilt: Tensor) -> None:
        grid = torch.cat([torch.cat(list(row), -1) for row in (originals, rebuilt)], -2).cpu()  # (3, 2 H, B W)
        log.image(step, grid)
        (image,) = to_images(grid[None])
        factor = max(1, ENLARGE_TO // originals.shape[-1])
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        with written_aside(self.folder / f"step-{step:08d}.png") as aside:
            image.save(aside, format="PNG")
