"""The bundled UM3: its card, and both of its directions, held to the exact checkers."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qlip import assets
from qlip.data.public.scene_captions import CaptionedScenes, Description
from qlip.data.public.scenes import STANDARD, Scene, draw
from qlip.evaluation.metrics.scenes import is_right, read_scene
from qlip.evaluation.run.scene_captions import fits
from qlip.lm.sampling import Sampling
from qlip.um3 import UM3Chat


@pytest.fixture(scope="module")
def bundled() -> UM3Chat:
    return UM3Chat.from_pretrained(device="cpu")


@pytest.fixture(scope="module")
def single() -> list[tuple[Description, Scene]]:
    """The first 24 held-out scenes of one thing, and their descriptions."""
    scenes = CaptionedScenes("seen")
    return [one for one in map(scenes.scene, range(200)) if one[0].family == "single"][:24]


def test_bundled__card_says_that_a_stock_class_needs_a_mask() -> None:
    card = assets.path(assets.BUNDLED_UM3, "README.md").read_text(encoding="utf-8")
    assert "**A stock class does not know which ids may follow which" in card


def test_bundled__describes_single_things(bundled: UM3Chat, single: list[tuple[Description, Scene]]) -> None:
    images = [[draw(scene)] for _, scene in single]
    written = bundled.generate(images, generation_mode="text", max_tokens=24, sampling=Sampling(temperature=0.0))
    texts = ["".join(map(str, one)).strip() for one in written]
    right = sum(fits(text, scene) for text, (_, scene) in zip(texts, single, strict=True))
    other = sum(fits(text, scene) for text, (_, scene) in zip(texts[1:], single, strict=False))
    assert right >= 18 and other <= 6


def test_bundled__draws_single_things(bundled: UM3Chat, single: list[tuple[Description, Scene]]) -> None:
    drawn = bundled.generate([one.caption for one, _ in single], generation_mode="image")
    assert all(len(one) == 1 and isinstance(one[0], Image.Image) for one in drawn)
    read = [read_scene(np.asarray(one[0]), STANDARD) for one in drawn]
    assert sum(is_right(one, scene) for (one, _), scene in zip(single, read, strict=True)) >= 14


def test_bundled__reads_what_it_drew(bundled: UM3Chat) -> None:
    colours = ("red", "green", "blue", "purple", "cyan")
    drawn = bundled.generate([f"a {colour} square on white" for colour in colours], generation_mode="image")
    words = bundled.generate(drawn, generation_mode="text", max_tokens=24, sampling=Sampling(temperature=0.0))
    assert sum(colour in str(text[0]) for colour, text in zip(colours, words, strict=True)) >= 4
