"""A kind of training from outside the package: the Trainer knows nothing of images, and loses nothing without them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qlip import QLIPError, assets
from qlip.cli.main import run as qlip
from qlip.training import RunRecipe, load_recipe, run
from qlip.training.accumulate import backward
from qlip.training.dry_run import dry_run
from qlip.training.job import Job, find_kind
from qlip.training.recipe import check_recipe
from tests.training.killed import kill_at_first_checkpoint
from tests.training.ranks import on_ranks

FOREIGN = Path(__file__).parent / "foreign"
STEPS = 8
MAIN = "from qlip.cli.main import main\nif __name__ == '__main__':\n    main()\n"


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    """The package and its dist-info on the path, as if it were installed."""
    sys.path.insert(0, str(FOREIGN))
    yield
    sys.path.remove(str(FOREIGN))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token dataset made by the bundled model."""
    folder = tmp_path_factory.mktemp("tokens") / "tokens"
    assert qlip(["tokenize", str(assets.path("images")), "-o", str(folder)]) == 0
    return folder


@pytest.fixture
def values(tokens: Path) -> dict[str, Any]:
    """Ragged rows in micro-batches, Muon, layer decay and EMA."""
    return {
        "name": "foreign",
        "task": "tiny_lm",
        "data": {"path": str(tokens), "layout": "ragged"},
        "batch_size": 7,
        "micro_batch_size": 3,
        "optimizer": {"name": "muon", "lr": 1e-2, "muon_lr": 1e-2, "layer_decay": 0.8, "weight_decay": 0.1},
        "schedule": {"steps": STEPS, "warmup": 2},
        "ema": {"decay": 0.9},
        "threads": 1,
        "checkpoint": {"every": 2, "keep": 10},
        "log": {"every": 2, "tensorboard": False},
    }


def command(recipe: Path, folder: Path) -> subprocess.Popen[str]:
    """`qlip train` in a process of its own, with the package on its path."""
    script = folder.parent / "start.py"
    script.write_text(MAIN)
    environment = os.environ | {"PYTHONPATH": f"{FOREIGN}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    arguments = [sys.executable, str(script), "train", str(recipe), "-o", str(folder)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model/model.safetensors")


def test_kind__from_another_package_trains_through_the_command(values: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 after a checkpoint, and the run resumes to the bit."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values | {"checkpoint": {"every": 1, "keep": 10}}))
    whole = command(recipe, tmp_path / "whole")
    output, _ = whole.communicate(timeout=240)
    assert whole.returncode == 0, output
    assert "tokens/s" in output and "rows; in" in output
    killed = command(recipe, tmp_path / "killed")
    kill_at_first_checkpoint(killed, tmp_path / "killed")
    again = command(recipe, tmp_path / "killed")
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    one, other = (tmp_path / name / "model/model.safetensors" for name in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert lines[-1]["next_token"] < lines[0]["next_token"] and lines[-1]["tokens_per_s"] > 0


def train(values: dict[str, Any], folder: Path) -> None:
    """A run in this process, alone or as one of the ranks."""
    if str(FOREIGN) not in sys.path:
        sys.path.insert(0, str(FOREIGN))
    run(check_recipe(values, "test"), folder, Console(quiet=True))


def test_ranks__ddp_and_fsdp_equal_one_process(values: dict[str, Any], tmp_path: Path) -> None:
    train(values, tmp_path / "one")
    kinds = ("ddp", "fsdp")
    on_ranks(2, train, [(values | {"parallel": {"kind": kind}}, tmp_path / kind) for kind in kinds])
    expected = weights(tmp_path / "one")
    for kind in kinds:
        for name, tensor in weights(tmp_path / kind).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5, msg=f"{kind}: {name}")


def a_task(values: dict[str, Any]) -> tuple[Any, Any]:
    """A task, and its first batch of seven."""
    from tiny_lm import Kind

    from qlip.training.parallel.distributed import Parallel

    recipe: Any = check_recipe(values, "test")
    torch.manual_seed(0)
    job = Kind().build(recipe, Parallel(recipe), Path())
    return job.task, next(iter(job.feed.open(None)))[0]


def gradients(task: Any, batches: list[Any], exact: bool = True) -> dict[str, torch.Tensor]:
    (phase,) = task.phases
    backward(phase, batches, exact)
    found = {name: one.grad.clone() for name, one in task.model.named_parameters() if one.grad is not None}
    task.model.zero_grad()
    return found


@pytest.mark.parametrize("layout", ["ragged", "packed"])
def test_linear_task__micro_batches_equal_the_whole_batch_in_one_run_each(values: dict[str, Any], layout: str) -> None:
    values["data"]["layout"] = layout
    task, batch = a_task(values)
    whole, runs = gradients(task, [batch]), []
    task.network.register_forward_hook(lambda *_: runs.append(1))
    found = gradients(task, batch.split(3))
    assert len(runs) == 3
    for name, gradient in whole.items():
        assert float((found[name] - gradient).abs().max()) < 1e-6, name


def test_linear_task__packed_equals_padded(values: dict[str, Any]) -> None:
    found = {}
    for layout in ("ragged", "packed"):
        values["data"]["layout"] = layout
        found[layout] = gradients(*[part if number == 0 else [part] for number, part in enumerate(a_task(values))])
    for name, gradient in found["ragged"].items():
        torch.testing.assert_close(found["packed"][name], gradient, rtol=1e-4, atol=1e-6)


def test_linear_task__refuses_the_mean_of_unequal_counts(values: dict[str, Any]) -> None:
    task, batch = a_task(values)
    with pytest.raises(QLIPError, match=r"accumulation: mean averages .* \d+ tokens\), .*set accumulation=exact"):
        gradients(task, batch.split(3), exact=False)


def test_param_groups__of_a_foreign_model(values: dict[str, Any]) -> None:
    task, _ = a_task(values)
    muon, adamw = task.phases[0].optimizers
    taken = {name for group in muon.param_groups for name in group["param_names"]}
    assert taken == {f"blocks.{n}.{one}.weight" for n in (0, 1) for one in ("qkv", "out", "mlp.1", "mlp.3")}
    rates = {name: group["initial_lr"] for group in adamw.param_groups for name in group["param_names"]}
    assert rates["head.weight"] == 1e-2 and rates["embed.weight"] == pytest.approx(1e-2 * 0.8**3)
    decay = {name: group["weight_decay"] for group in adamw.param_groups for name in group["param_names"]}
    assert decay["embed.weight"] == decay["places.weight"] == decay["norm.weight"] == 0 and decay["head.weight"] == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "tiny_ml"}, "no task 'tiny_ml' .did you mean 'tiny_lm'"),
        ({"model": {"depth": 3}}, "depth"),
        ({"log": {"gradients_every": 1}}, "log.gradients_every: task tiny_lm has no shared layer"),
        ({"model": {"layers": 1}, "compile": True, "optimizer": {"lr": 1e-2}}, None),
    ],
)
def test_recipe__of_a_foreign_kind(
    values: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    if message is None:
        assert isinstance(check_recipe(values | change, "test"), RunRecipe)
        return
    with pytest.raises(QLIPError, match=message):
        train(values | change, tmp_path / "run")


def test_activation_checkpointing__recomputes_foreign_blocks_with_equal_weights(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiny_lm

    runs: list[int] = []
    forward = tiny_lm.DecoderBlock.forward
    monkeypatch.setattr(tiny_lm.DecoderBlock, "forward", lambda *inputs: runs.append(1) or forward(*inputs))
    train(values, tmp_path / "plain")
    plain = len(runs)
    train(values | {"activation_checkpointing": True}, tmp_path / "run")
    assert len(runs) == 3 * plain
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, weights(tmp_path / "plain")[name]), name


def test_compile__without_a_block_is_an_error(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiny_lm

    class Plain(tiny_lm.DecoderBlock.__base__.__base__):  # type: ignore[misc,name-defined]  # nn.Module
        __init__ = lambda self, width: torch.nn.Module.__init__(self)  # noqa: E731
        forward = lambda self, x, mask: x  # noqa: E731

    monkeypatch.setattr(tiny_lm, "DecoderBlock", Plain)
    values |= {"optimizer": {"name": "adamw"}}
    with pytest.raises(QLIPError, match="compile: the model has no Block"):
        train(values | {"compile": True}, tmp_path / "run")
    with pytest.raises(QLIPError, match="activation_checkpointing: the model has no Block"):
        train(values | {"activation_checkpointing": True}, tmp_path / "another")
    with pytest.raises(QLIPError, match="parallel.kind fsdp: the model has no Block"):
        train(values | {"parallel": {"kind": "fsdp"}}, tmp_path / "other")


def test_export__last_leaves_checkpoints_without_a_second_copy(values: dict[str, Any], tmp_path: Path) -> None:
    values["checkpoint"] = {"every": 4, "export": "last"}
    train(values, tmp_path / "run")
    saved = sorted((tmp_path / "run/checkpoints").iterdir())
    assert [path.name for path in saved] == ["step-00000004", "step-00000008"]
    assert [path.name for path in saved[-1].iterdir()] == ["training"]
    train(values | {"checkpoint": {"every": 4}}, tmp_path / "always")
    assert (tmp_path / "always/checkpoints/step-00000008/model.safetensors").is_file()
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == (
        tmp_path / "always/model/model.safetensors"
    ).read_bytes()


def test_frozen__another_networks_weights_are_refused_on_resume(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiny_lm

    from qlip.training.task import Frozen

    network = torch.nn.Linear(2, 2)
    frozen = property(lambda self: {"teacher": Frozen(network, "somewhere")})
    monkeypatch.setattr(tiny_lm.NextToken, "frozen", frozen)
    train(values, tmp_path / "run")
    state = json.loads((tmp_path / f"run/checkpoints/step-{STEPS:08d}/training/state.json").read_text())
    assert state["frozen"]["teacher"]["source"] == "somewhere"
    train(values, tmp_path / "run")
    with torch.no_grad():
        network.weight += 1
    with pytest.raises(QLIPError, match="frozen network 'teacher' from somewhere .* has different weights"):
        train(values, tmp_path / "run")


def test_load_recipe__reads_a_foreign_recipe_file(values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    recipe: Any = load_recipe(str(path), ["model.width=32"])
    assert recipe.task == "tiny_lm" and recipe.model.width == 32


def test_dry_run__of_a_foreign_kind(values: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Counts are the model's, and no weights are needed: the width would take a terabyte."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    assert qlip(["recipe", "dry-run", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    task, batch = a_task(values)
    size = sum(one.numel() for one in task.model.parameters())
    assert report["parts"][0] | {"part": "model", "parameters": size, "trained": size} == report["parts"][0]
    assert report["memory"]["resident"]["weights"] == 4 * size == report["memory"]["resident"]["moving average"]
    assert report["units"] == {"tokens": 24} and "rows" in report["notes"][0] and report["task"] == "tiny_lm"
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sum(task.sums(batch.split(2)[0]).values()).backward()
    assert report["flops"] == pytest.approx(counter.get_total_flops() / 3)
    values["model"] = {"width": 2**17}
    path.write_text(yaml.safe_dump(values | {"optimizer": {"name": "adamw"}}))
    assert qlip(["recipe", "dry-run", str(path), "--memory", "80"]) == 0
    said = capsys.readouterr().out
    assert "it does NOT fit" in said and "tokens" in said and "does not fit either" in said


def test_dry_run__of_a_step_that_needs_values_or_a_feed_without_batches_is_one_line(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, kind = check_recipe(values, "test"), find_kind("tiny_lm", "test")
    task = sys.modules[type(kind).__module__].NextToken
    with monkeypatch.context() as patched:
        patched.setattr(task, "sums", lambda self, batch: {"next_token": self.model.head.weight.nonzero().sum()})
        with pytest.raises(QLIPError, match="foreign: task tiny_lm cannot take a step without memory") as raised:
            dry_run(recipe)
    assert "\n" not in str(raised.value) and "method plan" in str(raised.value)
    made: list[Path] = []

    def build(self: Any, recipe: Any, parallel: Any, folder: Path) -> Job[Any]:
        made.append(folder)
        return Job(task(recipe, parallel.wrap), NoBatches(folder))

    monkeypatch.setattr(type(kind), "build", build)
    with pytest.raises(QLIPError, match="foreign: no sample of the first batch can be read"):
        dry_run(recipe)
    assert not made[0].exists()


class NoBatches:
    """A feed over the folder that its kind was given, without a batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, state: object, rank: int, world: int) -> Iterator[Any]:
        """Nothing, as long as the folder is there."""
        assert self.folder.is_dir()
        yield from ()
