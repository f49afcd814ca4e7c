"""Folders of a decoder: saving, loading, refusing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlip import assets
from qlip.errors import QLIPError
from qlip.lm.config import DecoderConfig
from qlip.lm.model import DecoderModel
from tests.lm.test_model import HEADS, conditions, randomized, some_indices, tiny


@pytest.mark.parametrize("kind", HEADS)
def test_folder__round_trip_is_exact(kind: str, tmp_path: Path) -> None:
    config = tiny(head=kind, condition="features", prefix_length=4, code_fingerprint="0" * 64)
    model = randomized(config)
    model.save_pretrained(tmp_path)
    loaded = DecoderModel.from_pretrained(tmp_path)
    assert loaded.config.model_dump() == config.model_dump() and not loaded.training
    indices, condition = some_indices(config), conditions(config)
    assert torch.equal(loaded(indices, condition), model(indices, condition))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qlip_decoder"


def test_folder__of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QLIPError, match="model_type 'clip' is no decoder"):
        DecoderModel.from_pretrained(assets.BUNDLED)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(QLIPError, match=r"config\.json: not JSON"):
        DecoderModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(QLIPError, match="no such file"):
        DecoderModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "nan", "head"])
def test_folder__that_is_damaged_is_one_line(fault: str, tmp_path: Path) -> None:
    randomized(tiny()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    expected = {
        "missing": "'norm.weight' is missing",
        "unexpected": "unexpected tensor 'norm.weigth'",
        "shape": "tensor 'norm.weight' has shape",
        "nan": "not finite|NaN",
        "head": "unexpected tensor 'head.output.weight'|has shape",
    }
    if fault == "missing":
        del weights["norm.weight"]
    elif fault == "unexpected":
        weights["norm.weigth"] = torch.ones(16)
    elif fault == "shape":
        weights["norm.weight"] = torch.ones(3)
    elif fault == "nan":
        weights["norm.weight"] = torch.full((16,), float("nan"))
    else:
        (tmp_path / "config.json").write_text(
            json.dumps(tiny(head="chain").to_dict() | {"model_type": "qlip_decoder"}), encoding="utf-8"
        )
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(QLIPError, match=expected[fault]) as caught:
        DecoderModel.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_tokenizer__of_other_tokens_is_refused() -> None:
    own = DecoderModel(tiny(code_fingerprint="a" * 64))
    own.check_tokenizer("a" * 64, "tokens/")
    with pytest.raises(QLIPError, match="tokens/: its tokens are of another tokenizer"):
        own.check_tokenizer("b" * 64, "tokens/")
    DecoderModel(tiny()).check_tokenizer("b" * 64, "tokens/")


def test_config__is_json(tmp_path: Path) -> None:
    config = tiny(rotary="frequencies", rotary_frequencies=(0.5, 0.25, 1.0, 2.0))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert DecoderConfig.from_file(tmp_path / "config.json") == config
