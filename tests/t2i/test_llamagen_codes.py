"""LlamaGen's folders of codes: draws, faults that are skipped and named, training and resumption to the bit."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlip import QLIPError
from qlip.lm import DecoderModel
from qlip.t2i.llamagen_codes import open_codes
from tests.t2i.test_task import batch_of, lines, train, weights

VIEWS, SIDE = 3, 2


def write(folder: Path, images: int = 6, shift: int = 0, side: int = SIDE) -> Path:
    """Codes that name their image and view: 100 image + 10 view + place + shift; class 7 image."""
    codes, labels = folder / "imagenet256_codes", folder / "imagenet256_labels"
    codes.mkdir(parents=True)
    labels.mkdir()
    for image in range(images):
        values = 100 * image + 10 * np.arange(VIEWS)[:, None] + np.arange(side * side) + shift
        np.save(codes / f"{image}.npy", values[None].astype(np.int64))
        np.save(labels / f"{image}.npy", np.array([7 * image], np.int64))
    return folder


@pytest.fixture
def codes(tmp_path: Path) -> Path:
    return write(tmp_path / "codes")


def feed_of(*folders: Path, **options: Any) -> Any:
    values = {"codebook_size": 1024, "num_classes": 1000, "seed": 0, "batch_size": 6, "num_workers": 0} | options
    return open_codes([str(folder) for folder in folders], **values).open("class")


def test_codes__each_image_once_per_epoch_in_a_random_view(codes: Path) -> None:
    views = Counter[int]()
    for batch, _ in itertools.islice(feed_of(codes).open(None), 20):
        values = batch.indices[:, :, 0]
        assert batch.indices.dtype == torch.int64 and batch.indices.shape == (6, SIDE * SIDE, 1)
        assert sorted((values[:, 0] // 100).tolist()) == list(range(6))
        assert torch.equal(values - values[:, :1], torch.arange(4).expand(6, -1))
        assert batch.class_ids.tolist() == (values[:, 0] // 100 * 7).tolist()
        views.update((values[:, 0] % 100 // 10).tolist())
    assert set(views) == {0, 1, 2} and min(views.values()) > 25  # of 120, 40 each


def test_codes__two_folders_are_drawn_equally_often(codes: Path, tmp_path: Path) -> None:
    write(tmp_path / "codes_105", shift=5)
    shifts = Counter[bool]()
    for batch, _ in itertools.islice(feed_of(codes, tmp_path / "codes_105").open(None), 20):
        shifts.update((batch.indices[:, 0, 0] % 10 == 5).tolist())
    assert 45 < shifts[True] < 75  # of 120


@pytest.mark.parametrize("num_workers", [0, 2])
def test_codes__resume_to_the_bit(codes: Path, num_workers: int) -> None:
    whole = [(batch.indices, state) for batch, state in itertools.islice(feed_of(codes, batch_size=4).open(None), 8)]
    opened = feed_of(codes, batch_size=4, num_workers=num_workers).open(whole[2][1])
    rest = [batch.indices for batch, _ in itertools.islice(opened, 5)]
    opened.close()
    assert all(torch.equal(one, other) for one, (other, _) in zip(rest, whole[3:], strict=True))
    with pytest.raises(QLIPError, match="seed 0, this feed 1"):
        next(feed_of(codes, seed=1).open(whole[0][1]))


def test_codes__files_that_cannot_be_read_are_skipped_and_named(codes: Path) -> None:
    folder, labels = codes / "imagenet256_codes", codes / "imagenet256_labels"
    whole = (folder / "1.npy").read_bytes()
    (folder / "1.npy").write_bytes(whole[:-8])
    np.save(folder / "2.npy", np.array([{"a": 1}], object), allow_pickle=True)
    np.save(folder / "3.npy", np.full((1, VIEWS, 4), 1024))
    (labels / "4.npy").unlink()
    np.save(labels / "5.npy", np.array([1000]))
    batch, _ = next(feed_of(codes).open(None))
    reasons = {one.key: one.reason for one in batch.skipped}
    assert len(batch) == 1 and batch.class_ids.tolist() == [0]
    assert "cut off" in reasons["1.npy"] and "not a NumPy array" in reasons["2.npy"]
    assert "code 1024 is out of range: 0 to 1023" in reasons["3.npy"]
    assert "no such file" in reasons["4.npy"] and "no class from 0 to 999" in reasons["5.npy"]
    assert all("\n" not in reason for reason in reasons.values())


def test_codes__folders_that_do_not_fit_are_one_line(codes: Path, tmp_path: Path) -> None:
    with pytest.raises(QLIPError, match="absent: no such folder of LlamaGen's codes"):
        feed_of(tmp_path / "absent")
    with pytest.raises(QLIPError, match="need one folder such as imagenet256_codes, and there is none"):
        feed_of(tmp_path)
    assert feed_of(codes / "imagenet256_codes").batch_size == 6
    np.save(codes / "imagenet256_codes/0.npy", np.zeros((1, 2, 7), np.int64))
    with pytest.raises(QLIPError, match="7 codes per image, which is no square grid"):
        feed_of(codes)
    (tmp_path / "empty/x_codes").mkdir(parents=True)
    with pytest.raises(QLIPError, match="x_labels: no such folder of classes"):
        feed_of(tmp_path / "empty")
    (tmp_path / "empty/x_labels").mkdir()
    with pytest.raises(QLIPError, match="no file such as 0.npy"):
        feed_of(tmp_path / "empty")


def recipe_of(codes: Path, **changes: Any) -> dict[str, Any]:
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head": {"kind": "flat"}}
    return {
        "name": "codes",
        "task": "t2i",
        "model": {"config": config},
        "data": {"codes": str(codes), "codebook_size": 1024, "num_classes": 50},
        "batch_size": 4,
        "schedule": {"steps": 4},
        "threads": 1,
        "checkpoint": {"every": 2},
        "log": {"every": 1, "tensorboard": False},
    } | changes


def test_training__on_codes_by_class(codes: Path, tmp_path: Path) -> None:
    """A broken file ends nothing; it is named."""
    (codes / "imagenet256_codes/3.npy").write_bytes(b"")
    train(recipe_of(codes), tmp_path / "run")
    log = lines(tmp_path / "run")
    assert [line for line in log if "bits_per_image" in line][0]["bits_per_image"] == pytest.approx(40, abs=1e-3)
    config = DecoderModel.from_pretrained(tmp_path / "run/model").config
    assert (config.grid, config.codebook_size, config.num_groups) == ((2, 2), 1024, 1)
    assert (config.condition, config.condition_size, config.classes, config.code_fingerprint) == (
        "class",
        50,
        None,
        None,
    )
    batch = batch_of(recipe_of(codes, input_noise={"share": 0.5}), tmp_path / "noise")
    assert batch.inputs.max() < 1024 and not torch.equal(batch.inputs, batch.indices)
    assert weights(tmp_path / "run")["tok_embeddings.weight"].shape == (1024, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {}}, "give one of tokens, codes and scenes"),
        ({"data": {"codes": "x", "tokens": "y"}}, "give one of tokens, codes and scenes, not tokens and codes"),
        ({"data": {"codes": "x", "templates": "cifar"}}, "templates is used only with tokens"),
        ({"data": {"scenes": "captioned", "num_classes": 5}}, "num_classes is used only with codes"),
        ({"data": {"scenes": "captoined"}}, "no such split of the made scenes.*captioned"),
        ({"data": {"codes": "x"}, "validation": {"tokens": "y", "every": 1}}, "validation is used only with"),
    ],
)
def test_recipe__of_other_data_is_strict(codes: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(QLIPError, match=message) as caught:
        train(recipe_of(codes) | change, tmp_path / "run")
    assert "\n" not in str(caught.value)
