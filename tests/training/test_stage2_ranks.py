"""Two ranks train both players of stage 2 as one process does, with copies (DDP) and with shards (FSDP2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from qlip import QLIPProcessor
from qlip.data.loader.batch import Batch
from qlip.evaluation.networks.lpips import LPIPS
from qlip.training.accumulate import backward
from qlip.training.optim.clipping import clip_gradients
from qlip.training.parallel.distributed import Parallel
from qlip.training.recipe import check_recipe
from qlip.training.tasks import Stage2
from qlip.training.tasks.build import build_model
from qlip.training.tasks.recipe import Stage2Recipe
from tests.training.ranks import on_ranks

SHARES = ((3, 5), (0, 8), (6, 2), (4, 4))
"""Images of two ranks at each step: uneven, and none at all on one."""


def values_of(checkpoint: Path, **changed: Any) -> dict[str, Any]:
    return {
        "name": "test",
        "stage": 2,
        "model": {"init": str(checkpoint)},
        "data": {"sources": [{"path": "unused"}]},
        "batch_size": 8,
        "schedule": {"steps": len(SHARES)},
        "losses": {"alpha_p": 0.2, "alpha_g": 0.2, "alpha_q": 2.0, "commitment": 0.2},
        # a step that does not depend on how small a gradient is keeps rounding small
        "optimizer": {"lr": 1e-3, "eps": 1e-2, "parts": {"decoder": 5e-4}},
        "discriminator": {"channels": 8, "layers": 2, "lr": 1e-4, "r1": 0.2, "r1_every": 2, "lecam": 0.1, "start": 1},
    } | changed


def train(values: dict[str, Any], file: Path) -> None:
    """Take the steps on however many ranks this is, and save everything whole."""
    recipe = check_recipe(values, "test")
    assert isinstance(recipe, Stage2Recipe) and recipe.model.init is not None
    with Parallel(recipe) as parallel:
        torch.manual_seed(parallel.rank)  # nothing may hang on it
        perceptual = LPIPS("alex")
        weights = torch.Generator().manual_seed(1)
        for parameter in perceptual.parameters():
            parameter.copy_(0.1 * torch.rand(parameter.shape, generator=weights) - 0.04)
        processor = QLIPProcessor.from_pretrained(recipe.model.init)
        task = Stage2(build_model(recipe, processor), processor, recipe, parallel.wrap, perceptual)
        found: dict[str, Tensor] = {}
        for number, shares in enumerate(SHARES):
            pixels = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(number)) * 2 - 1
            own = pixels if parallel.world == 1 else pixels.split(list(shares))[parallel.rank]
            pieces = own.chunk(2) if recipe.micro_batch_size and len(own) > 1 else [own]
            if recipe.micro_batch_size and len(pieces) == 1:
                pieces = [own, own[:0]]  # the same number on every rank
            for name, value in step(task, number, [batch_of(piece) for piece in pieces], parallel).items():
                found[f"{number}/{name}"] = value
        for network, module in task.networks.items():
            for name, tensor in module.state_dict().items():
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                found[f"{network}/{name}"] = whole.detach().clone()
        if parallel.first:
            save_file(found, file)


def step(task: Stage2, number: int, batches: list[Batch], parallel: Parallel) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    task.before_step(number)
    for phase in task.phases:
        if not phase.active(number):
            continue
        result = backward(phase, batches, sync=parallel.sync(phase.modules))
        parallel.average(phase.loss_parameters)
        norm = clip_gradients(phase.parameters, phase.clip)
        for optimizer in phase.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        found = result.report | result.losses | {"gradient_norm": torch.as_tensor(float(norm))}
        values |= {f"{phase.name}/{name}": value.detach().clone() for name, value in found.items()}
    task.after_step()
    originals, rebuilt = task.reconstruct(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(9)))
    assert originals.shape == rebuilt.shape
    return values | {"rebuilt": rebuilt.contiguous()}


def batch_of(pixels: Tensor) -> Batch:
    count = len(pixels)
    empty = torch.zeros(count, 1, dtype=torch.int64)
    keys = [str(number) for number in range(count)]
    return Batch(pixels, empty, torch.zeros(count, dtype=torch.bool), empty[:, 0], keys, [None] * count)


DDP, FSDP, EXACT = {"parallel": {"kind": "ddp"}}, {"parallel": {"kind": "fsdp"}}, {"micro_batch_size": 4}
LAYOUTS: list[dict[str, dict[str, Any]]] = [
    {"ddp-exact": DDP | EXACT, "fsdp": FSDP},
    {"ddp": DDP, "fsdp-exact": FSDP | EXACT | {"activation_checkpointing": True}},
]


@pytest.mark.parametrize("layouts", [LAYOUTS[0], pytest.param(LAYOUTS[1], marks=pytest.mark.slow)], ids=" and ".join)
def test_two_ranks_are_one_process(checkpoint: Path, tmp_path: Path, layouts: dict[str, dict[str, Any]]) -> None:
    train(values_of(checkpoint), tmp_path / "whole")
    expected = load_file(tmp_path / "whole")
    assert {"0/model/lpips", "1/discriminator/r1", "2/discriminator/lecam", "3/model/gan"} <= expected.keys()
    assert "0/discriminator/discriminator" not in expected
    on_ranks(2, train, [(values_of(checkpoint, **changed), tmp_path / name) for name, changed in layouts.items()])
    for layout in layouts:
        found = load_file(tmp_path / layout)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            close = torch.isclose(found[name].double(), tensor.double(), rtol=2e-3, atol=2e-5)
            assert bool(close.all()), f"{layout}: {name} is {found[name]}, expected {tensor}"
