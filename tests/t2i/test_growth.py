"""Growing images: rows so far as a shorter image above grey, one call per row, and a GIF that holds its last frame."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from qlip.t2i import Drawer
from qlip.t2i.growth import GREY, HOLD, STEP, Growth, gif, partial_images
from tests.t2i.conftest import tiny


def test_partial_images__rows_so_far_above_grey(drawer: Drawer) -> None:
    indices = drawer.draw(drawer.condition(["a cat", "a dog"]))
    found = partial_images(drawer, indices[:, : 3 * 8 + 5])
    expected = drawer.codec.model.decode(indices[:, :24], (3, 8))  # the shorter image alone
    for image, pixels in zip(found, drawer.codec.processor.to_images(expected), strict=True):
        assert image.size == (64, 64)
        np.testing.assert_array_equal(np.asarray(image)[:24], np.asarray(pixels))
        assert (np.asarray(image)[24:] == GREY).all()
    assert [image.getcolors() for image in partial_images(drawer, indices[:, :5])] == [[(64 * 64, GREY)]] * 2
    whole = partial_images(drawer, indices)
    assert [one.tobytes() for one in whole] == [one.tobytes() for one in drawer.images(indices)]


@pytest.mark.parametrize("head", ["chain", "flat"])
def test_growth__shows_each_finished_row(drawer: Drawer, head: str) -> None:
    decoder = tiny(head={"kind": head})
    other = Drawer(decoder, drawer.codec, drawer.prompts, drawer.settings, head)
    frames: list[list[Image.Image]] = []
    indices = other.draw(other.condition(["a cat"]), on_step=Growth(other, frames.append))
    assert len(frames) == 7
    for row, [frame] in enumerate(frames, 1):
        assert frame.tobytes() == partial_images(other, indices[:, : 8 * row])[0].tobytes()


def test_growth__of_a_variation_begins_at_the_first_row_that_is_drawn(drawer: Drawer) -> None:
    frames: list[list[Image.Image]] = []
    edit = drawer.edit(Image.new("RGB", (64, 64), "red"), keep=0.6)  # 38 tokens: four rows and six tokens
    indices = drawer.draw(drawer.condition(["a cat"]), edit=edit, on_step=Growth(drawer, frames.append))
    shown = [partial_images(drawer, indices[:, : 8 * row])[0].tobytes() for row in (5, 6, 7)]
    assert [one.tobytes() for [one] in frames] == shown


def test_gif__holds_its_last_frame_and_repeats() -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    with Image.open(io.BytesIO(gif(frames))) as file:
        assert (file.n_frames, file.size, file.info["loop"]) == (3, (8, 6), 0)  # type: ignore[attr-defined]
        for number, (frame, time) in enumerate(zip(frames, (STEP, STEP, HOLD), strict=True)):
            file.seek(number)
            assert file.info["duration"] == time
            assert file.convert("RGB").tobytes() == frame.tobytes()
