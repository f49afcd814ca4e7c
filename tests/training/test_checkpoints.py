"""Checkpoints on one process: whole or not at all, a damaged file is named, and training does not wait for the disk."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlip import QLIPError, QLIPModel, QLIPProcessor
from qlip.training.optim.ema import EMA
from qlip.training.parallel.distributed import Parallel
from qlip.training.recipe import check_recipe
from qlip.training.recipe_schema import CheckpointSection
from qlip.training.state import dcp_safetensors as storage
from qlip.training.state.checkpoints import Checkpoints
from qlip.training.state.train_state import collect
from qlip.training.tasks import Stage1
from qlip.training.tasks.recipe import Stage1Recipe


class Bench:
    """A task that has taken a step, its averages, and a place for checkpoints."""

    def __init__(self, values: dict, checkpoint: Path, folder: Path, asynchronous: bool = False) -> None:
        recipe = check_recipe(values, "test")
        assert isinstance(recipe, Stage1Recipe)
        model = QLIPModel.from_pretrained(checkpoint).train()
        self.task = Stage1(model, QLIPProcessor.from_pretrained(checkpoint), recipe)
        self.ema = EMA(model, 0.9)
        self.step(0)
        self.checkpoints = Checkpoints(
            folder / "checkpoints", CheckpointSection(keep=2, asynchronous=asynchronous), Parallel(recipe)
        )

    def step(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        (phase,) = self.task.phases
        for parameter in phase.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in phase.optimizers:
            optimizer.step()
        self.ema.update()

    def save(self, step: int) -> Path:
        self.checkpoints.save(step, self.task, self.ema, {"step": step})
        return self.checkpoints.folder / f"step-{step:08d}"

    def everything(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in collect(self.task, self.ema).items()}


@pytest.fixture
def bench(recipe_values: dict, checkpoint: Path, tmp_path: Path) -> Bench:
    return Bench(recipe_values, checkpoint, tmp_path)


def test_everything_comes_back_and_users_load_the_averages(
    bench: Bench, recipe_values: dict, checkpoint: Path, tmp_path: Path
) -> None:
    bench.step(1)
    path, expected = bench.save(2), bench.everything()
    other = Bench(recipe_values, checkpoint, tmp_path)
    assert other.checkpoints.load(path, other.task, other.ema) == {"step": 2}
    found = other.everything()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    exported, averages = QLIPModel.from_pretrained(path).state_dict(), bench.ema.weights()
    assert all(torch.equal(exported[name], tensor) for name, tensor in averages.items())
    QLIPProcessor.from_pretrained(path)
    # what is not an image of the vocabulary is safetensors or JSON
    assert {file.suffix for file in (path / "training").iterdir()} == {".safetensors", ".json"}


def test_the_newest_stay(bench: Bench) -> None:
    for step in (1, 2, 3, 3):
        bench.save(step)
    assert [path.name for path in bench.checkpoints.all()] == ["step-00000002", "step-00000003"]
    assert bench.checkpoints.latest() == bench.checkpoints.folder / "step-00000003"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "ema.safetensors", "usage.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_a_damaged_file_is_named(bench: Bench, file: str, damage: str) -> None:
    path = bench.save(1)
    damaged = path / "training" / file
    if damage == "flip":  # a single bit, which the format itself does not notice
        flip(damaged)
    elif damage == "cut":
        damaged.write_bytes(damaged.read_bytes()[:-7])
    else:
        damaged.unlink()
    with pytest.raises(QLIPError) as raised:
        bench.checkpoints.load(path, bench.task, bench.ema)
    said = str(raised.value)
    assert str(damaged) in said and f"delete {path}" in said and "\n" not in said


@pytest.mark.parametrize("file", ["index.json", "state.json"])
def test_damaged_json_is_named(bench: Bench, file: str) -> None:
    path = bench.save(1)
    (path / "training" / file).write_text('{"tensors": {"model/x": ')
    with pytest.raises(QLIPError, match=file):
        bench.checkpoints.load(path, bench.task, bench.ema)


def test_an_index_reads_no_file_outside_its_folder(bench: Bench) -> None:
    path = bench.save(1)
    index = path / "training/index.json"
    values = json.loads(index.read_text())
    next(iter(values["tensors"].values()))["pieces"][0]["file"] = "../../elsewhere.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(QLIPError, match=r"index\.json: damaged"):
        bench.checkpoints.load(path, bench.task, bench.ema)


@pytest.mark.parametrize("dtype", ["nn", "Tensor", "flaot32", 32])
def test_an_index_names_nothing_but_dtypes(bench: Bench, dtype: object) -> None:
    path = bench.save(1)
    index = path / "training/index.json"
    values = json.loads(index.read_text())
    for entry in values["tensors"].values():
        entry["dtype"] = dtype
    index.write_text(json.dumps(values))
    said = rf"index\.json: damaged .*{dtype}.*; delete .*step-00000001 to resume"
    with pytest.raises(QLIPError, match=said) as raised:
        bench.checkpoints.load(path, bench.task, bench.ema)
    assert "\n" not in str(raised.value)


def test_another_model_is_refused(bench: Bench, recipe_values: dict, checkpoint: Path, tmp_path: Path) -> None:
    path = bench.save(1)
    with pytest.raises(QLIPError, match=r"holds another model \(has 'ema/.*choose another run folder"):
        bench.checkpoints.load(path, bench.task, None)
    siglip = recipe_values | {"losses": {"align": {"kind": "siglip"}}}
    with pytest.raises(QLIPError, match=r"holds another model \(lacks 'extra/siglip_bias'\)"):
        bench.checkpoints.load(path, Bench(siglip, checkpoint, tmp_path).task, bench.ema)


def test_training_goes_on_while_a_checkpoint_is_written(
    recipe_values: dict, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk stands still, the next steps do not; what is stored is of the step that was saved, and whole."""
    bench, disk = Bench(recipe_values, checkpoint, tmp_path, asynchronous=True), threading.Event()
    original = storage.save_file

    def slow(*arguments: object) -> None:
        assert disk.wait(60)
        original(*arguments)

    monkeypatch.setattr(storage, "save_file", slow)
    expected, state = bench.everything(), {"values": [1]}
    bench.checkpoints.save(1, bench.task, bench.ema, state)
    for seed in (1, 2, 3):
        bench.step(seed)
    state["values"].append(2)
    assert bench.checkpoints.all() == [] and not bench.checkpoints.failed
    disk.set()
    bench.checkpoints.wait()
    (path,) = bench.checkpoints.all()
    assert bench.checkpoints.load(path, bench.task, bench.ema) == {"values": [1]}
    found = bench.everything()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_save_that_failed_in_the_background_is_told_at_the_next_moment(
    recipe_values: dict, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(recipe_values, checkpoint, tmp_path, asynchronous=True)
    bench.save(1)
    bench.checkpoints.wait()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    bench.save(2)
    with pytest.raises(
        QLIPError, match=r"step-00000002: cannot save \(No space left .*last complete .*step-00000001; free"
    ):
        bench.checkpoints.wait()
    assert [path.name for path in bench.checkpoints.folder.iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    bench.save(2)
    bench.checkpoints.wait()
    assert len(bench.checkpoints.all()) == 2


LIMITED = """
import resource, sys
from rich.console import Console
from qlip.training import load_recipe, run
recipe = load_recipe(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
from pathlib import Path
run(recipe, Path(sys.argv[2]), Console(file=sys.stderr))
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limits on files")
def test_the_system_refuses_to_write_more(recipe_file: Path, tmp_path: Path) -> None:
    """A real refusal in the middle of a file, not one of ours: the optimizer's file is the largest."""
    limit = 300_000
    command = [sys.executable, "-c", LIMITED, str(recipe_file), str(tmp_path / "run"), str(limit)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    last = ran.stderr.strip().splitlines()[-1]
    assert "cannot save" in last and "File too large" in last and "there is no earlier checkpoint" in last
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_what_an_interrupted_save_left_is_removed(bench: Bench, recipe_values: dict, tmp_path: Path) -> None:
    path = bench.save(1)
    shutil.copytree(path, path.with_name(".part-00000002"))
    Checkpoints(bench.checkpoints.folder, CheckpointSection(keep=2), Parallel(check_recipe(recipe_values, "test")))
    assert [one.name for one in bench.checkpoints.folder.iterdir()] == ["step-00000001"]


@pytest.fixture
def moments(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Grows by what a kill would leave: before each rename, and before, within and after each removal of a folder."""
    found: list[Path] = []
    rename, remove, number = os.replace, shutil.rmtree, itertools.count()

    def look() -> None:
        found.append(shutil.copytree(bench.checkpoints.folder, tmp_path / f"moment-{next(number):02d}"))

    def looked_at(source: Path, target: Path) -> None:
        if Path(target).parent == bench.checkpoints.folder:
            look()
        rename(source, target)

    def in_pieces(path: Path, ignore_errors: bool = False) -> None:
        look()
        (path / "training/model.safetensors").unlink()
        look()
        remove(path)
        look()

    monkeypatch.setattr(os, "replace", looked_at)
    monkeypatch.setattr(shutil, "rmtree", in_pieces)
    return found


@pytest.mark.parametrize(
    ("saved", "last", "least"),
    [((1, 2), 3, 2), ((1, 2), 2, 2), ((1,), 1, 1)],
    ids=["the oldest goes", "the newest is replaced", "the only one is replaced"],
)
def test_a_kill_at_any_moment_leaves_whole_checkpoints(
    bench: Bench,
    recipe_values: dict,
    moments: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    saved: tuple[int, ...],
    last: int,
    least: int,
) -> None:
    """What the next start lists can be read, the newest is there, and nothing else is left."""
    for step in saved:
        bench.save(step)
    moments.clear()
    bench.save(last)
    monkeypatch.undo()
    assert len(moments) > 3  # or nothing was looked at
    for moment in moments:
        again = Checkpoints(moment, CheckpointSection(keep=2), Parallel(check_recipe(recipe_values, "test")))
        whole = again.all()
        assert whole and whole[-1].name >= f"step-{least:08d}", moment
        assert sorted(moment.iterdir()) == whole
        for path in whole:
            assert again.load(path, bench.task, bench.ema) == {"step": int(path.name[5:])}


def test_a_checkpoint_that_cannot_be_replaced_stays(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = bench.save(1), os.replace

    def refuse(source: Path, target: Path) -> None:
        if target == path and ".part-" in source.name:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(QLIPError, match=r"cannot save \(Input/output error\); the last complete .*step-00000001; free"):
        bench.save(1)
    monkeypatch.undo()
    assert list(bench.checkpoints.folder.iterdir()) == [path]
    assert bench.checkpoints.load(path, bench.task, bench.ema) == {"step": 1}


def test_a_tensor_is_put_together_from_the_rows_of_ranks(tmp_path: Path) -> None:
    """As `read_whole` does for what is exported; a missing row would be a missing file, which is named."""
    whole = torch.arange(12.0).reshape(6, 2)
    pieces = []
    for rank, (start, stop) in enumerate(((0, 4), (4, 6))):
        file = f"model.rank-{rank:05d}.safetensors"
        save_file({"weight": whole[start:stop].clone()}, tmp_path / file)
        shape = [stop - start, 2]
        crc = storage.crc32(whole[start:stop].contiguous())
        pieces.append({"file": file, "offset": [start, 0], "shape": shape, "crc32": crc})
    entry = {"dtype": "float32", "shape": [6, 2], "pieces": pieces}
    (tmp_path / "index.json").write_text(json.dumps({"tensors": {"model/weight": entry}}))
    assert torch.equal(storage.read_whole(tmp_path, "model")["weight"], whole)
    assert torch.equal(load_file(tmp_path / "model.rank-00001.safetensors")["weight"], whole[4:])
    (tmp_path / "model.rank-00001.safetensors").unlink()
    with pytest.raises(QLIPError, match=r"rank-00001\.safetensors: damaged or missing"):
        storage.read_whole(tmp_path, "model")
