"""However ranks share the work, and whoever goes on with it, a run is the run of one process with the whole batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from torch import Tensor

from qlip import QLIPModel
from qlip.training.state.dcp_safetensors import read_index, read_whole
from tests.training.ranks import on_ranks
from tests.training.training_runs import EMPTY, EMPTY_SHARE, train

STEPS, BATCH, STOP, IMAGES = 12, 7, 5, 18  # images that the package brings
DDP, FSDP = {"parallel": {"kind": "ddp"}}, {"parallel": {"kind": "fsdp"}}
HSDP = {"parallel": {"kind": "fsdp", "shard": 2}}
EXACT = {"micro_batch_size": 2}


@pytest.fixture
def values(recipe_values: dict) -> dict:
    """LAMB, clipping, averages, all losses, and a batch that no number of ranks divides."""
    return recipe_values | {
        # by a name that is always the same, for it decides the order
        "data": {"num_workers": 0, "sources": [{"path": "bundled", "crop_scale": [0.5, 1.0], "flip": 0.5}]},
        "batch_size": BATCH,
        "optimizer": {
            "name": "lamb",
            "lr": 0.01,
            "parts": {"encoder": 0.005, "text": 0.002},
            "eps": 1e-4,
            "clip": 0.5,
        },
        "ema": {"decay": 0.9},
        "schedule": {"steps": STEPS, "warmup": 2},
        "checkpoint": {"every": 100, "keep": 10},
        "log": {"every": 1, "images_every": 0, "tensorboard": False},
    }


def test_two_ranks_are_one_process_and_one_goes_on_where_they_stopped(values: dict, tmp_path: Path) -> None:
    train(values, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    on_ranks(2, train, [(values | DDP | EXACT, tmp_path / "ddp"), (values | FSDP, stopped, STOP)])
    assert_same(tmp_path / "ddp", tmp_path / "whole")
    assert_sharded(stopped, ranks=2)
    train(values, stopped)
    assert_same(stopped, tmp_path / "whole")


@pytest.mark.slow
def test_every_layout_is_one_process_and_any_number_of_ranks_goes_on(values: dict, tmp_path: Path) -> None:
    train(values, tmp_path / "whole")
    checkpointed = {"activation_checkpointing": True, "checkpoint": {"every": 3, "keep": 2, "asynchronous": False}}
    layouts = {"ddp": DDP, "fsdp": FSDP, "fsdp-exact": FSDP | EXACT | checkpointed}
    stops = {"ddp-stopped": DDP, "fsdp-stopped": FSDP}
    on_ranks(
        2,
        train,
        [
            *((values | changed, tmp_path / name) for name, changed in layouts.items()),
            *((values | changed, tmp_path / name, STOP) for name, changed in stops.items()),
        ],
    )
    shutil.copytree(tmp_path / "ddp-stopped", tmp_path / "ddp-by-4")
    shutil.copytree(tmp_path / "fsdp-stopped", tmp_path / "fsdp-by-4")
    on_ranks(
        4,
        train,
        [
            (values | HSDP, tmp_path / "hsdp"),
            (values | HSDP, tmp_path / "ddp-by-4"),
            (values | FSDP, tmp_path / "fsdp-by-4"),
            (values | HSDP, tmp_path / "hsdp-stopped", STOP),
        ],
    )
    train(values, tmp_path / "ddp-stopped")
    shutil.rmtree(tmp_path / "fsdp-stopped")
    train(values, tmp_path / "hsdp-stopped")
    for name in (*layouts, "hsdp", "ddp-by-4", "fsdp-by-4", "ddp-stopped", "hsdp-stopped"):
        assert_same(tmp_path / name, tmp_path / "whole")


@pytest.mark.slow
def test_two_players_go_on_with_another_number_of_ranks(values: dict, tmp_path: Path, checkpoint: Path) -> None:
    stage2 = values | {
        "stage": 2,
        "model": {"init": str(checkpoint)},
        "losses": {"alpha_p": 0, "alpha_g": 0.2, "commitment": 0.2},
        "optimizer": {"lr": 1e-3, "eps": 1e-2, "clip": 0.5},
        "discriminator": {"channels": 8, "layers": 2, "r1": 0.2, "r1_every": 2, "lecam": 0.1, "start": 1},
    }
    train(stage2, tmp_path / "whole")
    on_ranks(
        2,
        train,
        [
            (stage2 | FSDP | EXACT, tmp_path / "fsdp"),
            (stage2 | DDP, tmp_path / "ddp-stopped", STOP),
            (stage2 | FSDP, tmp_path / "fsdp-stopped", STOP),
        ],
    )
    train(stage2, tmp_path / "fsdp-stopped")
    on_ranks(3, train, [(stage2 | FSDP, tmp_path / "ddp-stopped")])
    for name in ("fsdp", "ddp-stopped", "fsdp-stopped"):
        assert_same(tmp_path / name, tmp_path / "whole", ("model", "ema", "optimizer", "discriminator", "lecam"))


def final(folder: Path) -> Path:
    return folder / f"checkpoints/step-{STEPS:08d}"


def assert_same(folder: Path, whole: Path, groups: tuple[str, ...] = ("model", "ema", "optimizer", "usage")) -> None:
    """Each sample once, and the losses of every step, weights, averages, optimizer, and what the model gives."""
    name = folder.name
    assert consumed(folder) == consumed(whole), name
    ours, theirs = losses(folder), losses(whole)
    assert len(ours) == len(theirs) == STEPS
    for line, expected in zip(ours, theirs, strict=True):
        assert line.keys() == expected.keys()
        assert line == pytest.approx(expected, rel=2e-4, abs=1e-6), f"{name} at step {line['step']}"
    for group in groups:
        assert_close(stored(folder, group), stored(whole, group), f"{name}: {group}")
    QLIPModel.from_pretrained(final(folder))
    found, expected = (json.loads((one / "features.json").read_text()) for one in (folder, whole))
    for way, numbers in expected.items():
        assert found[way] == pytest.approx(numbers, rel=1e-3, abs=1e-4), f"{name}: {way}"


def consumed(folder: Path) -> list[list[str]]:
    """The keys of each step, of whichever ranks took it."""
    steps: dict[int, dict[int, list[str]]] = {step: {} for step in range(STEPS)}
    for path in folder.glob("keys-*.jsonl"):
        for line in path.read_text().splitlines():
            step, keys = json.loads(line)
            rank = int(path.stem.split("-")[1])
            assert rank not in steps[step], f"{folder.name}: rank {rank} took step {step} twice"
            steps[step][rank] = keys
    found = [[key for rank in sorted(ranks) for key in ranks[rank]] for ranks in steps.values()]
    assert_once_an_epoch(found)
    whole = [step for step, keys in enumerate(found) if len(keys) == BATCH]
    assert whole == [step for step in range(STEPS) if step not in (EMPTY, EMPTY_SHARE)]
    return found


def assert_once_an_epoch(steps: list[list[str]]) -> None:
    """A batch that crosses an epoch's border may hold a key twice, once of either epoch; an epoch holds it once."""
    epochs: dict[int, list[str]] = {}
    for step, keys in enumerate(steps):
        for place, key in enumerate(keys, BATCH - len(keys)):  # what is left out of a batch is its first places
            epochs.setdefault((step * BATCH + place) // IMAGES, []).append(key)
    for epoch, keys in epochs.items():
        assert len(set(keys)) == len(keys), f"epoch {epoch} took {len(keys) - len(set(keys))} twice"
    assert len(epochs[0]) == len(epochs[1]) == IMAGES, "no step of these is empty"


def losses(folder: Path) -> list[dict[str, float]]:
    timing = ("samples_per_s", "data_wait", "peak_memory_gib", "seconds_left")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timing} for line in lines]


def stored(folder: Path, group: str) -> dict[str, Tensor]:
    return read_whole(final(folder) / "training", group)


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], name: str) -> None:
    """To 1e-4 of a tensor's largest number: two orders below what any wrong share or scale would do."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        largest = float(value.double().abs().max().clamp_min(1e-3))
        error = float((ours[key].double() - value.double()).abs().max()) / largest
        assert error < 1e-4, f"{name}: {key} differs by {error:.1e}"


def assert_sharded(folder: Path, ranks: int) -> None:
    """Every rank wrote its own rows, and what the checkpoint exports is whole all the same."""
    checkpoint = folder / f"checkpoints/step-{STOP:08d}"
    entries = read_index(checkpoint / "training")
    matrix = entries["optimizer/model.0/vision_model.encoder.layers.0.mlp.w1.weight/exp_avg"]
    assert [piece.offset for piece in matrix.pieces] == [(64 // ranks * rank, 0) for rank in range(ranks)]
    assert [piece.file for piece in matrix.pieces] == [
        f"optimizer.rank-{rank:05d}.safetensors" for rank in range(ranks)
    ]
    exported = QLIPModel.from_pretrained(checkpoint).state_dict()
    averages = read_whole(checkpoint / "training", "ema")
    assert all((exported[name] == value).all() for name, value in averages.items() if name != "updates")
