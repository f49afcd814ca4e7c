"""What a recipe trains is what gets a gradient, what optimizers move, and what the estimate of memory counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlip import QLIPError, QLIPModel, QLIPProcessor
from qlip.data.loader.batch import Batch
from qlip.modeling.parts import count_parameters
from qlip.training.accumulate import backward
from qlip.training.dry_run import Device, Needs, parts_of
from qlip.training.recipe import check_recipe
from qlip.training.tasks import Stage1, Stage2
from qlip.training.tasks.plan import plan_for
from qlip.training.tasks.recipe import Stage1Recipe

STAGE_2 = {"stage": 2, "losses": {"alpha_p": 0, "alpha_g": 0}}
TEXT = ("text_model.", "text_projection.", "visual_projection.", "vision_model.post_layernorm.", "logit_scale")
DECODER = ("vision_decoder.", "vision_model.quant_embed_post.")


@pytest.mark.parametrize(
    ("changes", "unmoved"),
    [
        ({}, ()),
        ({"losses": {"alpha_a": 0}}, TEXT),
        ({"losses": {"alpha_r": 0}}, DECODER),
        ({"optimizer": {"parts": {"text": 0}}}, ("text_model.",)),
        (STAGE_2, (*TEXT, "vision_model.embeddings.", "vision_model.encoder.")),
        (
            STAGE_2 | {"losses": {"alpha_p": 0, "alpha_g": 0, "alpha_q": 0, "freeze_codes": True}},
            (*TEXT, "vision_model.embeddings.", "vision_model.encoder.", "vision_model.quant_embed."),
        ),
        (
            STAGE_2 | {"optimizer": {"parts": {"decoder": 0}}},
            (*TEXT, "vision_model.embeddings.", "vision_model.encoder.", "vision_decoder."),
        ),
    ],
)
def test_what_trains_has_a_gradient_and_is_counted(
    recipe_values: dict[str, Any], checkpoint: Path, changes: dict[str, Any], unmoved: tuple[str, ...]
) -> None:
    recipe = check_recipe(recipe_values | {"ema": {}} | changes, "test")
    model, processor = QLIPModel.from_pretrained(checkpoint).train(), QLIPProcessor.from_pretrained(checkpoint)
    moved = {name for name, _ in model.named_parameters() if not name.startswith(unmoved)}
    kind: Any = Stage1 if isinstance(recipe, Stage1Recipe) else Stage2
    task = kind(model, processor, recipe)
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        pixel_values=torch.randn(3, 3, 32, 32, generator=generator),
        input_ids=torch.randint(0, 500, (3, 16), generator=generator),
        has_caption=torch.ones(3, dtype=torch.bool),
        match_ids=torch.arange(3),
        keys=["a", "b", "c"],
        captions=[None] * 3,
    )
    backward(task.phases[0], [batch])
    assert {name for name, one in model.named_parameters() if one.requires_grad} == moved
    assert {name for name, one in model.named_parameters() if one.grad is not None} == moved
    plan = plan_for(recipe, model.config)
    sizes = count_parameters((name, one) for name, one in model.named_parameters() if name in moved)
    assert all(sizes[part.part] == part.trained for part in parts_of(plan))  # type: ignore[index]
    counted = 4 * sum(one.numel() for one in model.parameters() if one.requires_grad)
    resident = Needs(plan, 1, Device("", 0, gpu=False)).of(recipe).resident
    assert resident["gradients"] == resident["moving average"] == counted


@pytest.mark.parametrize(
    ("stage", "changes", "looks", "kept", "remedy"),
    [
        (1, {"log": {"gradients_every": 2}, "locked": ["encoder"]}, "log.gradients_every", "model.locked", "0"),
        (1, {"log": {"gradients_every": 2}, "parts": {"encoder": 0}}, "log.gradients_every", "parts.encoder=0", "0"),
        (1, {"balance": "gradient_norm", "locked": ["encoder"]}, "losses.balance", "model.locked", "fixed"),
        (2, {"log": {"gradients_every": 2}, "locked": ["decoder"]}, "log.gradients_every", "model.locked", "0"),
        (2, {"adaptive": True, "locked": ["decoder"]}, "discriminator.adaptive", "model.locked", "false"),
        (2, {"adaptive": True, "parts": {"decoder": 0}}, "discriminator.adaptive", "parts.decoder=0", "false"),
    ],
)
def test_gradients_are_looked_at_only_where_something_trains(
    recipe_values: dict[str, Any], stage: int, changes: dict[str, Any], looks: str, kept: str, remedy: str
) -> None:
    """Said of the recipe, so before anything is loaded, in a dry run as well; other parts may be locked."""

    def values(locked: list[str], parts: dict[str, float]) -> dict[str, Any]:
        found = recipe_values | {"stage": stage, "log": changes.get("log", {})}
        found["losses"] = {"alpha_p": 0} if stage == 2 else {"balance": changes.get("balance", "fixed")}
        if stage == 2:
            found["discriminator"] = {"adaptive": changes.get("adaptive", False)}
        found["model"] = recipe_values["model"] | {"locked": locked}
        return found | {"optimizer": {"parts": parts}}

    with pytest.raises(QLIPError) as raised:
        check_recipe(values(changes.get("locked", []), changes.get("parts", {})), "test")
    said = str(raised.value)
    assert looks in said and kept in said and f"set {looks}={remedy}" in said and "\n" not in said
    other = "decoder" if stage == 1 else "encoder"
    check_recipe(values([other], {other: 0}), "test")
