"""A tiny model and a tar shard of the package's own photographs, small enough to train in a second."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from qlip import QLIPConfig, QLIPModel, QLIPProcessor, assets
from qlip.modeling import CLIPTokenizer, Preprocessing, load_image

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "k_bias": False,
    "rope": True,
    "subln": True,
    "swiglu": True,
}
QUANTIZER = {
    "quantizer": "bsq",
    "quantizer_l2_norm": True,
    "quantizer_embed_type": "mlp",
    "quantizer_cfg": {"embed_dim": 12, "group_size": 4, "input_format": "blc"},
}
CAPTIONS = ["a photo of a cat", "a photo of a dog", "a rocket on its pad", "an astronaut who smiles", "a cup of coffee"]
LENGTH = 16


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint folder with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = CLIPTokenizer.train(CAPTIONS, 560, LENGTH)
    text = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
    }
    torch.manual_seed(0)
    config = QLIPConfig.from_dict(
        {
            "text_config": text,
            "vision_config": TOWER | QUANTIZER,
            "decoder_config": TOWER,
            "projection_dim": 16,
            "vision_projection_bias": True,
            "text_projection_bias": False,
        }
    )
    QLIPModel(config).save_pretrained(folder)
    QLIPProcessor(Preprocessing((32, 32), 32, patch_size=8), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two tar shards of 20 crops each, captioned, as a brace pattern."""
    folder = tmp_path_factory.mktemp("shards")
    images = [load_image(path).resize((96, 96)) for path in sorted(assets.path("images").glob("*.jpg"))]
    for shard in range(2):
        with tarfile.open(folder / f"s-{shard:03d}.tar", "w") as tar:
            for number in range(20):
                left, top = (number * 7) % 40, (number * 11) % 40
                crop = images[(number + shard) % len(images)].crop((left, top, left + 48, top + 48))
                data = io.BytesIO()
                crop.save(data, "PNG")
                caption = CAPTIONS[number % len(CAPTIONS)]
                _add(tar, f"{shard}{number:03d}.png", data.getvalue())
                _add(tar, f"{shard}{number:03d}.json", json.dumps({"caption": caption}).encode())
    return str(folder / "s-{000..001}.tar")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


@pytest.fixture
def recipe_values(checkpoint: Path, shards: str) -> dict:
    """A recipe as YAML would give it: 24 steps of 6 samples, augmented, both losses on."""
    return {
        "name": "test",
        "seed": 3,
        "model": {"init": str(checkpoint)},
        "data": {
            "num_workers": 0,
            "sources": [{"path": shards, "crop_scale": [0.5, 1.0], "flip": 0.5}],
        },
        "batch_size": 6,
        "losses": {"alpha_r": 30, "commitment": 0.25},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "schedule": {"steps": 24, "warmup": 4},
        "threads": 1,
        "checkpoint": {"every": 5, "keep": 2},
        "log": {"every": 3, "images_every": 0, "tensorboard": False},
    }


@pytest.fixture
def recipe_file(recipe_values: dict, tmp_path: Path) -> Path:
    """The recipe in a file."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values))
    return path
