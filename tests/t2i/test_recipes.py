"""The packaged recipes of decoders: LlamaGen's published numbers, and debug twins that train, resume and draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlip import recipes
from qlip.cli.main import run as qlip
from qlip.lm import DecoderModel
from qlip.t2i import settings, task
from qlip.t2i.drawer import Drawer
from qlip.training import load_recipe
from qlip.training.plan import make_plan
from tests.archive.made import made
from tests.t2i.test_llamagen_codes import write

LLAMAGEN = ("llamagen/B", "llamagen/L", "llamagen/XL", "llamagen/XL-t2i")
# (arXiv 2406.06525 and its repository's scripts)
PUBLISHED = {
    "optimizer.name": "adamw",
    "optimizer.lr": 1e-4,
    "optimizer.betas": (0.9, 0.95),
    "optimizer.weight_decay": 0.05,
    "optimizer.decay_embeddings": True,
    "optimizer.clip": 1.0,
    "schedule.warmup": 0,
    "schedule.floor": 1.0,
    "batch_size": 256,
    "condition_dropout": 0.1,
    "precision": "bfloat16",
    "ema": None,
}


class FlanT5XL:
    """The sizes of FLAN-T5-XL's features."""

    name, size, length, fingerprint = "t5:google/flan-t5-xl", 2048, 120, "f" * 64

    def features(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(texts), 120, 2048), torch.ones(len(texts), 120, dtype=torch.bool)

    def unread(self, text: str) -> str | None:
        return None


@pytest.fixture
def flan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "open_text_encoder", lambda name: FlanT5XL())
    monkeypatch.setattr(task, "CachedTextEncoder", lambda encoder: encoder)


def value(recipe: Any, key: str) -> Any:
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe


@pytest.mark.parametrize("name", LLAMAGEN)
def test_llamagen__published_numbers(name: str) -> None:
    recipe = load_recipe(name)
    assert {key: value(recipe, key) for key in PUBLISHED} == PUBLISHED
    config = recipe.model.build(grid=(2, 2), codebook_size=4, condition_size=3)  # type: ignore[attr-defined]
    assert (config.embedding_dropout, config.residual_dropout, config.ffn_dropout) == (0.1, 0.1, 0.1)
    assert config.attention_dropout == 0 and config.rotary == "axial" and config.prefix_rotary == "zero"


def test_llamagen__c2i_runs_for_300_epochs() -> None:
    """Of 5,004 batches: the last one of ImageNet's 1,281,167 images is left out where it is not full."""
    for name in LLAMAGEN[:3]:
        assert load_recipe(name).schedule.steps == 300 * (1_281_167 // 256)


def planned(name: str, *overrides: str) -> Any:
    return make_plan(load_recipe(name, list(overrides)))


@pytest.mark.parametrize(
    ("name", "side", "parameters"), [("B", 16, 110_888_448), ("L", 16, 342_910_976), ("XL", 24, 774_699_520)]
)
def test_llamagen__parameters_of_the_class_conditional_decoders(
    tmp_path: Path, name: str, side: int, parameters: int
) -> None:
    plan = planned(f"llamagen/{name}", f"data.codes=[{write(tmp_path / 'codes', side=side)}]")
    assert plan.task.decoder.num_parameters() == parameters
    (optimizer,) = plan.task.phases[0].optimizers
    decays = {key: group["weight_decay"] for group in optimizer.param_groups for key in group["param_names"]}
    matrices = {key for key, one in plan.task.decoder.named_parameters() if one.ndim >= 2}
    assert {key for key, decay in decays.items() if decay} == matrices > {"tok_embeddings.weight"}


def test_llamagen__parameters_of_the_decoder_of_captions(flan: None, tmp_path: Path) -> None:
    layout = made(tmp_path / "t", parts=1, grid=(16, 16), bits=14, group_size=14, embedding_dim=None)
    plan = planned("llamagen/XL-t2i", f"data.tokens={layout.address}")
    assert plan.task.decoder.num_parameters() == 777_678_080
    assert plan.batch.values.shape == (4, 120, 2048) and plan.task.decoder.config.text_encoder == FlanT5XL.name


def test_qlip_llamagen__two_groups_of_14_bits_with_a_depth_head(flan: None, tmp_path: Path) -> None:
    layout = made(tmp_path / "t", parts=1, grid=(16, 16), embedding_dim=None)
    plan = planned("qlip-llamagen/XL", f"data.tokens={layout.address}")
    config = plan.task.decoder.config
    assert (config.num_tokens, config.num_groups, config.codebook_size) == (256, 2, 16384)
    assert (config.head.kind, config.head.num_layers) == ("depth", 4)
    assert (config.condition, config.condition_size, config.prefix_length) == ("features", 2048, 120)
    recipe = load_recipe("qlip-llamagen/XL")
    assert recipe.batch_size == 1024 and recipe.optimizer.lr == 3e-4 and value(recipe, "condition_dropout") == 0.1


def test_recipes__what_is_left_open_is_marked() -> None:
    for name in (*LLAMAGEN, "qlip-llamagen/XL"):
        for line in (recipes.folder() / f"{name}.yaml").read_text().splitlines():
            if line.strip().startswith(("checkpoint", "codes:", "tokens:")):
                assert "# ours" in line, f"{name}: {line}"


@pytest.mark.parametrize(
    ("full", "debug"),
    [
        ("llamagen/B", "llamagen/debug"),
        ("qlip-llamagen/XL", "qlip-llamagen/debug"),
        ("t2i/scenes", "t2i/debug-scenes"),
        ("t2i/own", "t2i/debug-own"),
    ],
)
def test_debug_twins__have_the_options_of_the_full_recipe(full: str, debug: str) -> None:
    one, other = load_recipe(full), load_recipe(debug)
    for key in ("optimizer", "condition_dropout", "drawing", "data.scenes", "data.group_size", "data.condition", "ema"):
        assert value(one, key) == value(other, key), key
    assert bool(value(one, "data.codes")) == bool(value(other, "data.codes"))
    assert one.schedule.floor == other.schedule.floor and other.schedule.steps <= 6


def test_debug_twins__train_and_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "codes", side=4)
    assert qlip(["tokenize", "bundled", "-o", "tokens"]) == 0
    for name in ("llamagen/debug", "qlip-llamagen/debug", "t2i/debug-scenes", "t2i/debug-own"):
        assert qlip(["train", name, "checkpoint.every=100", "log.tensorboard=false"]) == 0
        model = DecoderModel.from_pretrained(f"runs/{name}/model")
        drawing = value(load_recipe(name), "drawing")
        if drawing is not None:
            found = settings.DrawSettings.from_folder(Path(f"runs/{name}/model"))
            assert (found.guidance, found.top_k) == (f"{drawing.guidance:g}", drawing.top_k or 0)
        assert model.num_parameters() < 2e6
    drawer = Drawer.from_pretrained("runs/t2i/debug-own/model", device="cpu")
    [image] = drawer("a red circle", generator=torch.Generator().manual_seed(0)).images
    assert image.size == (64, 64) and drawer.settings.guidance == "2"
