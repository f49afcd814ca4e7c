"""The packaged recipes of vision-language models: LLaVA's published numbers, and twins that train in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qlip.cli.main import run as qlip
from qlip.lm.causal_config import CausalConfig
from qlip.training import load_recipe
from qlip.training.dry_run import dry_run
from qlip.vlm.config import VLMConfig

STAGE1 = {
    "train": ("projector",),
    "model.template": "plain",
    "optimizer.lr": 1e-3,
    "batch_size": 256,
    "schedule.warmup": 66,
    "data.pad_images": False,
}
STAGE2 = {
    "train": ("projector", "llm"),
    "model.template": "v1",
    "optimizer.lr": 2e-5,
    "batch_size": 128,
    "schedule.warmup": 156,
    "data.pad_images": True,
}
LORA = STAGE2 | {
    "optimizer.lr": 2e-4,
    "optimizer.parts": {"projector": 2e-5},
    "lora.rank": 128,
    "lora.alpha": 256.0,
    "lora.dropout": 0.05,
}
BOTH = {
    "data.max_length": 2048,
    "schedule.floor": 0.0,
    "optimizer.weight_decay": 0.0,
    "optimizer.name": "adamw",
    "precision": "bfloat16",
}
"""LLaVA 1.5's scripts (v1_5/pretrain.sh, finetune.sh and finetune_lora.sh)."""
VICUNA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}


def value(recipe: Any, key: str) -> Any:
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe


@pytest.mark.parametrize(("name", "published"), [("stage1", STAGE1), ("stage2", STAGE2), ("lora", LORA)])
def test_llava__published_numbers(name: str, published: dict[str, Any]) -> None:
    recipe = load_recipe(f"llava/vicuna-7b-{name}")
    assert {key: value(recipe, key) for key in published | BOTH} == published | BOTH
    samples = 558_128 if name == "stage1" else 665_298
    assert recipe.schedule.steps == -(-samples // recipe.batch_size)


@pytest.fixture
def vicuna(tmp_path: Path) -> Path:
    """A folder with the configuration of Vicuna-7B alone, with 2 of its 32 layers."""
    (tmp_path / "config.json").write_text(json.dumps(CausalConfig.from_dict(VICUNA).to_dict()))
    return tmp_path


def test_llava__dry_run_of_stage1_counts_the_frozen_networks(vicuna: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vicuna in bfloat16; the projector reads 1,024 features of L/14 for 784 tokens of a 392-pixel image."""
    config = Path(__file__).parents[3] / "src/qlip/assets/configs/QLIP-L-14-392.json"
    (vicuna / "eye").mkdir()
    (vicuna / "eye/config.json").write_text(config.read_text())
    settings = [f"model.llm={vicuna}", f"model.vision_tower={vicuna / 'eye'}"]
    found = dry_run(load_recipe("llava/vicuna-7b-stage1", settings), world=8, memory=80)
    assert [(one.part, one.trained) for one in found.parts] == [("projector", 1024 * 4096 + 4096 + 4096**2 + 4096)]
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert found.memory.resident["llm"] == 2 * (2 * 32000 * 4096 + 2 * layer + 4096)
    assert found.units == {"tokens": 2048.0, "image tokens": 784.0}


def test_debug__trains_answers_and_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert qlip(["train", "vlm/debug", "log.tensorboard=false", "-o", str(folder)]) == 0
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "val/questions seen/right" in line]
    assert len(measured) == 2 and all(0 <= line["val/questions seen/shuffled"] <= 100 for line in measured)
    assert (folder / "model/tokenizer.json").is_file()


def test_llava_debug__both_stages_train_on_a_file_of_conversations(tmp_path: Path, llm_folder: Path) -> None:
    """Four samples of which one has no image file: it is counted and named, and the others train."""
    items = []
    for number in range(4):
        if number:
            Image.new("RGB", (80, 40), (60 * number, 10, 200)).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"a {number} red square"}]
        items.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "c.json").write_text(json.dumps(items))
    data = [f"data.conversations={tmp_path / 'c.json'}", f"data.images={tmp_path}", "log.tensorboard=false"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert qlip(["train", "llava/debug-stage1", f"model.llm={llm_folder}", *data, "-o", str(one)]) == 0
    assert qlip(["train", "llava/debug-stage2", f"model.init={one / 'model'}", *data, "-o", str(two)]) == 0
    for folder in (one, two):
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [line["dropped"] for line in lines if "dropped" in line] == [1, 1, 1, 1]
    config = VLMConfig.from_file(two / "model/config.json")
    assert (config.template, config.pad_images, config.language_model) == ("v1", True, None)
