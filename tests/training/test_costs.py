from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qlip import QLIPConfig, QLIPModel
from qlip.data.loader.batch import Batch
from qlip.training.costs import Run, backward, count_flops, optimizer_bytes, peak_bytes, without_memory
from qlip.training.recipe import check_recipe
from qlip.training.tasks import Stage1, Stage2
from qlip.training.tasks.plan import flops_per_image, make_batch, make_task
from qlip.training.tasks.recipe import Stage1Recipe, Stage2Recipe

STAGE_2 = {"task": "stage2", "losses": {"alpha_p": 0, "alpha_g": 0}}


def recipe_of(values: dict[str, Any], changes: dict[str, Any]) -> Stage1Recipe | Stage2Recipe:
    recipe = check_recipe(values | changes, "test")
    assert isinstance(recipe, Stage1Recipe | Stage2Recipe)
    return recipe


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"losses": {"alpha_a": 0}},
        {"losses": {"alpha_r": 0}},
        {"optimizer": {"parts": {"encoder": 0}}},
        STAGE_2,
    ],
)
def test_flops_and_peak__without_memory_are_those_of_a_real_run(
    recipe_values: dict[str, Any], checkpoint: Path, changes: dict[str, Any]
) -> None:
    recipe, config = recipe_of(recipe_values, changes), QLIPModel.from_pretrained(checkpoint).config
    batch = make_batch(config, 4)
    real = replace(batch, pixel_values=torch.zeros(batch.pixel_values.shape))

    def run_of(task: Stage1 | Stage2, batch: Batch) -> Run:
        (phase,) = task.phases
        for parameter in phase.parameters:
            parameter.grad = torch.zeros_like(parameter)

        def run() -> dict[str, Tensor]:
            inputs = phase.forward(batch, False)
            return inputs.sums | inputs.mean_stats | inputs.embeddings

        return run

    run = run_of(make_task(recipe, config), real)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backward(run())
    assert flops_per_image(recipe, config) == pytest.approx(counter.get_total_flops() / 4)
    with without_memory():
        fake = make_task(recipe, config)
    assert all(isinstance(parameter, FakeTensor) for parameter in fake.model.parameters())
    # outside of the context too, together with the real ids
    assert peak_bytes(run_of(fake, batch)) == pytest.approx(peak_bytes(run), rel=0.01)


def test_flops__frozen_parts_cost_less(recipe_values: dict[str, Any], checkpoint: Path) -> None:
    config = QLIPModel.from_pretrained(checkpoint).config
    whole = flops_per_image(recipe_of(recipe_values, {}), config)
    for part in ("encoder", "text", "decoder"):
        assert flops_per_image(recipe_of(recipe_values, {"optimizer": {"parts": {part: 0}}}), config) < whole


def test_flops__published_size_by_the_rule_of_thumb(recipe_values: dict[str, Any]) -> None:
    """6 times parameters times tokens, and the attention on top."""
    config = QLIPConfig.named("QLIP-B-16-256")
    with torch.device("meta"):
        model = QLIPModel(config)
    layers = sum(one.numel() for one in model.vision_model.encoder.parameters()) * 257
    layers += sum(one.numel() for one in model.vision_decoder.encoder.parameters()) * 256
    layers += sum(one.numel() for one in model.text_model.encoder.parameters()) * 77
    assert flops_per_image(recipe_of(recipe_values, {}), config) == pytest.approx(6 * layers, rel=0.1)


def test_costs__of_any_model() -> None:
    """Two products of 3 x 4 x 5: forward, and backward to weights alone, for the input needs no gradient."""
    with without_memory():
        network, x = nn.Linear(4, 5, bias=False), torch.zeros(3, 4)

        def run() -> dict[str, Tensor]:
            return {"y": network(x)}

        assert count_flops(run) == 2 * (2 * 3 * 4 * 5)
        # the output, its sum's gradient spread over it and the weight's gradient are there at once
        assert 4 * 3 * 5 <= peak_bytes(run) <= 4 * (2 * 3 * 5 + 2 * 4 * 5 + 4)
    state = torch.get_rng_state()
    with without_memory():
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
def test_optimizer_bytes__are_those_of_a_real_step(recipe_values: dict[str, Any], checkpoint: Path, name: str) -> None:
    recipe, config = (
        recipe_of(recipe_values, {"optimizer": {"name": name}}),
        QLIPModel.from_pretrained(checkpoint).config,
    )
    with without_memory():
        fake = make_task(recipe, config)
    for task in (real := make_task(recipe, config), fake):
        for parameter in task.phases[0].parameters:
            parameter.grad = torch.zeros_like(parameter)
    for one, other in zip(real.phases[0].optimizers, fake.phases[0].optimizers, strict=True):
        (state, update), (told, estimate) = optimizer_bytes(one), optimizer_bytes(other)
        assert list(state.values()) == list(told.values())
        assert estimate == pytest.approx(update, rel=0.02, abs=4096)
