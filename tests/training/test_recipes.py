"""The packaged recipes: the published ones hold the paper's table, and each has a debug twin like it."""

from __future__ import annotations

from typing import Any

import pytest

from qlip import QLIPConfig, QLIPModel, recipes
from qlip.data.sources.open import open_path
from qlip.modeling.config import TowerConfig
from qlip.training import load_recipe
from qlip.training.tasks.recipe import Stage1Recipe, Stage2Recipe

PUBLISHED = ("QLIP-B-16-256", "QLIP-B-8-256", "QLIP-L-14-392")
FOLDERS = (*PUBLISHED, "single-gpu")
DEBUG_CONFIGS = {"QLIP-B-16-256": "B-16", "QLIP-B-8-256": "B-8", "QLIP-L-14-392": "L-14", "single-gpu": "B-16"}

# (paper, table of hyper-parameters)
STAGE1 = {
    "optimizer.name": "lamb",
    "optimizer.betas": (0.9, 0.95),
    "optimizer.weight_decay": 0.05,
    "optimizer.lr": 5e-4,
    "optimizer.parts": {"encoder": 2e-4, "text": 2e-5, "decoder": 2e-3},
    "optimizer.clip": 5.0,
    "schedule.warmup": 2000,
    "schedule.steps": 120_000,
    "schedule.floor": 0.0,
    "batch_size": 65_536,
    "losses.alpha_r": 1e3,
    "losses.alpha_a": 1.0,
    "losses.alpha_q": 1.0,
    "losses.commitment": 1.0,
    "losses.balance": "fixed",
    "losses.align.kind": "infonce",
}
STAGE2 = {
    "optimizer.name": "adamw",
    "optimizer.betas": (0.9, 0.95),
    "optimizer.weight_decay": 0.05,
    "optimizer.lr": 5e-4,
    "optimizer.parts": {"encoder": 0.0, "decoder": 1e-4},
    "optimizer.clip": 1.0,
    "discriminator.lr": 1e-4,
    "discriminator.betas": (0.9, 0.95),
    "discriminator.weight_decay": 0.05,
    "discriminator.adaptive": False,
    "schedule.warmup": 2000,
    "schedule.steps": 120_000,
    "schedule.floor": 0.0,
    "batch_size": 16_384,
    "losses.alpha_r": 1.0,
    "losses.alpha_q": 1.0,
    "losses.alpha_p": 0.1,
    "losses.alpha_g": 0.1,
    "losses.commitment": 0.0,
    "losses.freeze_codes": False,
}


def value(recipe: Any, key: str) -> Any:
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe


@pytest.mark.parametrize("key", STAGE1)
@pytest.mark.parametrize("name", PUBLISHED)
def test_stage_1_holds_the_papers_table(name: str, key: str) -> None:
    recipe = load_recipe(f"{name}/stage1")
    assert isinstance(recipe, Stage1Recipe)
    assert value(recipe, key) == STAGE1[key]


@pytest.mark.parametrize("key", STAGE2)
@pytest.mark.parametrize("name", PUBLISHED)
def test_stage_2_holds_the_papers_table(name: str, key: str) -> None:
    recipe = load_recipe(f"{name}/stage2")
    assert isinstance(recipe, Stage2Recipe)
    assert value(recipe, key) == STAGE2[key]


@pytest.mark.parametrize(("stage", "share"), [("stage1", 512), ("stage2", 128)])
def test_a_devices_share_is_the_papers(stage: str, share: int) -> None:
    recipe = load_recipe(f"QLIP-B-8-256/{stage}")
    assert recipe.batch_size == 128 * share  # 128 devices
    assert recipe.micro_batch_size is not None and share % recipe.micro_batch_size == 0


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_single_gpus_recipe_keeps_losses_and_optimizer(stage: str) -> None:
    full, single = load_recipe(f"QLIP-B-16-256/{stage}"), load_recipe(f"single-gpu/{stage}")
    assert single.losses.model_dump(exclude={"align"}) == full.losses.model_dump(exclude={"align"})
    scale = (single.batch_size / full.batch_size) ** 0.5
    assert single.optimizer.name == full.optimizer.name
    assert single.optimizer.lr == pytest.approx(full.optimizer.lr * scale)
    assert single.optimizer.parts == pytest.approx({part: r * scale for part, r in full.optimizer.parts.items()})
    assert single.accumulation == "exact" and single.parallel.kind == "ddp"


@pytest.mark.parametrize("folder", FOLDERS)
def test_stages_follow_each_other(folder: str) -> None:
    first, second = load_recipe(f"{folder}/stage1"), load_recipe(f"{folder}/stage2")
    assert (first.task, second.task) == ("stage1", "stage2")
    assert first.model.init is not None  # towers that qlip convert made
    assert second.model.init == f"runs/{folder}/stage1/model"  # where the first one leaves its model
    debug = load_recipe(f"{folder}/debug-stage2")
    assert debug.model.init == f"runs/{folder}/debug-stage1/model"


def test_what_the_paper_leaves_open_is_marked() -> None:
    open_keys = ("precision", "activation_checkpointing", "parallel", "seed", "checkpoint", "ema", "kind: patchgan")
    for folder in FOLDERS:
        for stage in ("stage1", "stage2"):
            text = (recipes.folder() / folder / f"{stage}.yaml").read_text()
            for line in text.splitlines():
                if line.strip().startswith(open_keys):
                    assert "# ours" in line, f"{folder}/{stage}: {line}"


# ---------------------------------------------------------------------- debug twins


def tower_options(config: TowerConfig) -> dict[str, object]:
    """What a tower is, but for its sizes."""
    names = "hidden_act layer_norm_eps q_bias k_bias v_bias subln swiglu rope".split()
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_full_recipe_has_its_debug_twin(folder: str, stage: str) -> None:
    full, debug = load_recipe(f"{folder}/{stage}"), load_recipe(f"{folder}/debug-{stage}")
    same = ["losses.alpha_r", "losses.alpha_q", "losses.commitment", "optimizer", "accumulation", "ema"]
    same += ["activation_checkpointing", "parallel.kind"]
    if stage == "stage1":
        same += ["losses.alpha_a", "losses.align.kind", "losses.align.share_targets"]
    else:
        same += ["losses.alpha_p", "losses.alpha_g", "discriminator.kind", "discriminator.loss", "discriminator.lr"]
    for key in same:
        assert value(debug, key) == value(full, key), key
    if isinstance(full, Stage1Recipe) and isinstance(debug, Stage1Recipe):
        assert (full.losses.align.chunk_size is None) == (debug.losses.align.chunk_size is None)
    assert debug.micro_batch_size is not None and debug.micro_batch_size < debug.batch_size
    assert debug.precision == "float32"
    assert [source.path for source in debug.data.sources] == ["bundled"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_debug_twins_architecture_is_of_the_family(folder: str) -> None:
    name = "QLIP-B-16-256" if folder == "single-gpu" else folder
    full, debug = QLIPConfig.named(name), QLIPConfig.named(f"debug-{DEBUG_CONFIGS[folder]}")
    assert load_recipe(f"{folder}/debug-stage1").model.config == f"debug-{DEBUG_CONFIGS[folder]}"
    for tower in ("text_config", "vision_config", "decoder_config"):
        assert tower_options(getattr(debug, tower)) == tower_options(getattr(full, tower))
    for key in ("patch_size", "quantizer_cfg", "quantizer_embed_type", "quantizer_l2_norm"):
        assert getattr(debug.vision_config, key) == getattr(full.vision_config, key)
    assert (debug.vision_config.hidden_size_post_q is None) == (full.vision_config.hidden_size_post_q is None)
    assert debug.text_projection_bias == full.text_projection_bias
    assert debug.vision_projection_bias == full.vision_projection_bias
    assert sum(parameter.numel() for parameter in QLIPModel(debug).parameters()) < 2e6


def test_recipes__bundled_images_have_captions_and_labels() -> None:
    images = open_path("bundled")
    samples = [images.read(index) for index in range(len(images))]
    assert len(samples) == 18 and all(sample.captions and sample.label for sample in samples)
    assert sum(sample.label == "cat" for sample in samples) == 2  # a photograph and a drawing mean the same
