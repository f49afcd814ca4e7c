"""Optimizers, clipping and averages over weights that two ranks share (FSDP2) do what they do over whole ones."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.multiprocessing.spawn import spawn

from qlip import QLIPModel
from qlip.modeling.parts import qlip_groups
from qlip.training.optim.clipping import clip_gradients
from qlip.training.optim.ema import EMA
from qlip.training.optim.optimizers import build_optimizers, load_named_state, named_state
from qlip.training.tasks.recipe_schema import TokenizerOptimizerSection

WORLD = 2
SETTINGS = [
    TokenizerOptimizerSection(name="adamw", lr=1e-2, weight_decay=0.1),
    TokenizerOptimizerSection(
        name="lamb", lr=1e-2, weight_decay=0.1, parts={"text": 1e-3, "decoder": 2e-2}, layer_decay=0.8
    ),
    TokenizerOptimizerSection(name="muon", lr=1e-2, weight_decay=0.1),
]


def test_sharded_updates_equal_whole_ones(checkpoint: Path, tmp_path: Path) -> None:
    spawn(_worker, (checkpoint, tmp_path / "store"), nprocs=WORLD)


def _worker(rank: int, checkpoint: Path, store: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        for settings in SETTINGS:
            _same_weights(checkpoint, settings)
        _same_averages()
        gc.collect()  # what holds the group goes first: its threads, alive while Python ends, can abort the process
    finally:
        dist.destroy_process_group()


def _sharded(checkpoint: Path) -> QLIPModel:
    model = QLIPModel.from_pretrained(checkpoint)
    mesh = init_device_mesh("cpu", (WORLD,))
    for tower in (model.text_model, model.vision_model, model.vision_decoder):
        for layer in tower.encoder.layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})
    return model


def _set_gradients(model: nn.Module, seed: int) -> None:
    """The same gradients in both; an early one is missing, as a text tower's is where no image has words."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        gradient = torch.randn(parameter.shape, generator=generator) * 10 ** torch.randn((), generator=generator)
        if seed == 0 and name.startswith("text_model"):
            parameter.grad = None
        elif isinstance(parameter, DTensor):
            parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        else:
            parameter.grad = gradient


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _same_weights(checkpoint: Path, settings: TokenizerOptimizerSection) -> None:
    whole, shared = QLIPModel.from_pretrained(checkpoint), _sharded(checkpoint)
    plain, sharded = (
        build_optimizers(model.named_parameters(), settings, qlip_groups(model), settings.parts)
        for model in (whole, shared)
    )
    for step in range(4):
        norms = []
        for model, optimizers in ((whole, plain), (shared, sharded)):
            _set_gradients(model, step)
            norms.append(clip_gradients(model.parameters(), 5.0 if step else 1e9))
            for optimizer in optimizers:
                optimizer.step()
        assert type(norms[1]) is Tensor
        torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=0)
        if step == 1:
            sharded = _resumed(shared, sharded, settings)
    for (name, one), other in zip(whole.named_parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(_whole(other), one, rtol=1e-4, atol=1e-6, msg=f"{settings.name}: {name}")
    for one, other in zip(plain, sharded, strict=True):
        assert named_state(one).keys() == named_state(other).keys()
        for key, value in named_state(other).items():
            assert isinstance(value, DTensor) == (value.ndim > 0 and not key.startswith("logit_scale")), key


def _resumed(
    model: QLIPModel, optimizers: list[torch.optim.Optimizer], settings: TokenizerOptimizerSection
) -> list[torch.optim.Optimizer]:
    """New optimizers with the state of old ones."""
    fresh = build_optimizers(model.named_parameters(), settings, qlip_groups(model), settings.parts)
    for old, new in zip(optimizers, fresh, strict=True):
        load_named_state(new, named_state(old))
    return fresh


def _same_averages() -> None:
    """Training, evaluation, resume; a root that keeps gathered weights must not use old ones."""
    networks = []
    for shared in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        if shared:
            mesh = init_device_mesh("cpu", (WORLD,))
            fully_shard(network[0], mesh=mesh)
            fully_shard(network, mesh=mesh)
        networks.append(network)
    averages = [EMA(network, 0.9) for network in networks]
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.5) for network in networks]
    seen: list[list[Tensor]] = [[], []]
    images = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    for step in range(4):
        for number, (network, optimizer) in enumerate(zip(networks, optimizers, strict=True)):
            network(images + step).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            averages[number].update()
            if step == 1:
                again = EMA(network, 0.9)
                again.load({key: value.clone() for key, value in averages[number].state().items()})
                averages[number] = again
            with torch.no_grad():
                before = network(images)
                with averages[number].applied():
                    seen[number].append(network(images))
                after = network(images)
            assert torch.equal(before, after) and not torch.equal(before, seen[number][-1])
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(other, one)
    shared_root = networks[1]
    assert isinstance(shared_root, FSDPModule)
    for (name, one), other in zip(averages[0].weights().items(), averages[1].weights().values(), strict=True):
        assert isinstance(other, DTensor), name
        torch.testing.assert_close(_whole(other), one)


def test_clipping_without_sharding_is_torchs() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))]
    theirs = [nn.Parameter(one.detach().clone()) for one in ours]
    for bound in (0.1, 100.0):
        for one, other in zip(ours[:2], theirs[:2], strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        norm, expected = clip_gradients(ours, bound), nn.utils.clip_grad_norm_(theirs, bound)
        torch.testing.assert_close(norm, expected)
        for one, other in zip(ours[:2], theirs[:2], strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    assert ours[2].grad is None
    assert float(clip_gradients([ours[2]], 1.0)) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_clipping_tells_of_a_gradient_that_is_not_finite(bad: float) -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.tensor([1.0, bad, 0.0])
    assert not torch.isfinite(clip_gradients([parameter], 1.0))
