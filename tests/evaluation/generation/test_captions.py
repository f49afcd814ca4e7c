"""Captions by image: all figures at once, and images that do not go together."""

from __future__ import annotations

import pytest

from qlip import QLIPError
from qlip.evaluation.generation import DocumentFrequencies, caption_settings, measure_captions

from .published import CANDIDATES, REFERENCES


def keyed() -> tuple[dict[str, str], dict[str, list[str]]]:
    """In another order than they are scored in, as people write."""
    sentences = {f"{n}": f"{one[0].upper()}{one[1:]}." for n, one in enumerate(CANDIDATES)}
    return sentences, {f"{n}": REFERENCES[n] for n in (1, 0)}


def test_all_figures_at_once() -> None:
    found = measure_captions(*keyed())
    assert list(found.values) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor_exact_stem", "cider_d"]
    assert found.values["bleu_4"].value == pytest.approx(0.201143, abs=1e-6)
    assert found.values["cider_d"].value == pytest.approx(1.242192, abs=1e-6)
    assert "not the METEOR of COCO's table" in found.notes["meteor_exact_stem"]
    rows = found.tables["captions"]
    assert [row["key"] for row in rows] == ["0", "1"] and rows[0]["caption"] == keyed()[0]["0"]
    mean = sum(float(str(row["cider_d"])) for row in rows) / 2
    assert mean == pytest.approx(found.values["cider_d"].value)
    assert all(value.count == 2 for value in found.values.values())


def test_frequencies_of_another_set_are_named() -> None:
    known = DocumentFrequencies(1000, {("this",): 900}, "photos:val")
    found = measure_captions(*keyed(), frequencies=known)
    assert found.notes["cider_d"] == "document frequencies of photos:val, 1000 pictures"
    assert caption_settings(known)["document frequencies"] == "photos:val"
    assert caption_settings()["document frequencies"] == "the references themselves"
    assert found.values["cider_d"].value != measure_captions(*keyed()).values["cider_d"].value


def test_what_is_silent_or_alone_is_noted() -> None:
    found = measure_captions({"a": "..."}, {"a": ["a dog"]})
    assert found.notes["captions"] == "1 of 1 captions have no word"
    assert "of a single picture every word is common" in found.notes["cider_d"]
    assert all(value.value == 0 for value in found.values.values())


def test_pictures_that_do_not_go_together() -> None:
    with pytest.raises(QLIPError, match="there are none to measure"):
        measure_captions({}, {})
    with pytest.raises(QLIPError, match=r"1 of pictures with 2 references; 'b' has no captions"):
        measure_captions({"a": "x"}, {"a": ["x"], "b": ["y"]})
    with pytest.raises(QLIPError, match=r"2 of pictures with 1 references; 'b' has no references"):
        measure_captions({"a": "x", "b": "y"}, {"a": ["x"]})
    with pytest.raises(QLIPError, match="'a' has no reference with a word in it"):
        measure_captions({"a": "x"}, {"a": [" "]})
