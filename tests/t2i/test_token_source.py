"""Scenes drawn on the fly: the tokens that `qlip tokenize` would make, new ones for ever, equal after a restart."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlip import QLIPError
from qlip.archive.dataset.drawn_scenes import DrawnScenes
from qlip.data.public.scene_captions import LENGTHS, CaptionedScenes
from qlip.t2i.token_source import open_scenes
from qlip.tokens.image_codec import ImageCodec
from tests.t2i.test_task import job_of, train, weights


def recipe_of(**changes: Any) -> dict[str, Any]:
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head": {"kind": "chain"}}
    return {
        "name": "scenes",
        "task": "t2i",
        "model": {"config": config},
        "data": {"scenes": "captioned"},
        "batch_size": 4,
        "input_noise": {"share": 0.1},
        "schedule": {"steps": 4},
        "threads": 1,
        "checkpoint": {"every": 2, "keep": 10},
        "log": {"every": 1, "tensorboard": False},
    } | changes


def test_drawn_scenes__are_those_of_the_public_dataset() -> None:
    batch = DrawnScenes("captioned", "bundled", None).batch(np.array([3, 200_001]))
    images, codec = CaptionedScenes("captioned"), ImageCodec.from_pretrained("bundled", device="cpu")
    for number, indices, captions in zip((3, 200_001), batch.indices, batch.captions or (), strict=True):
        raw = images.read(number)
        [file] = codec.encode([raw.image])
        assert captions == raw.captions and torch.equal(indices, file.indices(codec.model.group_size))
    assert DrawnScenes("seen", "bundled", 7).codec is DrawnScenes("captioned", "bundled", None).codec
    assert batch.epochs.tolist() == [0, 1] and LENGTHS["captioned"] == 200_000
    assert DrawnScenes("captioned", "bundled", 14).batch(np.array([3])).indices.shape == (1, 64, 2)  # type: ignore[union-attr]


def test_feed__positions_decide_about_batches(tmp_path: Path) -> None:
    feed = job_of(recipe_of(), tmp_path).feed
    whole = list(itertools.islice(feed.open(None), 3))
    assert not torch.equal(whole[0][0].indices, whole[1][0].indices)
    again = job_of(recipe_of(data={"scenes": "captioned", "num_workers": 1}), tmp_path).feed.open(whole[0][1])
    for (batch, _), (other, _) in zip(itertools.islice(again, 2), whole[1:], strict=True):
        for name in ("indices", "inputs", "values", "dropped"):
            assert torch.equal(getattr(batch, name), getattr(other, name))
    again.close()


def test_open_scenes__what_does_not_fit_is_one_line() -> None:
    with pytest.raises(QLIPError, match="group_size 5 does not divide 28 bits, a token of bundled"):
        open_scenes("captioned", "bundled", 5, 4, 0)
    with pytest.raises(QLIPError, match="captoined: no such split of the made scenes .did you mean 'captioned'"):
        open_scenes("captoined", "bundled", None, 4, 0)


def test_training__on_scenes_resumes_to_the_bit(tmp_path: Path) -> None:
    train(recipe_of(), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/step-00000004")
    shutil.rmtree(tmp_path / "parts/model")
    train(recipe_of(), tmp_path / "parts")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert (tmp_path / "whole/first-batch.png").is_file()
