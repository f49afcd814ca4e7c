"""Section ``data``: ratios of the kinds by step (eq. 7), and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qlip.errors import QLIPError
from qlip.um3.data.config import DataSection, TextSource

ALL: dict[str, Any] = {
    "text": [{"path": "a.txt"}],
    "images": [{"scenes": "captioned"}],
    "interleaved": [{"path": "b.jsonl", "images": "b"}],
}


def test_shares__are_the_papers() -> None:
    section = DataSection(text=[{"path": "a.txt"}], images=[{"scenes": "captioned"}])
    kinds = ("text", "image-to-text", "text-to-image")
    for step, text in ((0, 60), (2_500, 48), (10_000, 12), (600_000, 12)):
        wanted = [text / (text + 4), 1 / (text + 4), 3 / (text + 4)]
        assert section.shares(step) == pytest.approx(dict(zip(kinds, wanted, strict=True)))


@given(first=st.floats(0, 99), last=st.floats(0, 99), steps=st.integers(0, 50), step=st.integers(0, 100))
def test_shares__text_is_linear_and_then_constant(first: float, last: float, steps: int, step: int) -> None:
    mixture = {"text": (first, last), "calm_down_steps": steps, "interleaved": 2}
    shares = DataSection(**ALL, mixture=mixture).shares(step)
    text = last if step >= steps else ((steps - step) * first + step * last) / steps
    wanted = {"text": text, "image-to-text": 1, "text-to-image": 3, "interleaved": 2}
    assert shares == pytest.approx({kind: ratio / (text + 6) for kind, ratio in wanted.items()})


def test_kinds__are_those_with_a_source() -> None:
    assert DataSection(images=[{"questions": "train"}]).kinds == ("image-to-text",)
    assert DataSection(interleaved=ALL["interleaved"]).shares(3) == {"interleaved": 1.0}
    assert not DataSection(text=ALL["text"]).has_images


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({}, "no source"),
        ({"text": ALL["text"], "mixture": {"text": (0, 0)}}, "at step 0 the ratios of text sum to nothing"),
        (ALL | {"mixture": {"text": (1e308, 1), "image_to_text": 1e308}}, "sum to too much; give smaller ones"),
        ({"text": ALL["text"], "mixture": {"text": (1, 0)}}, "at step 10,000 the ratios of text sum to nothing"),
        ({"images": [{}]}, "give one of tokens"),
        ({"images": [{"scenes": "captioned", "templates": "cifar"}]}, "templates is used only with tokens"),
        ({"interleaved": [{"path": "a.jsonl"}]}, "give either tokens"),
        ({"text": ALL["text"], "text_room": 9}, "text_room is used only with images"),
        ({"images": [{"questions": "train"}], "text_dropout": 0.2}, "text_dropout is used only with"),
        ({"text": ALL["text"], "mixture": {"text": (-1, 1)}}, "greater than or equal to 0"),
    ],
)
def test_section__what_does_not_fit_is_named(values: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        DataSection(**values)


def test_text_source__public_datasets_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path))
    source = TextSource(path="sotu:train")
    with pytest.raises(QLIPError, match="sotu:train: not in .*; fetch it with `qlip data get sotu`"):
        _ = source.pattern
    folder = tmp_path / "datasets" / "sotu"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    assert source.pattern == str(folder / "train.jsonl")
    assert TextSource(path="sotu/train.jsonl").pattern == "sotu/train.jsonl"
