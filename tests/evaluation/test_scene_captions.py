"""Captions of made scenes: exact scoring against scenes, controls, resumption, and a row of a result."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlip.data.public.scene_captions import CaptionedScenes
from qlip.data.public.scenes import STANDARD, Scene, Thing, draw
from qlip.errors import QLIPError
from qlip.evaluation.metrics.scenes import known_scene, read_scene
from qlip.evaluation.run import scene_captions
from qlip.evaluation.run.scene_answers import result_of
from qlip.evaluation.run.scene_captions import captions_row, collect_captions, fits, score_captions, shuffled_places
from qlip.runtime.workspace import Workspace

COUNT = 30
SCENE = Scene("black", (Thing("circle", "red", "small", 20, 32), Thing("square", "blue", "large", 46, 32)), STANDARD)


@cache
def captions_by_image() -> dict[bytes, str]:
    scenes = [CaptionedScenes("seen").scene(at) for at in range(COUNT)]
    return {draw(scene).tobytes(): description.caption for description, scene in scenes}


def looking(images: Sequence[Image.Image] | None, texts: Sequence[str]) -> list[str]:
    assert not any(texts)
    return ["a red circle"] * len(texts) if images is None else [captions_by_image()[one.tobytes()] for one in images]


@pytest.mark.parametrize(
    ("caption", "right"),
    [
        ("a red circle and a blue square", True),
        ("A blue square to the right of a red circle.", True),
        ("a small red circle and a large blue square on black", True),
        ("a red circle to the right of a blue square", False),
        ("a red circle", False),  # not all things
        ("a red circle and a blue square on white", False),
        ("a blue circle and a red square", False),
        ("two shapes", False),
    ],
)
def test_fits__a_caption_names_all_things_and_is_true(caption: str, right: bool) -> None:
    assert fits(caption, SCENE) == right


def test_known_scene__is_what_the_checker_sees() -> None:
    for at in range(6):
        _, scene = CaptionedScenes("seen").scene(at)
        known, seen = known_scene(scene), read_scene(np.array(draw(scene)), scene.design)
        assert known.background == seen.background
        one, other = (
            sorted((thing.colour, thing.shape, thing.size) for thing in some.things) for some in (known, seen)
        )
        assert one == other


def test_collect_captions__one_who_looks_is_right_with_its_scenes_alone() -> None:
    captions = collect_captions(looking, "seen", COUNT, batch_size=8)
    found = score_captions(captions)
    values = found.values
    assert values["captions_right"].value == 100 and values["captions_right"].count == COUNT
    assert values["captions_read"].value == 100
    assert 0 <= values["captions_shuffled"].value < 50 and values["captions_blind"].value < 20
    above = values["captions_above_shuffled"]
    assert above.value == pytest.approx(100 - values["captions_shuffled"].value) and above.unit == "points"
    families = [one.family for one, _ in captions.scenes]
    single = sum(one in scene_captions.ONE_OBJECT for one in families)
    assert values["captions_right_one_object"].count == single
    assert values["captions_shuffled_count"].count == families.count("count")
    assert len(found.tables["captions"]) == COUNT and found.notes["captions_blind"].startswith("control")
    row = captions_row(captions, found, {"dtype": "float32"})
    made = result_of({"name": "a", "fingerprint": "b", "kind": "UM3"}, [row], torch.device("cpu"))
    assert made.subject["kind"] == "UM3" and made.measured[0].data == "scenes:seen"


def test_shuffled_places__another_caption_of_the_family() -> None:
    described = [CaptionedScenes("seen").scene(at)[0] for at in range(COUNT)]
    for at, other in enumerate(shuffled_places(described)):
        assert described[at].family == described[other].family
        assert other == at or described[at].caption != described[other].caption


def test_collect_captions__continues_after_a_stop(tmp_path: Path) -> None:
    calls: list[int] = []

    def answer(images: Sequence[Image.Image] | None, texts: Sequence[str]) -> list[str]:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(texts))
        return looking(images, texts)

    work = Workspace(tmp_path / "out", {})
    with pytest.raises(KeyboardInterrupt):
        collect_captions(answer, "seen", 12, batch_size=4, work=work)
    calls.append(0)
    steps = list[int]()
    captions = collect_captions(answer, "seen", 12, batch_size=4, work=work, on_progress=steps.append)
    assert calls == [4, 4, 0, 4, 1] and sum(steps) == 12 and len(captions.given) == 12


def test_collect_captions__refuses_wrong_numbers_and_answers() -> None:
    with pytest.raises(QLIPError, match="1 scenes: seen has 2 to 2,000"):
        collect_captions(looking, "seen", 1)
    with pytest.raises(QLIPError, match="gave 1 captions of 4 scenes"):
        collect_captions(lambda images, texts: ["a"], "seen", 4)
    with pytest.raises(QLIPError, match="split of scenes"):
        collect_captions(looking, "unknown", 4)
