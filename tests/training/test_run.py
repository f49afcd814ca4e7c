from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from qlip import QLIPError, QLIPModel, QLIPProcessor, assets
from qlip.data.loader.batch import Batch
from qlip.training import load_recipe, run
from qlip.training.accumulate import backward
from qlip.training.recipe import check_recipe
from qlip.training.tasks import Stage1
from qlip.training.tasks.recipe import Stage1Recipe

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115 (lives as long as the tests)


def start(recipe: Path, folder: Path, *overrides: str, code: str = "") -> subprocess.Popen[str]:
    """`qlip train` in a process of its own; `code` runs before it."""
    script = f"import sys\n{code}\nif __name__ == '__main__':\n    from qlip.cli.main import main\n    main()\n"
    path = folder.parent / f"start-{folder.name}.py"
    path.write_text(script)
    command = [sys.executable, str(path), "train", str(recipe), *overrides, "-o", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def log_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    timing = ("samples_per_s", "data_wait", "peak_memory_gib", "seconds_left", "mfu")
    return [{key: value for key, value in line.items() if key not in timing} for line in lines]


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    """Weights and optimizer bit for bit, and the log line for line."""
    assert (folder / "model/model.safetensors").read_bytes() == (undisturbed / "model/model.safetensors").read_bytes()
    name = "checkpoints/step-00000024/training/optimizer.safetensors"
    ours, theirs = load_file(folder / name), load_file(undisturbed / name)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert log_of(folder) == log_of(undisturbed)
    assert [line["step"] for line in log_of(folder)] == [3, 6, 9, 12, 15, 18, 21, 24]


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_run_is_the_same(recipe_file: Path, tmp_path: Path, optimizer: str) -> None:
    """kill -9 anywhere, with two loader workers, tar shards and augmentation: the same weights, no line twice."""
    options = ["data.num_workers=2", f"optimizer.name={optimizer}", "checkpoint.every=1"]
    finished(start(recipe_file, tmp_path / "whole", *options))
    moments, kills = random.Random(optimizer), 0
    for attempt in range(12):
        process = start(recipe_file, tmp_path / "killed", *options)
        steps_before = set((tmp_path / "killed/checkpoints").glob("step-*"))
        allowed = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < allowed:
            # let it take at least one step, so that the test ends; then any moment will do
            if attempt < 6 and set((tmp_path / "killed/checkpoints").glob("step-*")) - steps_before:
                time.sleep(moments.random() * 0.3)
                process.kill()
                break
            time.sleep(0.01)
        output, _ = process.communicate(timeout=300)
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output
    assert kills >= 2
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


DYING = """
import os, signal
from qlip.training.state import {module} as module
calls = 0
original = module.{function}
def dying(*arguments, **keywords):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **keywords)
module.{function} = dying
"""


@pytest.mark.parametrize(
    ("module", "function", "call"),
    [
        ("dcp_safetensors", "save_file", 5),
        pytest.param("checkpoints", "read_whole", 3, marks=pytest.mark.slow),
        ("checkpoints", "flush", 12),
    ],
)
def test_killed_while_a_checkpoint_is_written(
    recipe_file: Path, tmp_path: Path, module: str, function: str, call: int
) -> None:
    whole = start(recipe_file, tmp_path / "whole")  # meanwhile
    dying = DYING.format(module=module, function=function, call=call)
    process = start(recipe_file, tmp_path / "killed", code=dying)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert list((tmp_path / "killed/checkpoints").glob(".part-*"))
    finished(start(recipe_file, tmp_path / "killed"))
    finished(whole)
    assert not list((tmp_path / "killed/checkpoints").glob(".part-*"))
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(recipe_file: Path, tmp_path: Path, number: signal.Signals) -> None:
    options = ["schedule.steps=100000", "checkpoint.every=100000", "log.every=1"]
    process = start(recipe_file, tmp_path / "run", *options)
    log = tmp_path / "run/log.jsonl"
    allowed = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 2) and time.monotonic() < allowed:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert number.name in output and "run the same command to continue" in output and "Traceback" not in output
    saved = sorted((tmp_path / "run/checkpoints").glob("step-*"))
    assert len(saved) == 1
    QLIPModel.from_pretrained(saved[0])


def test_a_run_leaves_everything_to_trace_it_by(recipe_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outcome = run(load_recipe(str(recipe_file), ["log.images_every=12", "log.images=3"]), folder, QUIET)
    assert outcome.finished and outcome.step == 24
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["optimizer"]["betas"] == [0.9, 0.95]
    session = json.loads((folder / "sessions.json").read_text())[0]
    assert session["packages"]["torch"] == torch.__version__ and "git" in session
    assert {path.name for path in (folder / "pictures").iterdir()} == {"step-00000012.png", "step-00000024.png"}
    assert [path.name for path in sorted((folder / "checkpoints").glob("step-*"))] == ["step-00000020", "step-00000024"]
    first, *_, last = log_of(folder)
    assert last["mse"] < first["mse"]
    assert {"mse", "bsq", "align", "codebook_use", "gradient_norm", "rate", "samples"} <= last.keys()
    # what it exports is what everything else loads
    model, processor = QLIPModel.from_pretrained(outcome.model), QLIPProcessor.from_pretrained(outcome.model)
    pixels = torch.randn(1, 3, 32, 32)
    assert model.decode(model.encode(pixels)).shape == pixels.shape
    assert processor(text="a cat")["input_ids"].shape == (1, 16)
    # a finished run has nothing left to do, and says so by doing nothing
    assert run(load_recipe(str(recipe_file), ["log.images_every=12", "log.images=3"]), folder, QUIET).finished
    assert len(log_of(folder)) == 8


def test_another_recipe_does_not_go_on_in_the_same_folder(recipe_file: Path, tmp_path: Path) -> None:
    run(load_recipe(str(recipe_file)), tmp_path / "run", QUIET)
    with pytest.raises(QLIPError, match=r"another recipe: losses\.alpha_a \(1\.0, now 2\.0\);"):
        run(load_recipe(str(recipe_file), ["losses.alpha_a=2"]), tmp_path / "run", QUIET)
    run(load_recipe(str(recipe_file), ["checkpoint.keep=3", "data.num_workers=1"]), tmp_path / "run", QUIET)


def test_run__claims_its_folder_when_the_first_batch_is_read(recipe_file: Path, shards: str, tmp_path: Path) -> None:
    """A corrected recipe uses the folder, and nothing of the first one: here another vocabulary."""
    fresh = ["model={config: debug-B-16}", "schedule.steps=1", "schedule.warmup=0", "micro_batch_size=null"]
    folder = tmp_path / "run"
    with pytest.raises(QLIPError, match="nowhere"):
        run(load_recipe(str(recipe_file), [*fresh, "data.sources.0.path=nowhere"]), folder, QUIET)
    assert not (folder / "recipe.yaml").exists()
    (folder / "vocabulary").mkdir()
    (folder / "vocabulary/tokenizer_config.json").write_text("of another recipe")  # killed before the first batch
    small = ["vocabulary.size=530", *fresh]
    run(load_recipe(str(recipe_file), small), folder, QUIET)
    with pytest.raises(QLIPError, match=r"another recipe: vocabulary.size \(530, now 540\), data.sources.0.flip "):
        run(load_recipe(str(recipe_file), [*fresh, "vocabulary.size=540", "data.sources.0.flip=0.1"]), folder, QUIET)


def test_a_loss_that_is_not_finite_changes_nothing(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(QLIPError, match=r"step 1: the model's loss is .*nothing was updated"):
        run(load_recipe(str(recipe_file), ["losses.alpha_r=1.0e+300"]), tmp_path / "run", QUIET)
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(str(recipe_file))
    from qlip.training.state import dcp_safetensors as storage

    original, calls = storage.save_file, []

    def full(*arguments: object, **keywords: object) -> None:
        calls.append(1)
        if len(calls) == 7:  # three files a checkpoint
            raise OSError(28, "No space left on device")
        original(*arguments, **keywords)

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(QLIPError, match=r"No space left on device.*last complete checkpoint is .*step-00000010"):
        run(recipe, tmp_path / "run", QUIET)
    monkeypatch.undo()
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == [
        "step-00000005",
        "step-00000010",
    ]
    assert run(recipe, tmp_path / "run", QUIET).finished


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of eight captioned photographs and one file that is no image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in assets.path("images").glob("*.jpg"):
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / f"{path.stem}.txt").write_text(f"a photo of a {path.stem}")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff not an image")
    return folder


def test_run__says_that_a_cpu_has_no_bfloat16(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(str(recipe_file), ["schedule.steps=1", "optimizer={name: muon, muon_precision: bfloat16}"])
    for has, count in ((False, 1), (True, 0)):
        monkeypatch.setattr(sys.modules[run.__module__], "multiplies_bfloat16", lambda device, has=has: has)
        assert run(recipe, tmp_path / str(has)).finished
        note = "this CPU has no bfloat16 (avx512_bf16, AMX): with optimizer.muon_precision=float32 a step"
        assert " ".join(capsys.readouterr().err.split()).count(note) == count


def test_skip_limit__counts_images_not_their_occurrences(
    recipe_file: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"data.sources=[{{path: '{photos}'}}]"]
    outcome = run(load_recipe(str(recipe_file), [*options, "skip_limit=1"]), tmp_path / "run")
    state = json.loads((tmp_path / "run/checkpoints/step-00000024/training/state.json").read_text())
    assert outcome.finished and state["broken"] == 144 // 9 and state["samples"] == 144 - 16
    said = capsys.readouterr().err
    assert said.count(f"broken.jpg of {photos}:") == 2  # when it comes first, and at the end
    assert "skipped 16 samples of 1 image that could not be used:" in said
    with pytest.raises(QLIPError, match=r"1 image cannot be read, the limit is 0 \(skip_limit\); .*broken.jpg"):
        run(load_recipe(str(recipe_file), [*options, "skip_limit=0"]), tmp_path / "other", QUIET)


def test_skip_limit__resumed_run_knows_the_images(recipe_file: Path, photos: Path, tmp_path: Path) -> None:
    options = [f"data.sources=[{{path: '{photos}'}}]", "skip_limit=1"]
    run(load_recipe(str(recipe_file), options), tmp_path / "run", QUIET)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000024")
    run(load_recipe(str(recipe_file), options), tmp_path / "run", QUIET)
    state = json.loads((tmp_path / "run/checkpoints/step-00000024/training/state.json").read_text())
    assert state["broken"] == 16 and [entry[3] for entry in state["skipped"]["named"]] == [16]


def test_run__without_a_readable_sample_is_an_error(recipe_file: Path, photos: Path, tmp_path: Path) -> None:
    for path in photos.glob("*.jpg"):
        path.write_bytes(b"\xff\xd8\xff not an image")
    recipe = load_recipe(str(recipe_file), [f"data.sources=[{{path: '{photos}'}}]"])
    with pytest.raises(QLIPError, match=r"none of the \d+ samples so far could be read, so nothing is trained; .*jpg"):
        run(recipe, tmp_path / "run", QUIET)
    assert not (tmp_path / "run/model").exists()


def test_run__in_which_no_loss_moves_a_weight_is_an_error(recipe_file: Path, photos: Path, tmp_path: Path) -> None:
    """Alignment alone, and no captions."""
    for path in photos.glob("*.txt"):
        path.unlink()
    alone = ["losses={alpha_r: 0, alpha_q: 0}", f"data.sources=[{{path: '{photos}'}}]", "schedule.steps=4"]
    with pytest.raises(QLIPError, match=r"no gradient in 4 steps, so nothing was trained: .*captions"):
        run(load_recipe(str(recipe_file), alone), tmp_path / "run", QUIET)
    assert not (tmp_path / "run/model").exists()


def test_run__images_without_captions_train_reconstruction_only(checkpoint: Path, recipe_values: dict) -> None:
    model = QLIPModel.from_pretrained(checkpoint).train()
    recipe = check_recipe(recipe_values, "test")
    assert isinstance(recipe, Stage1Recipe)
    (phase,) = Stage1(model, QLIPProcessor.from_pretrained(checkpoint), recipe).phases
    pixels, ids = torch.randn(4, 3, 32, 32), torch.zeros(4, 16, dtype=torch.int64)
    nothing = torch.zeros(4, dtype=torch.int64)
    batch = Batch(pixels, ids, nothing.bool(), nothing, [""] * 4, [None] * 4)
    gradients = backward(phase, [batch])
    assert set(gradients.losses) == {"mse", "bsq", "commitment"} and "align" not in gradients.report
    assert all(parameter.grad is None for parameter in model.text_model.parameters())
    # one captioned image among them: only it is aligned
    batch.has_caption[2], batch.match_ids[2] = True, 7
    gradients = backward(phase, [batch])
    assert set(gradients.losses) == {"mse", "bsq", "commitment", "align"} and float(
        gradients.report["align"]
    ) == pytest.approx(0, abs=1e-6)


def test_two_processes_do_not_share_a_run_folder(recipe_file: Path, tmp_path: Path) -> None:
    from qlip.files import locked
    from qlip.training.run_folder import LOCK

    with locked(tmp_path / "run" / LOCK, "in use"), pytest.raises(QLIPError, match="another process trains here"):
        run(load_recipe(str(recipe_file)), tmp_path / "run", QUIET)
