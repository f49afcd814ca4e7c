"""Images while they are drawn: the rows so far, as a growing image and as an animated GIF.

The tokenizer's decoder attends globally, so rows that are not drawn yet would change those above them. The rows so far
are therefore decoded as a shorter image, and the rest is filled with grey.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from PIL import Image
from torch import Tensor

from qlip.t2i.drawer import Drawer

GREY = (128, 128, 128)
"""Colour of the rows that are not drawn yet."""
STEP, HOLD = 120, 2000
"""Milliseconds that a frame is shown, and the last one."""


def partial_images(drawer: Drawer, indices: Tensor) -> list[Image.Image]:
    """Decode the finished rows of images.

    Args:
        drawer: whose tokens they are.
        indices: int64 (B, n, K), the first n of N tokens; those after the last finished row are not read.

    Returns:
        B images of full size.
    """
    height, width = drawer.decoder.config.grid
    side, rows = drawer.codec.model.patch_size, indices.shape[1] // width
    if rows == height:
        return drawer.images(indices)
    found = [Image.new("RGB", (width * side, height * side), GREY) for _ in range(len(indices))]
    if rows:
        for whole, image in zip(found, drawer.images(indices[:, : rows * width], rows), strict=True):
            whole.paste(image, (0, 0))
    return found


class Growth:
    """Shows images row by row: pass it to `generate` or `Drawer.draw` as ``on_step``.

    Args:
        drawer: that draws.
        show: called after each finished row but the last with B images of full size, see :func:`partial_images`; the
            finished images are what the caller decodes anyway.
    """

    def __init__(self, drawer: Drawer, show: Callable[[list[Image.Image]], None]) -> None:
        self.drawer, self.show = drawer, show

    def __call__(self, step: int, drawn: Tensor) -> None:
        """See :data:`qlip.lm.generate.OnStep`."""
        config = self.drawer.decoder.config
        if step % (config.grid[1] * config.num_steps // config.num_tokens) == 0 and step < config.num_steps:
            self.show(partial_images(self.drawer, drawn.reshape(len(drawn), -1, config.num_groups)))


def gif(frames: Sequence[Image.Image]) -> bytes:
    """Encode frames as an animated GIF that repeats, and holds its last frame.

    Args:
        frames: at least one, RGB, of equal size.
    """
    buffer = io.BytesIO()
    times = [STEP] * (len(frames) - 1) + [HOLD]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
    return buffer.getvalue()
