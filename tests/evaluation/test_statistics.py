"""Statistics in a file: back as they were, refused where they are of something else, a fair draw of what is kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlip import QLIPError
from qlip.evaluation.metrics.frechet import frechet_distance
from qlip.evaluation.metrics.statistics import Gathered, Origin, Statistics
from qlip.evaluation.networks import FeatureNetwork

from .tiny import Tiny


def rows(count: int, seed: int, dimensions: int = 5) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def made(network: FeatureNetwork, count: int = 40, kept: int = 12) -> Statistics:
    gathered = Gathered(network.dimensions, kept)
    gathered.add(rows(count, 0, network.dimensions))
    origin = Origin(network.described(), count, (32, 48), "bicubic, centre crop", "photos:val", "ab" * 32, kept, 0)
    return Statistics(origin, gathered.moments, gathered.features)


def test_statistics__a_file_says_what_it_is_of_and_gives_back_every_digit(tmp_path: Path) -> None:
    network = Tiny()
    before, path = made(network), tmp_path / "photos.safetensors"
    before.save(path)
    back = Statistics.load(path)
    assert back.origin == before.origin and torch.equal(back.features, before.features)
    assert back.moments.count == 40 and torch.equal(back.moments.mean, before.moments.mean)
    torch.testing.assert_close(back.moments.covariance, before.moments.covariance, rtol=1e-14, atol=0)
    assert frechet_distance(before.moments, back.moments).distance == pytest.approx(0, abs=1e-9)
    back.check(network, (32, 48))


def test_statistics__what_was_looked_at_differently_is_not_compared() -> None:
    network = Tiny()
    statistics = made(network)
    with pytest.raises(QLIPError, match=r"photos:val are of 48x32 pixels, these images have 32x48; make both of one"):
        statistics.check(network, (48, 32))
    with pytest.raises(QLIPError, match=r"statistics of photos:val: weights is .*, here it is .*; make them again"):
        statistics.check(Tiny(seed=1), (32, 48))
    other = Tiny()
    other.input = "upside down"
    with pytest.raises(QLIPError, match="input is as they are, here it is upside down"):
        statistics.check(other, (32, 48))


def test_statistics__files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(QLIPError, match="x.safetensors: no such file; make one from the set"):
        Statistics.load(path)
    path.write_bytes(b"nothing of that kind")
    with pytest.raises(QLIPError, match="x.safetensors: no file of statistics"):
        Statistics.load(path)
    save_file({"mean": torch.zeros(3)}, path)
    with pytest.raises(QLIPError, match="x.safetensors: no file of statistics"):
        Statistics.load(path)
    network = Tiny()
    made(network).save(path)
    tensors, words = load_file(path), {"format": 1, **vars(made(network).origin)}

    def written(words: dict[str, object], **other: Tensor) -> None:
        save_file({**tensors, **other}, path, {"statistics": json.dumps(words)})

    for given, other, message in (
        ({**words, "format": 2}, {}, "statistics of another format"),
        ({**words, "more": 1}, {}, "does not say what its statistics are of"),
        ({**words, "kept": 13}, {}, "its tensors do not go together"),
        (words, {"covariance": torch.zeros(2, 2)}, "its tensors do not go together"),
        (words, {"mean": tensors["mean"] * torch.nan}, "holds numbers that are not finite"),
    ):
        written(given, **other)  # type: ignore[arg-type]
        with pytest.raises(QLIPError, match=message):
            Statistics.load(path)


def test_statistics__what_is_kept_depends_on_number_and_seed_alone_and_is_a_fair_draw() -> None:
    features = torch.arange(200.0)[:, None]

    def kept(seed: int, batch: int) -> list[float]:
        gathered = Gathered(1, 20, seed)
        for piece in features.split(batch):
            gathered.add(piece)
        return sorted(gathered.features[:, 0].tolist())

    assert kept(3, 7) == kept(3, 200) != kept(4, 200)
    assert len(set(kept(3, 7))) == 20
    times = np.bincount(np.concatenate([kept(seed, 200) for seed in range(300)]).astype(int), minlength=200)
    assert times.sum() == 6000 and times.min() > 10 and times.max() < 60  # 30 each, deviation 5.2
    few = Gathered(1, 500)
    few.add(features)
    assert torch.equal(few.features, features)


def test_statistics__the_digest_is_over_8_bit_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    images = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255
    together, apart = Gathered(1), Gathered(1)
    together.add(torch.zeros(2, 1), images)
    for one in images:
        apart.add(torch.zeros(1, 1), one[None])
    assert together.digest == apart.digest == hashlib.sha256(image.tobytes()).hexdigest()


def test_statistics__features_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(QLIPError, match="features hold infinite"):
        Gathered(5).add(rows(3, 0).fill_(torch.inf))
    assert replace(made(Tiny()).origin, count=3).count == 3
