"""Small random models in checkpoint folders, images, and the command run in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qlip import QLIPConfig, QLIPModel, QLIPProcessor
from qlip.cli.main import run
from qlip.modeling import CLIPTokenizer, Preprocessing

SIDE, PATCH, BITS, WIDTH = 32, 8, 20, 16
TOKEN_BYTES = (SIDE // PATCH) ** 2 * BITS // 8  # 40


def save_checkpoint(folder: Path, seed: int) -> Path:
    """Save a model with random weights, its preprocessing and a vocabulary."""
    torch.manual_seed(seed)
    vocabulary = CLIPTokenizer.train(["a photo of a cat", "a photo of a dog"] * 4, vocab_size=600, length=16)
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        "swiglu": True,
        "subln": True,
        "rope": True,
    }
    bsq = {"embed_dim": BITS, "group_size": 5, "input_format": "blc", "l2_norm": True}
    config = QLIPConfig.from_dict(
        {
            "projection_dim": WIDTH,
            "vision_projection_bias": False,
            "text_projection_bias": False,
            "text_config": {
                "vocab_size": vocabulary.vocab_size,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "max_position_embeddings": 16,
                "bos_token_id": vocabulary.bos,
                "eos_token_id": vocabulary.eos,
                "pad_token_id": vocabulary.pad,
            },
            "vision_config": tower
            | {
                "quantizer": "bsq",
                "quantizer_l2_norm": True,
                "quantizer_embed_type": "mlp",
                "quantizer_cfg": bsq,
            },
            "decoder_config": tower,
        }
    )
    QLIPModel(config).save_pretrained(folder)
    QLIPProcessor(Preprocessing((SIDE, SIDE), SIDE, patch_size=PATCH), vocabulary).save_pretrained(folder)
    return folder


def write_image(path: Path, size: tuple[int, int] = (48, 40), seed: int = 0) -> Path:
    """Save an image of smooth colours in the format that its suffix names."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "one", seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "two", seed=1)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Folder with three images of two sizes, one of them in a subfolder, and a text file."""
    folder = tmp_path / "photos"
    write_image(folder / "cat.png", seed=1)
    write_image(folder / "dog.jpg", (64, 48), seed=2)
    write_image(folder / "sea" / "ship.webp", seed=3)
    (folder / "notes.txt").write_text("not an image")
    return folder


@dataclass
class Ran:
    """Result of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Report on stdout."""
        report: dict[str, Any] = json.loads(self.out)
        return report

    @property
    def error_lines(self) -> list[str]:
        """Lines on stderr."""
        return self.err.splitlines()


Command = Callable[..., Ran]


@pytest.fixture
def qlip(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Run the command in an empty current folder."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def command(*arguments: object) -> Ran:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return command
