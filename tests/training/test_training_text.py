"""The record of the captions that a run trains with."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlip import QLIPError
from qlip.data.image_feed import captions_of
from qlip.data.sources.training_text import RECORD, TrainingText
from qlip.modeling import QLIPProcessor
from qlip.training.recipe import check_recipe
from qlip.training.tasks import training_text
from qlip.training.tasks.build import open_training_feed
from qlip.training.tasks.recipe import Stage1Recipe
from qlip.training.tasks.training_text import record_training_text


def recorded(values: dict, folder: Path) -> TrainingText:
    recipe = check_recipe(values, "test")
    assert isinstance(recipe, Stage1Recipe)
    feed = open_training_feed(recipe, QLIPProcessor.from_pretrained("bundled").preprocessing, None)
    record_training_text(recipe, lambda: feed, folder)
    return TrainingText.read(folder)


def test_training_text__covers_the_captions_of_the_run(recipe_values: dict, tmp_path: Path) -> None:
    fresh = recipe_values | {"model": {"config": "qlip-nano-64"}}
    text = recorded(fresh, tmp_path / "fresh")
    recipe = check_recipe(fresh, "test")
    feed = open_training_feed(recipe, QLIPProcessor.from_pretrained("bundled").preprocessing, None)  # type: ignore[arg-type]
    assert all(text.knows(caption) is True for caption in captions_of(feed, 100))
    assert text.knows("submarine") is False and text.sources == (recipe_values["data"]["sources"][0]["path"],)
    without = recorded(fresh | {"losses": {"alpha_a": 0}}, tmp_path / "unaligned")
    assert without.complete and without.sources == ()


def test_training_text__includes_that_of_the_checkpoint_it_starts_from(
    recipe_values: dict, checkpoint: Path, tmp_path: Path
) -> None:
    # the checkpoint has no record: what it was trained with is unknown
    assert recorded(recipe_values, tmp_path / "unknown").knows("submarine") is None
    further = recorded(recipe_values | {"model": {"init": "bundled"}}, tmp_path / "further")
    assert further.sources[:2] == ("cifar10:train", "emoji:train") and len(further.sources) == 5
    assert (further.knows("truck"), further.knows("submarine x")) == (True, False)


def test_training_text__large_and_streamed_sources_leave_it_incomplete(
    recipe_values: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = recipe_values | {"model": {"config": "qlip-nano-64"}}
    monkeypatch.setattr(training_text, "MAX_IMAGES", 39)
    text = recorded(fresh, tmp_path / "large")
    assert not text.complete and text.sources == ()


def test_training_text__command_needs_a_recipe_of_stage_1(tmp_path: Path) -> None:
    with pytest.raises(QLIPError, match="only stage 1 reads captions"):
        training_text.main("nano/stage2", str(tmp_path))
    assert not (tmp_path / RECORD).exists()
