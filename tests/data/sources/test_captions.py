"""Captions: CLIP's templates, and uniform draws."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from qlip.data import RawSample, draw_caption, load_templates, match_id
from qlip.data.sources.captions import names_side
from qlip.errors import QLIPError


def test_load_templates__are_clips() -> None:
    cifar, imagenet = load_templates("cifar"), load_templates("imagenet")
    assert (len(set(cifar)), len(set(imagenet))) == (18, 80)
    assert cifar[0] == "a photo of a {}." and "a photo of the big {}." in cifar
    assert imagenet[0] == "a bad photo of a {}." and "itap of the {}." in imagenet


def test_load_templates__from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("a {} here\n\n  the {} there \n")
    assert load_templates(str(path)) == ("a {} here", "the {} there")
    path.write_text("{}, once more")
    assert load_templates(str(path)) == ("{}, once more",)  # a file counts as it is, not as it was
    path.with_name("bad.txt").write_text("a {}\nno place\n")
    with pytest.raises(QLIPError, match="the line 'no place' should hold one '{}'"):
        load_templates(str(path.with_name("bad.txt")))
    with pytest.raises(QLIPError, match="'cifer': neither a text file nor one of cifar, imagenet"):
        load_templates("cifer")


def test_draw_caption__is_uniform() -> None:
    rng = np.random.default_rng(0)
    sample = RawSample(b"", ("a", "b", "c"), "label", "key")
    counts = Counter(draw_caption(sample, ("{}!",), rng) for _ in range(3000))
    assert set(counts) == {"a", "b", "c"} and min(counts.values()) > 900


def test_draw_caption__labels_need_templates() -> None:
    rng = np.random.default_rng(0)
    sample = RawSample(b"", (), "{x} y", "key")
    assert {draw_caption(sample, ("a {}", "the {}"), rng) for _ in range(50)} == {"a {x} y", "the {x} y"}
    assert draw_caption(sample, (), rng) is None
    assert draw_caption(RawSample(b"", (), None, "key"), ("a {}",), rng) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red circle to the left of a blue square", True),
        ("Backhand Index Pointing RIGHT", True),
        ("leftwards arrow", True),
        ("counter-clockwise arrows", True),
        ("a north-west arrow", True),
        ("turn_left", True),
        ("the right-most chair", True),
        ("an upright piano in bright light, copyright 2020", False),
        ("a red circle above a blue square", False),
        ("a forest and a beast", False),
    ],
)
def test_names_side__words_that_a_mirror_image_makes_false(text: str, expected: bool) -> None:
    assert names_side(text) == expected


def test_match_id__by_label_then_by_text() -> None:
    assert match_id("cat", "a cat") == match_id("cat", "the cat") != match_id("dog", "a cat")
    assert match_id(None, "a cat") == match_id(None, "a cat") != match_id(None, "the cat")
    assert match_id("cat", "x") != match_id(None, "cat")
    assert match_id("cat", None) == match_id(None, None) == 0
    assert match_id("cat", "a cat") == 5536449437348678154  # pinned: a run resumed elsewhere must agree
