"""Tiny vision-language models with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qlip.lm.causal import CausalModel
from qlip.lm.causal_config import CausalConfig
from qlip.lm.tokenizer import CONTROL_TOKENS, LLMTokenizer
from qlip.lm.vocabulary import train_tokenizer
from qlip.modeling.model import QLIPModel
from qlip.modeling.processor import QLIPProcessor
from qlip.training import run
from qlip.training.recipe import check_recipe
from qlip.vlm.chat import VisionChat
from qlip.vlm.config import VLMConfig
from qlip.vlm.model import VisionLanguageModel, load_tower

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
}
"""Sizes of a tiny text decoder, without its vocabulary."""


def tiny(vocab_size: int = 300, pool: int = 2, layer: int | str = -2, **changes: Any) -> VisionLanguageModel:
    """A model of the bundled tower, 16 tokens per image, whose outputs differ at every position."""
    qlip = QLIPModel.from_pretrained("bundled")
    text = CausalConfig.from_dict(TEXT | {"vocab_size": vocab_size})
    values = {
        "model_type": "qlip_vlm",
        "vision_fingerprint": qlip.code_fingerprint,
        "vision_config": qlip.config.vision_config.to_dict(),
        "layer": layer,
        "pool": pool,
        "template": "qa",
        "text_config": text.to_dict(),
    }
    torch.manual_seed(0)
    model = VisionLanguageModel.from_parts(
        VLMConfig.from_dict(values | changes), load_tower("bundled"), CausalModel(text)
    )
    for part in (model.projector, model.llm):
        for weight in part.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


@pytest.fixture(scope="session")
def vlm() -> VisionLanguageModel:
    """A tiny model; tests leave it as it is."""
    return tiny()


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory, vlm: VisionLanguageModel) -> Path:
    """Its folder, without a tokenizer."""
    folder = tmp_path_factory.mktemp("vlm") / "vlm"
    vlm.save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, texts: list[str]) -> None:
    """Train a byte-level vocabulary and save it as transformers does."""
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[*special.values(), *sorted(CONTROL_TOKENS)],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | special))


@pytest.fixture(scope="session")
def talker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model that can chat: a byte-level vocabulary, 16 tokens per image, 512 positions."""
    folder = tmp_path_factory.mktemp("talker") / "talker"
    folder.mkdir()
    save_tokenizer(folder, ["What colour is the circle?", "And the square?", "red", "dark blue", "Which is larger?"])
    tokenizer = LLMTokenizer.from_folder(folder)
    tiny(tokenizer.size).save_pretrained(folder)
    QLIPProcessor(QLIPProcessor.from_pretrained("bundled").preprocessing).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def talker(talker_folder: Path) -> Callable[[], VisionChat]:
    """Makes chats with that model, which they share."""
    one = VisionChat.from_pretrained(talker_folder, device="cpu")
    return lambda: VisionChat(one.model, one.tokenizer, one.preprocessing, name=one.name)


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text decoder with a tokenizer."""
    folder = tmp_path_factory.mktemp("llm") / "llm"
    words = "What colour is the red green blue circle square cross triangle? yes no one two three left right top"
    tokenizer = train_tokenizer([words] * 3, 320)
    torch.manual_seed(1)
    CausalModel(CausalConfig.from_dict(TEXT | {"vocab_size": tokenizer.size})).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def stage1(llm_folder: Path) -> dict[str, Any]:
    """Recipe of the projector alone, on single questions."""
    return {
        "name": "stage1",
        "task": "vlm",
        "model": {"llm": str(llm_folder), "pool": 2, "template": "qa"},
        "data": {"questions": "train", "captions": 0.25, "max_length": 64},
        "train": ["projector"],
        "batch_size": 4,
        "optimizer": {"lr": 1e-2, "weight_decay": 0.0},
        "schedule": {"steps": 4, "warmup": 1},
        "threads": 1,
        "checkpoint": {"every": 2, "keep": 10},
        "log": {"every": 1, "tensorboard": False},
    }


def train(values: dict[str, Any], folder: Path) -> Path:
    """Run a recipe; returns the folder of the model."""
    return run(check_recipe(values, "test"), folder, Console(quiet=True)).model
