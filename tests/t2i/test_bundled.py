"""What the bundled drawer draws, held to the exact checker."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from qlip import Drawer, QLIPError
from qlip.data.public.scene_captions import CaptionedScenes
from qlip.data.public.scenes import STANDARD
from qlip.evaluation.metrics.scenes import is_right, read_scene


@pytest.fixture(scope="module")
def bundled() -> Drawer:
    return Drawer.from_pretrained("bundled", device="cpu")


def test_bundled__draws_single_things_right(bundled: Drawer) -> None:
    scenes = CaptionedScenes("seen")
    described = [scenes.scene(at)[0] for at in range(200)]
    single = [one for one in described if one.family == "single"][:24]
    indices = bundled.draw(bundled.condition([one.caption for one in single]), seed=0)
    read = [read_scene(np.asarray(image), STANDARD) for image in bundled.images(indices)]
    right = Counter(is_right(one, scene) for one, scene in zip(single, read, strict=True))
    assert right[True] >= 20


def test_bundled__an_image_is_the_same_in_any_batch(bundled: Drawer) -> None:
    prompts = ["a red circle", "a photo of a ship", "two green squares"]
    together = bundled.draw(bundled.condition(prompts), seed=3)
    assert torch.equal(together[1:2], bundled.draw(bundled.condition(prompts[1:2]), seed=3, numbers=[1]))


def test_bundled__knows_ten_classes(bundled: Drawer) -> None:
    assert len(bundled.settings.classes) == 10
    bundled.condition(list(bundled.settings.classes.values()))
    with pytest.raises(QLIPError, match="did you mean 'truck'"):
        bundled.caption_of("trck")
