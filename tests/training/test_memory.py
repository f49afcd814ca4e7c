"""The estimate of memory against tensors that are really there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlip import QLIPConfig, QLIPModel
from qlip.data.loader.batch import Batch
from qlip.evaluation.networks.lpips import LPIPS
from qlip.modeling import Preprocessing, QLIPProcessor
from qlip.training import load_recipe
from qlip.training.accumulate import backward
from qlip.training.costs import LiveMemory
from qlip.training.optim.ema import EMA
from qlip.training.tasks import Stage1, Stage2
from qlip.training.tasks.memory import (
    FLOAT,
    VGG16_FEATURES,
    estimate_memory,
    meta_model,
    samples_at_a_time,
)
from qlip.training.tasks.recipe import Stage1Recipe, Stage2Recipe
from qlip.training.tasks.stage2_checkpoint import load_without_text


def measured(run: Callable[[], Any]) -> int:
    """Most bytes of new tensors at once."""
    with LiveMemory() as memory:
        run()
    return memory.peak


def a_config() -> QLIPConfig:
    """Wide and deep enough that activations outweigh odds and ends."""
    values = QLIPConfig.named("debug-B-16").to_json_dict()
    size = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 340, "num_hidden_layers": 4}
    for tower in ("vision_config", "decoder_config"):
        values[tower] |= size | {"image_size": 128}
    return QLIPConfig.from_dict(values)


def a_recipe(*overrides: str) -> Stage1Recipe:
    base = ["micro_batch_size=null", "batch_size=16", "losses.align.chunk_size=null", "activation_checkpointing=false"]
    recipe = load_recipe("QLIP-B-16-256/debug-stage1", [*base, *overrides])
    assert isinstance(recipe, Stage1Recipe)
    return recipe


def a_batch(config: QLIPConfig, count: int) -> Batch:
    side, length = config.vision_config.image_size, config.text_config.max_position_embeddings
    generator = torch.Generator().manual_seed(0)
    return Batch(
        pixel_values=torch.randn(count, 3, side, side, generator=generator),
        input_ids=torch.randint(0, 600, (count, length), generator=generator),
        has_caption=torch.ones(count, dtype=torch.bool),
        match_ids=torch.arange(count),
        keys=[""] * count,
        captions=[None] * count,
    )


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
def test_what_is_resident_is_exact(name: str) -> None:
    recipe = a_recipe(f"optimizer={{name: {name}, parts: {{text: 0}}}}", "ema={decay: 0.9}", "model.locked=[text]")
    config = a_config()
    model = QLIPModel(config)
    task = Stage1(model.train(), QLIPProcessor(Preprocessing((128, 128), 128, patch_size=16), None), recipe)
    ema = EMA(model, 0.9)
    for parameter in task.phases[0].parameters:
        parameter.grad = torch.zeros_like(parameter)
    state: list[Tensor] = []
    for optimizer in task.phases[0].optimizers:
        optimizer.step()
        state += [value for entries in optimizer.state.values() for value in entries.values() if value.ndim]
    found = estimate_memory(recipe, config, gpu=False).resident

    def size(tensors: list[Any]) -> int:
        return sum(FLOAT * tensor.numel() for tensor in tensors)

    # a scalar's moments are scalars too, and not told from counts here
    assert found[f"{name} state"] == pytest.approx(size(state), abs=2 * FLOAT)
    assert found["weights"] == size(list(model.parameters()))
    assert found["gradients"] == size([p for p in model.parameters() if p.grad is not None])
    assert found["moving average"] == size([value for value in ema.state().values() if value.ndim]) + FLOAT


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_activations_of_stage_1_within_a_quarter(checkpointing: str) -> None:
    recipe, config = a_recipe(f"activation_checkpointing={checkpointing}"), a_config()
    model = QLIPModel(config)
    model.set_activation_checkpointing(recipe.activation_checkpointing)
    task = Stage1(model.train(), QLIPProcessor(Preprocessing((128, 128), 128, patch_size=16), None), recipe)
    batch = a_batch(config, recipe.batch_size)
    for parameter in task.phases[0].parameters:
        parameter.grad = torch.zeros_like(parameter)  # resident
    backward(task.phases[0], [batch])
    real = measured(lambda: backward(task.phases[0], [batch])) + FLOAT * batch.pixel_values.numel()
    estimate = estimate_memory(recipe, config, gpu=False)
    told = estimate.activations + sum(estimate.passing.values())
    assert 0.8 < told / real < 1.25, (told, real)


def test_activations_in_bfloat16_are_no_less_than_measured() -> None:
    """A CPU's autocast keeps fewer copies than a GPU's, for which the estimate is."""
    recipe, config = a_recipe("precision=bfloat16", "batch_size=4"), a_config()
    model = QLIPModel(config)
    task = Stage1(model.train(), QLIPProcessor(Preprocessing((128, 128), 128, patch_size=16), None), recipe)
    batch = a_batch(config, 4)
    for parameter in task.phases[0].parameters:
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            parts = task.forward(batch, False)
        torch.stack(list(task.loss(parts)[0].values())).sum().backward()

    step()
    real = measured(step) + FLOAT * batch.pixel_values.numel()
    estimate = estimate_memory(recipe, config, gpu=False)
    told = estimate.activations + sum(estimate.passing.values()) + estimate.resident["bfloat16 copies"]
    assert 0.95 < told / real < 1.4, (told, real)


def test_activations_of_stage_2_within_a_quarter(tmp_path: Path) -> None:
    config, count = a_config(), 4
    QLIPModel(config).save_pretrained(tmp_path)
    overrides = [
        f"model.init='{tmp_path}'",
        f"batch_size={count}",
        f"micro_batch_size={count}",
        "discriminator.warmup=0",
    ]
    recipe = load_recipe("QLIP-B-16-256/debug-stage2", overrides)
    assert isinstance(recipe, Stage2Recipe)
    processor = QLIPProcessor(Preprocessing((128, 128), 128, patch_size=16), None)
    task = Stage2(load_without_text(tmp_path), processor, recipe, perceptual=LPIPS())
    batch = a_batch(config, count)
    task.before_step(0)

    for phase in task.phases:
        for parameter in phase.parameters:
            parameter.grad = torch.zeros_like(parameter)  # resident
    real = measured(lambda: [backward(phase, [batch]) for phase in task.phases]) + FLOAT * batch.pixel_values.numel()
    told = estimate_memory(recipe, config, gpu=False).activations
    assert 0.8 < told / real < 1.25, (told, real)


def test_the_perceptual_networks_size() -> None:
    assert sum(parameter.numel() for parameter in LPIPS().parameters()) == VGG16_FEATURES


# ---------------------------------------------------------------------- what settings do


def published(*overrides: str, name: str = "QLIP-B-16-256/stage1") -> Any:
    return load_recipe(name, list(overrides)), a_config()


def test_sharding_divides_what_is_resident() -> None:
    recipe, config = published("parallel={kind: fsdp}")
    alone, shared = estimate_memory(recipe, config, 1), estimate_memory(recipe, config, 16)
    for name in ("weights", "gradients", "lamb state"):
        assert shared.resident[name] == alone.resident[name] // 16
    assert shared.resident["bfloat16 copies"] == alone.resident["bfloat16 copies"]
    assert shared.passing["gathered layers"] > 0
    hybrid, _ = published("parallel={kind: fsdp, shard: 8}")
    assert estimate_memory(hybrid, config, 128).resident["weights"] == alone.resident["weights"] // 8
    copies, _ = published()
    assert estimate_memory(copies, config, 128).resident["weights"] == alone.resident["weights"]


def test_a_micro_batch_bounds_activations_whatever_the_batch() -> None:
    totals = []
    for size in (8192, 65536):
        recipe, config = published(f"batch_size={size}", "micro_batch_size=128")
        totals.append(estimate_memory(recipe, config).activations)
        assert samples_at_a_time(recipe, 1) == 128
    assert totals[0] == totals[1]


def test_logits_in_chunks_do_not_grow_with_the_square_of_the_batch() -> None:
    def logits(size: int, chunk: str) -> int:
        recipe, config = published(f"batch_size={size}", f"losses.align.chunk_size={chunk}")
        return estimate_memory(recipe, config).passing["logits"]

    assert logits(65536, "null") == 64 * logits(8192, "null")
    assert logits(65536, "256") == 8 * logits(8192, "256") < 2**30


@pytest.mark.parametrize(
    "override",
    ["activation_checkpointing=true", "precision=bfloat16", "model.locked=[encoder]", "losses.alpha_r=0"],
)
def test_settings_that_save_memory_save_it(override: str) -> None:
    same = ["activation_checkpointing=false", "precision=float32", "micro_batch_size=128", "optimizer.parts={}"]
    plain, config = published(*same)
    changed, _ = published(*same, override)
    assert estimate_memory(changed, config).activations < estimate_memory(plain, config).activations


def test_stage_2_keeps_nothing_of_its_encoder_and_pays_for_its_judges() -> None:
    config = QLIPConfig.named("QLIP-B-16-256")

    def activations(*overrides: str) -> int:
        recipe, _ = published("micro_batch_size=8", *overrides, name="QLIP-B-16-256/stage2")
        return estimate_memory(recipe, config).activations

    whole = activations()
    bare = activations("losses.alpha_p=0", "losses.alpha_g=0", "discriminator=null")
    first, _ = published("micro_batch_size=8", "activation_checkpointing=false")
    # the paper's reason for two stages: the judges cost more than the decoder
    assert bare < 0.6 * estimate_memory(first, config).activations
    assert whole > 1.8 * bare


def test_stage_2_trains_the_bottleneck_and_the_decoder() -> None:
    recipe, config = published(name="QLIP-B-16-256/stage2")
    trained = {name for name, parameter in meta_model(recipe, config).named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith("vision_decoder.") or "quant_embed" in name for name in trained)
    frozen, _ = published("losses.freeze_codes=true", "losses.alpha_q=0", name="QLIP-B-16-256/stage2")
    names = {name for name, parameter in meta_model(frozen, config).named_parameters() if parameter.requires_grad}
    assert trained - names == {name for name in trained if ".quant_embed." in name} != set()
