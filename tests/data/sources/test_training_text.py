"""The record of training captions: literal phrases, merging, size limit, files."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlip import QLIPError
from qlip.data.sources import training_text
from qlip.data.sources.training_text import RECORD, UNKNOWN, TrainingText


def test_training_text__phrases_are_adjacent_words() -> None:
    text = TrainingText.of(["Scatter a HOT, dog!", "cats", "the dog's life", "t shirt", "a red big old hen"])
    for name in ("hot dog", "Dog's life", "T-shirt", "a red big old hen", "cats"):
        assert text.knows(name) is True
    for name in ("cat", "life dog's", "dog hot", "big red old hen", "tabby cats"):
        assert text.knows(name) is False
    assert text.knows("#!") is None


def test_training_text__unknown_without_a_complete_record(tmp_path: Path) -> None:
    part = TrainingText.of(["a cat"], ["one"], complete=False)
    assert (part.knows("cat"), part.knows("dog")) == (True, None)
    assert UNKNOWN.knows("cat") is None
    assert TrainingText.read(tmp_path) is UNKNOWN


def test_training_text__a_later_training_adds_to_the_first() -> None:
    first, second = TrainingText.of(["a cat"], ["one"]), TrainingText.of(["a dog"], ["two", "one"])
    both = first.merged(second)
    assert both.sources == ("one", "two") and both.complete
    assert [both.knows(name) for name in ("cat", "dog", "cow")] == [True, True, False]
    assert first.merged(UNKNOWN).knows("cow") is None and first.merged(UNKNOWN).knows("cat") is True


def test_training_text__a_large_record_keeps_shorter_phrases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_text, "MAX_PHRASES", 12)
    text = TrainingText.of(["one two three four five", "six"])  # 6 words, 4 pairs, 3 triples, ...
    assert len(text.phrases) == 2
    assert (text.knows("two three"), text.knows("three two"), text.knows("two three four")) == (True, False, True)
    assert len(text.merged(TrainingText.of(["seven eight nine ten"])).phrases) == 1


def test_training_text__survives_its_file(tmp_path: Path) -> None:
    text = TrainingText.of(["a red cat"], ["one"])
    text.save(tmp_path)
    again = TrainingText.read(tmp_path)
    assert (again.sources, again.complete) == (("one",), True)
    assert all((one == two).all() for one, two in zip(text.phrases, again.phrases, strict=True))
    for damaged in ("[", '{"version": 9}', '{"sources": [], "complete": true, "phrases": ["AAA="]}'):
        (tmp_path / RECORD).write_text(damaged)
        with pytest.raises(QLIPError, match=RECORD):
            TrainingText.read(tmp_path)


def test_training_text__of_the_bundled_model() -> None:
    text = TrainingText.read("bundled")
    assert text.complete and text.sources == ("cifar10:train", "emoji:train", "clipart:train", "icons:train")
    assert (text.knows("truck"), text.knows("tabby cat")) == (True, False)
