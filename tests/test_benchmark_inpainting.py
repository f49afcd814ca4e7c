"""The benchmark of inpainting: masks hold the thing, true tokens are the bound, a row per number of candidates."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.inpainting import cases, mask_of, right, table
from qlip.data.public.scene_captions import CaptionedScenes
from qlip.data.public.scenes import coverage_of
from qlip.t2i import Drawer
from tests.t2i.conftest import drawer, drawer_folder  # noqa: F401


def test_mask__holds_the_thing() -> None:
    for index in range(20):
        _, scene = CaptionedScenes("seen").scene(index)
        for thing in scene.things:
            white = np.asarray(mask_of(scene, thing)) > 0
            covered = coverage_of(thing.shape, scene.design.sizes[thing.size], thing.x, thing.y) > 0
            assert not (covered & ~white).any()
            side = scene.design.sizes[thing.size]
            assert (side + 4) ** 2 <= white.sum() <= (side + 6) ** 2


def test_table__a_row_per_number_of_candidates_and_the_bound(drawer: Drawer) -> None:  # noqa: F811
    given = cases(drawer, "seen", 2)
    assert right(drawer, given, [case.edit.indices for case in given]).all()
    lines = list(table(drawer, given, [1, 2]))
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["1", "2", "true tokens"]
    assert lines[-1].startswith("| true tokens | 100.0 |")
    empty = [torch.where(case.edit.hole[:, None], given[0].edit.indices[0], case.edit.indices) for case in given]
    assert not right(drawer, given, empty).all()  # a scene without its thing is wrong
