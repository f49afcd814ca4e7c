"""Measuring a model while it trains gives the figures of `qlip eval` and leaves no trace in the training."""

from __future__ import annotations

import gc
import io
import json
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.spawn import spawn

from qlip import QLIPError, QLIPModel, QLIPProcessor, assets
from qlip.data import Batch
from qlip.evaluation.models.base import QLIPEvalModel
from qlip.evaluation.run.evaluate import EvalSpec, run_specs
from qlip.modeling import QLIPConfig
from qlip.training.accumulate import backward
from qlip.training.log.runlog import RunLog, SilentLog
from qlip.training.optim.clipping import clip_gradients
from qlip.training.optim.ema import EMA
from qlip.training.parallel.parallelize import replicate, shard
from qlip.training.recipe import check_recipe, load_recipe
from qlip.training.task import Wrap, unwrapped
from qlip.training.tasks import Stage1
from qlip.training.tasks.build import first_images, open_training_feed
from qlip.training.tasks.image_log import ImageHook
from qlip.training.tasks.recipe_schema import ValidationSection
from qlip.training.tasks.validation import ValidationHook

STEPS = 4
SECTION = ValidationSection(every=2, sets=("bundled",), limit=10)


def silent() -> Console:
    return Console(file=io.StringIO(), width=400)


def make_task(checkpoint: Path, wrap: Wrap = unwrapped) -> Stage1:
    """With dropout, so that a random number drawn elsewhere would show."""
    values = QLIPModel.from_pretrained(checkpoint).config.to_dict()
    for tower in ("vision_config", "text_config", "decoder_config"):
        values[tower]["attention_dropout"] = 0.2
    model = QLIPModel(QLIPConfig.from_dict(values))
    model.load_state_dict(QLIPModel.from_pretrained(checkpoint).state_dict())
    recipe = check_recipe(
        {
            "name": "test",
            "model": {"init": str(checkpoint)},
            "data": {"sources": [{"path": "bundled"}]},
            "batch_size": 4,
            "schedule": {"steps": STEPS},
            "losses": {"alpha_r": 30.0},
        },
        "test",
    )
    return Stage1(model.train(), QLIPProcessor.from_pretrained(checkpoint), recipe, wrap)  # type: ignore[arg-type]


def make_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(
        pixel_values=torch.randn(4, 3, 32, 32, generator=generator),
        input_ids=torch.randint(0, 500, (4, 16), generator=generator),
        has_caption=torch.ones(4, dtype=torch.bool),
        match_ids=torch.arange(1, 5),
        keys=["a", "b", "c", "d"],
        captions=[None] * 4,
    )


def train(task: Stage1, ema: EMA, hook: ValidationHook | None, log: RunLog) -> None:
    """Some steps as the trainer takes them."""
    torch.manual_seed(7)
    for step in range(1, STEPS + 1):
        (phase,) = task.phases
        backward(phase, [make_batch(step)], True, lambda last: nullcontext())
        clip_gradients(phase.parameters, phase.clip)
        for optimizer in phase.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update()
        log.clock.step(0.0, 4)
        if hook is not None:
            hook(step, log, ema.applied)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def evaluated(folder: Path, data: str = "bundled", limit: int = 10) -> dict[str, float]:
    """What `qlip eval` computes for a checkpoint."""
    model, processor = QLIPModel.from_pretrained(folder), QLIPProcessor.from_pretrained(folder)
    items = [EvalSpec("", data, name, limit=limit) for name in ("reconstruction", "codebook")]
    items.append(EvalSpec("", data, "zero_shot", {"templates": "cifar"}, limit))
    outcome = run_specs(QLIPEvalModel(model, processor, "exported"), items)
    assert outcome is not None
    named = {name: one.value for row in outcome.result.measured for name, one in row.values.items()}
    return {name: value for name, value in named.items() if not name.startswith("shrink_")}


def test_a_run_that_is_measured_is_the_run_that_is_not_bit_by_bit(checkpoint: Path, tmp_path: Path) -> None:
    alone, measured = make_task(checkpoint), make_task(checkpoint)
    train(alone, EMA(alone.model, 0.9), None, SilentLog())
    log, ema = RunLog(tmp_path, 0, STEPS, False, silent()), EMA(measured.model, 0.9)
    measured.model.vision_model.encoder.eval()  # a part that stays in eval mode, as a frozen one does
    alone_again = make_task(checkpoint)
    alone_again.model.vision_model.encoder.eval()
    train(alone_again, EMA(alone_again.model, 0.9), None, SilentLog())
    hook = ValidationHook(SECTION, measured.model, measured.processor, silent())
    train(measured, ema, hook, log)
    log.close()
    expected, other = alone_again.model.state_dict(), alone.model.state_dict()
    for name, weight in measured.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert any(not torch.equal(expected[name], other[name]) for name in expected)  # dropout is at work
    assert measured.model.training and not measured.model.vision_model.encoder.layers[0].training
    # the figures are those of the averaged weights, as the exported model gives them
    first, second = lines(tmp_path)
    assert (first["step"], second["step"]) == (2, 4) and first["kind"] == second["kind"] == "validation"
    measured.export(tmp_path / "model", ema.weights())
    named = {f"val/bundled/{name}": value for name, value in evaluated(tmp_path / "model").items()}
    assert (
        named.keys() == second.keys() - {"step", "kind"}
        and {"val/bundled/psnr", "val/bundled/prompt_top1"} <= named.keys()
    )
    for name, value in named.items():
        assert second[name] == pytest.approx(value, rel=1e-6), name


def test_validation__labels_decide_on_zero_shot_classification(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = QLIPModel.from_pretrained(checkpoint), QLIPProcessor.from_pretrained(checkpoint)
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted(assets.path("images").glob("*.jpg"))[:3]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff not an image")
    out = silent()
    section = ValidationSection(every=1, sets=(str(folder), "bundled"), limit=5)
    hook = ValidationHook(section, model, processor, out)
    assert "prompt_top1" in hook.measure("bundled") and "prompt_top1" not in hook.measure(str(folder))
    assert isinstance(out.file, io.StringIO)
    assert f"{folder} (4 images), bundled (5 images, classification too)" in out.file.getvalue()
    without_text = ValidationHook(section, model, processor, silent(), aligned=False)
    assert "prompt_top1" not in without_text.measure("bundled") and "psnr" in without_text.measure("bundled")


def test_what_is_wrong_is_said_before_the_first_step(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = QLIPModel.from_pretrained(checkpoint), QLIPProcessor.from_pretrained(checkpoint)

    def hook(**values: object) -> None:
        ValidationHook(ValidationSection.model_validate({"every": 1} | values), model, processor, silent())

    with pytest.raises(QLIPError, match="nowhere"):
        hook(sets=[str(tmp_path / "nowhere")])
    with pytest.raises(QLIPError, match="templates 'cifra'"):
        hook(sets=["bundled"], templates="cifra")


# ---------------------------------------------------------------- images


def test_image_hook__shows_averaged_weights_and_draws_nothing_at_random(
    recipe_file: Path, checkpoint: Path, tmp_path: Path
) -> None:
    processor, task = QLIPProcessor.from_pretrained(checkpoint), make_task(checkpoint)
    feed = open_training_feed(load_recipe(str(recipe_file)), processor.preprocessing, processor.tokenizer)
    ema = EMA(task.model, 0.9)
    with torch.no_grad():
        task.model.vision_decoder.conv_out.bias += 1  # far from its average

    def reconstruct(pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        torch.rand(3)  # whatever it draws
        time.sleep(0.05)
        return task.reconstruct(pixel_values)

    hook = ImageHook(reconstruct, first_images(feed, 3), 2, tmp_path / "pictures")
    state, log = torch.get_rng_state(), RunLog(tmp_path, 0, 10, False, silent())
    hook(1, log, ema.applied)
    hook(2, log, ema.applied)
    hook(4, SilentLog(), ema.applied)
    assert torch.equal(torch.get_rng_state(), state) and log.clock.paused_a_step() >= 0.05  # not counted as training
    (path,) = (tmp_path / "pictures").iterdir()
    assert path.name == "step-00000002.png"
    with Image.open(path) as image:
        shown = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        factor = image.height // 64
        shown = shown.view(image.height, image.width, 3)[factor // 2 :: factor, factor // 2 :: factor]
    with ema.applied():
        _, rebuilt = task.reconstruct(hook.pixel_values)
    expected = (torch.cat(list(rebuilt), -1) * 255).round().byte().permute(1, 2, 0)
    assert torch.equal(shown[32:], expected)


# ---------------------------------------------------------------- on two ranks


def test_two_ranks_measure_together_what_one_measures(checkpoint: Path, tmp_path: Path) -> None:
    """Copies (DDP) and shards (FSDP2): the same figures on both, as of the whole weights; training goes on unmoved."""
    spawn(_worker, (checkpoint, tmp_path), nprocs=2)
    for kind in ("ddp", "fsdp"):
        last = lines(tmp_path / kind)[-1]
        for name, value in evaluated(tmp_path / kind / "model").items():
            assert last[f"val/bundled/{name}"] == pytest.approx(value, rel=1e-5), (kind, name)


def _worker(rank: int, checkpoint: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    try:
        _measure_as_a_rank(rank, checkpoint, folder)
        # what holds the group goes first: its threads, alive while Python ends, can abort the process
        gc.collect()
    finally:
        dist.destroy_process_group()


def _measure_as_a_rank(rank: int, checkpoint: Path, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    wraps: dict[str, Wrap] = {
        "ddp": lambda module, ignored=(): replicate(module, ignored, torch.device("cpu")),
        "fsdp": lambda module, ignored=(): shard(module, ignored, mesh),
    }
    for kind, wrap in wraps.items():
        alone = make_task(checkpoint, wrap)
        train(alone, EMA(alone.model, 0.9), None, SilentLog())
        task = make_task(checkpoint, wrap)
        assert isinstance(task.model, FSDPModule) == (kind == "fsdp")
        ema = EMA(task.model, 0.9)
        hook = ValidationHook(SECTION, task.model, task.processor, silent())
        (folder / kind).mkdir(exist_ok=True)
        log = RunLog(folder / kind, 0, STEPS, False, silent()) if rank == 0 else SilentLog()
        train(task, ema, hook, log)
        log.close()
        expected = alone.model.state_dict()
        for name, weight in task.model.state_dict().items():
            assert torch.equal(whole(weight), whole(expected[name])), name
        weights = {name: whole(weight) for name, weight in ema.weights().items()}
        if rank == 0:
            task.export(folder / kind / "model", weights)
        dist.barrier()


def whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
