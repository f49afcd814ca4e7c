"""Exactly once: whatever the number of ranks, workers, restarts and kills, each sample of a pass comes once."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from qlip.data import Batch, Source, TrainingStream, TrainTransform, batches
from qlip.data.loader.feed import Feed, PositionFeed, share_of
from qlip.data.loader.sampler import Numbers
from qlip.errors import QLIPError
from tests.data.loader.killed import BATCH, feed_of
from tests.data.samples import folder, shard, tars, tokenize

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores: on purpose

ROOT = Path(__file__).resolve().parents[3]


def stream_of(path: Path, broken: tuple[int, ...] = ()) -> TrainingStream:
    transform = TrainTransform((4, 4))
    sources = [Source(tars(path, 40, broken=broken), transform, 3), Source(folder(path / "f", 7), transform, 1)]
    return TrainingStream(sources, 3, tokenize)


def consumed(batch: Batch) -> list[str]:
    return batch.keys + [f"{one.source}/{one.key}" for one in batch.skipped]


def test_share_of__contiguous_and_equal_but_for_one() -> None:
    for batch_size, world in ((12, 1), (12, 3), (13, 4), (5, 5), (65536, 96)):
        shares = [share_of(batch_size, rank, world) for rank in range(world)]
        assert shares[0][0] == 0 and shares[-1][1] == batch_size
        assert all(left[1] == right[0] for left, right in itertools.pairwise(shares))
        sizes = {high - low for low, high in shares}
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world", [2, 3, 5])
def test_batches__shares_of_ranks_are_the_batch_of_one_process(tmp_path: Path, world: int) -> None:
    stream = stream_of(tmp_path)
    alone = batches(stream, 13, start=4)
    ranks = [batches(stream, 13, start=4, rank=rank, world=world) for rank in range(world)]
    for _ in range(8):  # across the border of a pass
        whole, parts = next(alone), [next(rank) for rank in ranks]
        assert whole.keys == [key for part in parts for key in part.keys]
        for name in ("pixel_values", "input_ids", "has_caption", "match_ids"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_batches__more_ranks_than_positions_is_an_error(tmp_path: Path) -> None:
    stream = stream_of(tmp_path)
    with pytest.raises(QLIPError, match="batch_size 3 for 4 ranks: a rank would get no sample"):
        next(batches(stream, 3, rank=0, world=4))
    with pytest.raises(QLIPError, match="rank 2 of 2: ranks count from 0 to 1"):
        next(batches(stream, 3, rank=2, world=2))


def test_batches__each_sample_once_with_changing_ranks_and_workers(tmp_path: Path) -> None:
    """40 samples in batches of 12: the pass ends inside a batch. Some are broken: they are consumed too."""
    source = Source(tars(tmp_path, 40, broken=(3, 20)), TrainTransform((4, 4)))
    seen, position = [], 0
    for world, num_workers in [(1, 0), (2, 0), (3, 2), (1, 1), (2, 0), (3, 0), (1, 2)]:
        stream = TrainingStream([source], 0, tokenize)  # a restart
        parts = []
        for rank in range(world):
            row = batches(stream, 12, position, num_workers if rank == 0 else 0, rank=rank, world=world)
            parts.append(next(row))
            row.close()  # type: ignore[attr-defined]
        seen += [key for part in parts for key in consumed(part)]
        position += 12
    assert Counter(Counter(seen[:40]).values()) == {1: 40}
    assert Counter(Counter(seen[40:80]).values()) == {1: 40}
    assert len(seen) == 84


# any data by position


def numbers(positions: Numbers) -> list[int]:
    """A `make` that needs no images."""
    return list((positions * 10).tolist())


def test_position_feed__states_continue_with_other_ranks_and_workers() -> None:
    feed = PositionFeed(numbers, {"seed": 3, "name": "n"}, 5, end=23)
    whole = [batch for batch, _ in feed.open(None)]
    assert whole == [[10 * n for n in range(first, min(first + 5, 23))] for first in range(0, 23, 5)]
    states = [state for _, state in feed.open(None)]
    assert states[0] == {"position": 5, "seed": 3, "name": "n"} and states[-1]["position"] == 23
    for stop, state in enumerate(states, 1):
        state = feed.merge([json.loads(json.dumps(state)), state])
        for world, workers in ((1, 0), (2, 2), (3, 0)):
            other = PositionFeed(numbers, {"name": "n", "seed": 3}, 5, workers, 2, end=23)
            shares = [[batch for batch, _ in other.open(state, rank=rank, world=world)] for rank in range(world)]
            assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole[stop:]
    endless = PositionFeed(numbers, {}, 2)
    assert [batch for batch, _ in itertools.islice(endless.open({"position": 6}), 2)] == [[60, 70], [80, 90]]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"position": 5, "seed": 4, "window": None}, "tokens: the saved state has seed 4, this feed 3; use the saved"),
        ({"position": 5, "seed": 3, "window": 2}, "tokens: the saved state has window 2, this feed None"),
        ({"position": 5, "seed": 3}, "tokens: the saved state has window None, this feed None"),
        (
            {"position": 5, "seed": 3, "window": None, "lanes": {}},
            "tokens: the saved state has lanes {}, this feed None",
        ),
        (
            {"position": -1, "seed": 3, "window": None},
            "tokens: the saved state has position -1; it must be a number of",
        ),
        ({"seed": 3, "window": None}, "tokens: the saved state has position None; it must be a number of samples"),
    ],
)
def test_position_feed__refuses_the_state_of_another_and_names_the_key(state: dict[str, Any], message: str) -> None:
    feed = PositionFeed(numbers, {"seed": 3, "window": None}, 5, name="tokens")
    with pytest.raises(QLIPError) as caught:
        next(feed.open(state))
    assert str(caught.value).startswith(message)
    with pytest.raises(QLIPError):
        feed.merge([state])


def test_position_feed__prepares_what_comes_next_and_closes() -> None:
    prepared: list[list[int]] = []
    closed: list[bool] = []
    feed = PositionFeed(
        numbers, {}, 4, prepare=lambda at: prepared.append(at.tolist()), close=lambda: closed.append(True)
    )
    opened = feed.open(None, rank=1, world=2)
    assert next(opened)[0] == [20, 30]
    assert prepared == [[2, 3], [6, 7]] and not closed
    opened.close()
    assert closed == [True]


# with kill -9


def by_one_process(sources: list[dict[str, Any]], count: int) -> list[list[str]]:
    return [consumed(batch) for batch, _ in itertools.islice(feed_of(sources, 0).open(None), count)]


def run_killed(path: Path, rounds: list[tuple[int, int]], sources: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    path.mkdir()
    arguments = [str(path), json.dumps([rounds, sources, seed])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.data.loader.killed", *arguments], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.mark.parametrize(
    ("rounds", "seed"),
    [
        ([(1, 0), (3, 0), (2, 0), (1, 2), (3, 0), (1, 0)], 7),
        pytest.param([(1 + n % 4, n * 7 % 4) for n in range(24)], 8, marks=pytest.mark.slow),
        pytest.param([(1 + n * 5 % 4, n % 2) for n in range(24)], 9, marks=pytest.mark.slow),
    ],
)
def test_feed__killed_ranks_miss_nothing_and_repeat_nothing(
    tmp_path: Path, rounds: list[tuple[int, int]], seed: int
) -> None:
    """Indexed tars, a streamed source and a folder in one mixture; killed once a round."""
    for number in range(6):
        shard(tmp_path / f"s-{number}.tar", range(20 * number, 20 * number + 17 + number), broken=(20 * number + 2,))
    sources: list[dict[str, Any]] = [
        {"path": str(tmp_path / "t-0.tar"), "weight": 2},
        {
            "path": f"{tmp_path}/s-*.tar",
            "weight": 3,
            "streaming": True,
            "num_cursors": 3,
            "cursor_sets": 2,
            "shuffle_buffer": 30,
        },
        {"path": str(tmp_path / "f"), "weight": 1},
    ]
    shard(tmp_path / "t-0.tar", range(31))
    folder(tmp_path / "f", 7)
    found = run_killed(tmp_path / "run", rounds, sources, seed)
    steps = found["batches"]
    assert len(steps) >= 2 * len(rounds) and {len(parts) for parts in steps} == {world for world, _ in rounds}
    expected = by_one_process(sources, len(steps))
    for parts, whole in zip(steps, expected, strict=True):  # a part lists its broken samples last
        assert sorted(key for part in parts for key in part) == sorted(whole)
    assert found["state"]["position"] == BATCH * len(steps)
    _, state = list(itertools.islice(feed_of(sources, 0).open(None), len(steps)))[-1]
    assert found["state"] == json.loads(json.dumps(state))
    keys = [key for parts in steps for part in parts for key in part]
    of_tars = [key for key in keys if key.startswith(sources[0]["path"])]
    for begin in range(0, len(of_tars), 31):
        assert max(Counter(of_tars[begin : begin + 31]).values()) == 1


def test_feed__merges_the_states_of_ranks(tmp_path: Path) -> None:
    for number in range(4):
        shard(tmp_path / f"s-{number}.tar", range(20 * number, 20 * number + 15))
    sources = [
        {"path": f"{tmp_path}/s-*.tar", "streaming": True, "num_cursors": 4, "cursor_sets": 1, "shuffle_buffer": 8}
    ]

    def after(feed: Feed[Batch], count: int, state: Any, world: int) -> Any:
        rows = [feed.open(state, rank=rank, world=world) for rank in range(world)]
        for _ in range(count):
            states = [next(row)[1] for row in rows]
        return feed.merge(json.loads(json.dumps(states)))

    alone = after(feed_of(sources, 0), 9, None, 1)
    for worlds in ((2, 3, 4), (4, 1, 3), (6, 5, 2)):  # some divide the cursors, some do not
        state = None
        for world in worlds:
            state = after(feed_of(sources, 0), 3, state, world)
        assert state == alone
    with pytest.raises(QLIPError, match="states of different batches, at positions 12, 24"):
        PositionFeed(list, {}, 12).merge([{"position": 12}, {"position": 24}])
    assert PositionFeed(list, {}, 12).merge([{"position": 12}, {"position": 12}]) == {"position": 12}
