"""Captions of made scenes: read back, true of their scenes, and split so that nothing held out is trained on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qlip.data.public import open_named
from qlip.data.public.scene_captions import (
    CELLS,
    FAMILIES,
    HELD_OUT_COUNTS,
    HELD_OUT_PAIRS,
    LENGTHS,
    RELATIONS,
    SPLITS,
    CaptionedScenes,
    Description,
    Item,
    contradiction,
    held_out_relation,
    inverted,
    parse_caption,
)
from qlip.data.public.scenes import COLOURS, Scene
from qlip.errors import QLIPError


def samples(split: str, count: int = 250) -> list[tuple[Description, Scene]]:
    source = CaptionedScenes(split)
    return [source.scene(index) for index in range(count)]


def claims(description: Description) -> set[str]:
    """Which held-out combinations a description shows."""
    first, last = description.items[0], description.items[-1]
    found = set()
    if any((one.colour, one.shape) in HELD_OUT_PAIRS for one in description.items):
        found.add("unseen_pair")
    if description.family == "count" and len(description.items) == HELD_OUT_COUNTS.get(first.shape):
        found.add("unseen_count")
    if description.relation == held_out_relation(first.colour, last.colour):
        found.add("unseen_relation")
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_split__holds_what_its_name_says(split: str) -> None:
    made = samples(split)
    seen = [claims(description) for description, _ in made]
    if split.startswith("unseen"):
        assert all(one == {split} for one in seen)
    elif split != "hard":
        assert not any(seen)
    families = {description.family for description, _ in made}
    expected = {"unseen_count": {"count"}, "unseen_relation": {"relation"}}.get(split, set(FAMILIES))
    assert families == expected
    shapes = {one.shape for description, _ in made for one in description.items}
    assert shapes >= {"circle", "square", "triangle", "cross"} and ("ring" in shapes) == (split == "hard")


@pytest.mark.parametrize("split", SPLITS)
def test_caption__is_read_back_and_true(split: str) -> None:
    for description, scene in samples(split, 150):
        assert parse_caption(description.caption) == description
        assert [(one.colour, one.shape) for one in scene.things] == [(i.colour, i.shape) for i in description.items]
        assert all(item.size in (None, thing.size) for item, thing in zip(description.items, scene.things, strict=True))
        assert description.background in (None, scene.background)
        first, last = scene.things[0], scene.things[-1]
        if description.relation == "left":
            assert last.x - first.x > abs(last.y - first.y)
        if description.relation == "above":
            assert last.y - first.y > abs(last.x - first.x)
        if description.cell is not None:
            assert (int(first.y * 3 / 64), int(first.x * 3 / 64)) == divmod(description.cell, 3)


def test_source__each_sample_is_a_function_of_its_number() -> None:
    source = open_named("scenes:seen")
    raw, again = source.read(7), CaptionedScenes("seen").read(7)
    assert raw == again and raw.key == "000007" and len(source) == LENGTHS["seen"]
    description, _ = CaptionedScenes("seen").scene(7)
    assert raw.captions == (description.caption,) and raw.label == description.family
    assert source.read(8).image != raw.image
    assert CaptionedScenes("captioned").read(7).image != raw.image


def test_captions__are_many() -> None:
    texts = {description.caption for description, _ in samples("captioned", 2000)}
    assert len(texts) > 1200
    named = [description.background is not None for description, _ in samples("captioned", 400)]
    assert 0.4 < np.mean(named) < 0.6


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("A Red Circle.", "a red circle"),
        ("  a red   circle ", "a red circle"),
        ("an orange square in the center", "an orange square in the centre"),
        ("a red circle on a black background", "a red circle on black"),
        ("three purple crosses on white", "three purple crosses on white"),
    ],
)
def test_parser__overlooks_what_does_not_matter(text: str, same: str) -> None:
    assert parse_caption(text).caption == same


@pytest.mark.parametrize(
    "text",
    ["", "a dog", "a red", "six red circles", "three red circle", "a red circle near a blue square", "a red circle and",
     "a circle", "a red circle above a blue square and a green cross"],
)  # fmt: skip
def test_parser__refuses_other_captions(text: str) -> None:
    with pytest.raises(QLIPError, match="describes no made scene"):
        parse_caption(text)


def test_held_out_relation__of_exchanged_colours_is_the_same_claim() -> None:
    for first, second in itertools.product(COLOURS, repeat=2):
        if first != second:
            assert held_out_relation(second, first) == inverted(held_out_relation(first, second))
    chosen = [held_out_relation(*pair) for pair in itertools.combinations(COLOURS, 2)]
    assert set(chosen) == set(RELATIONS)


def test_contradiction__is_another_valid_caption() -> None:
    for description, _ in samples("captioned", 300):
        other = contradiction(description)
        assert other != description and parse_caption(other.caption) == other and other.family == description.family


def test_article__follows_the_next_word() -> None:
    assert str(Item("orange", "circle")) == "an orange circle" and str(Item("orange", "bar", "small")).startswith("a ")
    assert len(CELLS) == 9
