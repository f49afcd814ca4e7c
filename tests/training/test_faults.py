"""What goes wrong is agreed on by all ranks before anything moves, and said in one line by one of them."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import distributed as dist

from qlip import QLIPError
from qlip.data.loader.batch import SkippedSample
from qlip.runtime.machine import STOP_SIGNALS
from qlip.training import load_recipe, run, signals
from qlip.training.log.runlog import SilentLog
from qlip.training.parallel.distributed import Parallel
from qlip.training.parallel.faults import CollectiveError, Reasons, Spikes, is_about_a_peer, is_about_the_device
from qlip.training.recipe import check_recipe
from qlip.training.recipe_schema import SpikeSection
from qlip.training.state import dcp_safetensors as storage
from qlip.training.state.checkpoints import Checkpoints
from qlip.training.tasks.build import build_model, build_processor, build_task, open_training_feed
from qlip.training.tasks.recipe import AnyRecipe
from qlip.training.trainer import Trainer
from tests.training.ranks import on_ranks
from tests.training.training_runs import OtherFeed


def test_a_spike_stands_out_from_the_accepted_steps_of_a_full_window() -> None:
    spikes = Spikes(SpikeSection(factor=3, window=2, limit=5))
    assert spikes.ratio("model", 1e9) is None  # nothing to compare with
    spikes.record("model", 1.0, skipped=False)
    assert spikes.ratio("model", 1e9) is None
    spikes.record("model", 2.0, skipped=False)
    assert spikes.ratio("model", 4.5) is None and spikes.ratio("model", 6.0) == 4.0
    assert spikes.ratio("discriminator", 6.0) is None  # each phase has its own norms
    assert [spikes.record("model", 6.0, skipped=True) for _ in range(2)] == [1, 2]
    assert spikes.ratio("model", 6.0) == 4.0  # a skipped norm is no part of the mean
    again = Spikes(SpikeSection(factor=3, window=2, limit=5))
    again.load(json.loads(json.dumps(spikes.state())))
    assert again.ratio("model", 6.0) == 4.0 and again.record("model", 6.0, skipped=True) == 3
    assert again.record("model", 3.0, skipped=False) == 0
    assert again.ratio("model", 8.0) == 8.0 / 2.5
    assert Spikes(None).ratio("model", 1e30) is None


def test_spikes_are_skipped_said_and_counted_until_there_are_too_many(recipe_file: Path, tmp_path: Path) -> None:
    """With a factor that ordinary steps exceed; a skipped step changes nothing but the count."""
    spiky = ["spikes.factor=1.0001", "spikes.window=1", "log.every=1", "checkpoint.every=1", "checkpoint.keep=30"]
    with (tmp_path / "said").open("w") as said:
        run(load_recipe(str(recipe_file), [*spiky, "spikes.limit=24"]), tmp_path / "run", Console(file=said))
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    skipped = [line["step"] for line in lines if line["skipped"]]
    assert 0 < len(skipped) < 24
    assert (tmp_path / "said").read_text().count("update skipped") == len(skipped)
    weights = {step: weights_at(tmp_path / "run", step) for step in range(1, 25)}
    for step in range(2, 25):
        same = all(torch.equal(weights[step][name], weights[step - 1][name]) for name in weights[step])
        assert same == (step in skipped)
    with pytest.raises(QLIPError, match=r"step \d+: 1 consecutive updates skipped \(spikes.limit\).*resume from"):
        run(load_recipe(str(recipe_file), [*spiky, "spikes.limit=1"]), tmp_path / "other", Console(quiet=True))


def weights_at(folder: Path, step: int) -> dict[str, torch.Tensor]:
    from qlip.training.state.dcp_safetensors import read_whole

    return read_whole(folder / f"checkpoints/step-{step:08d}/training", "model")


def test_errors_about_a_peer_are_told_from_errors_of_ones_own() -> None:
    assert is_about_a_peer(RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:1"))
    assert is_about_a_peer(dist.DistBackendError("NCCL communicator was aborted on rank 1."))
    assert not is_about_a_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_about_a_peer(QLIPError("the store of images timed out"))


def test_silence_is_explained_by_one_rank_and_only_where_nobody_else_speaks(tmp_path: Path) -> None:
    gone = RuntimeError("Connection closed by peer\nand more")
    store = dist.HashStore()
    ranks = [Reasons(store, rank, 3, patience=0.05) for rank in range(3)]
    assert ranks[0].explain_silence(gone) == (
        "no answer from rank 1, 2: killed, out of memory, or cut off (Connection closed by peer)"
    )
    assert ranks[2].explain_silence(gone) is None  # the first has said it
    store = dist.HashStore()
    ranks = [Reasons(store, rank, 2, patience=0.05) for rank in range(2)]
    ranks[1].give("the disk is gone")
    assert ranks[0].explain_silence(gone) is None


def test_what_had_moved_before_the_second_player_failed_is_said(recipe_values: dict, tmp_path: Path) -> None:
    """The generator steps before the discriminator looks at what it then makes."""
    gan = {"channels": 8, "layers": 2, "r1": 1e300, "r1_every": 1}
    values = recipe_values | {"stage": 2, "losses": {"alpha_p": 0}, "discriminator": gan}
    with pytest.raises(QLIPError) as raised:
        run(check_recipe(values, "test"), tmp_path / "run", Console(quiet=True))
    said = str(raised.value)
    assert said.startswith("step 1: the discriminator's loss is ") and "\n" not in said
    assert "; the model had already been updated, the discriminator was not; lower the learning rate" in said
    assert "resume from the start" in said and "nothing" not in said


def test_a_damaged_state_is_said_in_one_line(recipe_values: dict, tmp_path: Path) -> None:
    values = recipe_values | {"schedule": {"steps": 2}, "checkpoint": {"every": 1, "keep": 2}}
    recipe = check_recipe(values, "test")
    run(recipe, tmp_path / "run", Console(quiet=True))
    latest = tmp_path / "run/checkpoints/step-00000002"
    path = latest / "training/state.json"
    whole = json.loads(path.read_text())
    (rng,) = whole["rng"]
    damages: list[dict[str, Any]] = [{"rng": []}, {"rng": [[]]}, {"rng": [[rng[0][:-2]]]}, {"rng": [["x"]]}]
    damages += [{"spikes": []}, {"spikes": {"norms": [], "skipped": {}}}, {"window": 3}]
    spiky = recipe.model_copy(update={"spikes": SpikeSection(factor=3)})
    for damage in damages:
        path.write_text(json.dumps(whole | damage))
        with pytest.raises(QLIPError) as raised:
            resume(spiky, latest.parent)
        said = str(raised.value)
        assert said.startswith(f"{latest}: its state is damaged (") and "\n" not in said, damage
        assert said.endswith("delete it to resume from the previous one")
    path.write_text(json.dumps(whole))
    assert resume(spiky, latest.parent).progress.step == 2


def test_a_fault_of_the_device_is_no_damage(
    recipe_values: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = check_recipe(recipe_values | {"schedule": {"steps": 1}}, "test")
    run(recipe, tmp_path / "run", Console(quiet=True))

    def out_of_memory(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(torch, "set_rng_state", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        resume(recipe, tmp_path / "run/checkpoints")
    assert is_about_the_device(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_about_the_device(RuntimeError("RNG state is wrong size"))
    assert not is_about_the_device(QLIPError("an image of a CUDA error"))


def test_why_training_ended_is_said_though_the_last_save_failed_too(
    recipe_values: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save of step 1 fails while step 2 is under way, whose loss is not finite."""
    recipe = check_recipe(recipe_values | {"checkpoint": {"every": 1, "asynchronous": True}}, "test")
    second = threading.Event()

    def full(*given: object) -> None:
        second.wait(60)
        raise OSError(28, "No space left on device")

    def open_batches(state: Any, rank: int, world: int) -> Iterator[Any]:
        for number, (batch, own) in enumerate(feed.open(state, rank=rank, world=world)):
            if number == 1:
                batch.pixel_values[0, 0, 0, 0] = float("nan")
                second.set()
            yield batch, own

    processor, parallel = build_processor(recipe, tmp_path), Parallel(recipe)
    feed = open_training_feed(recipe, processor.preprocessing, processor.tokenizer)
    task = build_task(recipe, build_model(recipe, processor), processor, parallel.wrap)
    checkpoints = Checkpoints(tmp_path / "checkpoints", recipe.checkpoint, parallel)
    trainer = Trainer(task, recipe, parallel, checkpoints, OtherFeed(feed, open_batches), lambda step: SilentLog())
    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(CollectiveError) as raised:
        trainer.run()
    said = str(raised.value)
    assert said.startswith("step 2: the model's loss is nan (") and "resume from the start (" in said
    assert "step-00000001: cannot save (No space left on device)" in said and "\n" not in said


def test_signals_are_not_heard_while_an_error_is_said_and_then_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    before = {one: signal.signal(one, lambda number, _: heard.append(number)) for one in STOP_SIGNALS}
    own = {one: signal.getsignal(one) for one in STOP_SIGNALS}
    clock = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    try:
        with pytest.raises(ValueError), signals.Signals(lambda line: None, ignore_after_error=True):
            raise ValueError
        assert signal.getsignal(signal.SIGINT) is own[signal.SIGINT]
        signal.raise_signal(signal.SIGTERM)
        assert heard == []
        clock[0] += signals.IGNORE_SECONDS
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is own[signal.SIGTERM]
        with pytest.raises(ValueError), signals.Signals(lambda line: None):
            raise ValueError
        signal.raise_signal(signal.SIGUSR1)
        assert heard == [signal.SIGTERM, signal.SIGUSR1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume(recipe: AnyRecipe, folder: Path) -> Trainer:
    """A run that has read its last checkpoint, and goes no further."""
    processor, parallel = build_processor(recipe, folder), Parallel(recipe)
    task = build_task(recipe, build_model(recipe, processor), processor, parallel.wrap)
    checkpoints = Checkpoints(folder, recipe.checkpoint, parallel)
    return Trainer(task, recipe, parallel, checkpoints, OtherFeed(None, lambda *_: iter(())), lambda step: SilentLog())


STEPS = 3


def train(values: dict[str, Any], folder: Path, fault: str) -> None:
    """Three steps on two ranks, with a fault at the second on rank 1 alone; each rank stores how it ended."""
    recipe = check_recipe(values, "test")
    torch.manual_seed(recipe.seed)
    ended = "whole"
    trained: dict[str, torch.Tensor] = {}
    try:
        with Parallel(recipe) as parallel:
            processor = build_processor(recipe, folder)
            model = build_model(recipe, processor)
            feed = open_training_feed(recipe, processor.preprocessing, processor.tokenizer)

            def open_batches(state: Any, rank: int, world: int) -> Iterator[Any]:
                for number, (batch, own) in enumerate(feed.open(state, rank=rank, world=world)):
                    if number == 1 and rank == 1:
                        trained.update({name: value.clone() for name, value in model.state_dict().items()})
                        if fault == "nan":
                            batch.pixel_values[0, 0, 0, 0] = float("nan")
                        elif fault == "broken":
                            skipped = [SkippedSample(f"{name}.jpg", "photos", "not an image") for name in "bca"]
                            batch = replace(batch, skipped=skipped)
                    yield batch, own

            checkpoints = Checkpoints(folder / "checkpoints", recipe.checkpoint, parallel)
            task = build_task(recipe, model, processor, parallel.wrap)
            log = lambda step: SilentLog()  # noqa: E731
            Trainer(task, recipe, parallel, checkpoints, OtherFeed(feed, open_batches), log).run()
    except QLIPError as error:
        ended = f"error: {error}"
    except SystemExit as left:
        ended = f"silent: {left.code}"
    if trained and fault == "nan":
        assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    (folder / f"ended-{os.environ['RANK']}").write_text(ended)


def test_two_ranks_end_alike_and_the_first_says_why(recipe_values: dict, tmp_path: Path) -> None:
    values = recipe_values | {"schedule": {"steps": STEPS}, "log": {"images_every": 0, "tensorboard": False}}
    few = values | {"skip_limit": 2}
    folders = {name: tmp_path / name for name in ("nan", "few", "many")}
    for folder in folders.values():
        folder.mkdir()
    calls = [(values, folders["nan"], "nan"), (few, folders["few"], "broken"), (values, folders["many"], "broken")]
    on_ranks(2, train, calls)
    ended = {name: [(folder / f"ended-{rank}").read_text() for rank in range(2)] for name, folder in folders.items()}
    assert ended["nan"][0].startswith("error: step 2: the model's loss is nan (") and ended["nan"][1] == "silent: 1"
    assert "nothing was updated" in ended["nan"][0]
    assert ended["few"] == [
        "error: 3 images cannot be read, the limit is 2 (skip_limit); the last was a.jpg of photos: not an image;"
        " repair or remove them, or raise skip_limit",
        "silent: 1",
    ]
    assert ended["many"] == ["whole", "whole"]
    state = json.loads((folders["many"] / f"checkpoints/step-{STEPS:08d}/training/state.json").read_text())
    assert state["broken"] == 3  # of rank 1, in the state that the first rank wrote
