"""LlamaGen's files: each form that is published, and those that are refused in one line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qlip.errors import QLIPError
from qlip.lm.config import DecoderConfig
from qlip.lm.llamagen import read_llamagen, to_llamagen
from qlip.lm.model import DecoderModel
from tests.lm.llamagen import MODELS, Fixture
from tests.lm.test_model import tiny

OPTIONS = argparse.Namespace(gpt_model="GPT-XL", image_size=64, downsample_size=16, results_dir="results")
"""64 / 16 = 4 tokens per side, as in the fixtures."""


def published(weights: dict[str, Tensor], form: str) -> dict[str, Any]:
    """What LlamaGen's scripts save."""
    if form == "DDP":
        adam = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}
        return {"model": weights, "optimizer": adam, "steps": 100, "args": OPTIONS}
    if form == "DeepSpeed":
        return {"module": weights, "args": OPTIONS}
    return {"state_dict": weights} if form == "state_dict" else dict(weights)


@pytest.mark.parametrize("form", ["DDP", "DeepSpeed", "state_dict", "FSDP", "safetensors"])
def test_read__every_published_form(form: str, tmp_path: Path) -> None:
    fixture = Fixture("t2i")
    path = tmp_path / ("t2i.safetensors" if form == "safetensors" else "t2i.pt")
    if form == "safetensors":
        save_file(fixture.weights, path)
    else:
        torch.save(published(fixture.weights, form), path)
    told = form in ("DDP", "DeepSpeed")
    found = read_llamagen(path, heads=4, grid=None if told else (4, 4))
    assert found.model.config.grid == (4, 4) and not found.notes and not found.model.training
    ours = fixture.model(fixture.indices, fixture.condition)
    assert torch.equal(found.model(fixture.indices, fixture.condition), ours)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip__is_exact(name: str, tmp_path: Path) -> None:
    fixture = Fixture(name)
    torch.save(fixture.weights, tmp_path / "in.pt")
    values, config = fixture.values, fixture.config
    model = read_llamagen(tmp_path / "in.pt", heads=values["n_head"], grid=config.grid).model
    sizes = model.config.to_dict()
    assert {**sizes, "embedding_dropout": 0.0, "residual_dropout": 0.0, "ffn_dropout": 0.0} == {
        **config.to_dict(),
        "num_key_value_heads": None if values["n_kv_head"] == values["n_head"] else values["n_kv_head"],
    }
    back = to_llamagen(model)
    assert back.keys() == fixture.weights.keys()
    assert all(torch.equal(back[key], one) for key, one in fixture.weights.items())


def test_read__leaves_out_tables_and_caches(tmp_path: Path) -> None:
    fixture = Fixture("c2i")
    cache = {f"layers.{i}.attention.kv_cache.{one}_cache": torch.zeros(2, 4, 17, 12) for i in (0, 1) for one in "kv"}
    tables = {"freqs_cis": torch.zeros(17, 6, 2), "causal_mask": torch.ones(2, 17, 17, dtype=torch.bool)}
    torch.save({"model": fixture.weights | cache | tables, "args": OPTIONS}, tmp_path / "c2i.pt")
    model = read_llamagen(tmp_path / "c2i.pt", heads=4).model
    assert to_llamagen(model).keys() == fixture.weights.keys()


@pytest.mark.parametrize(("name", "condition"), [("LlamaGen-B", "class"), ("LlamaGen-XL", "features")])
def test_read__knows_the_heads_of_published_sizes(
    name: str, condition: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of real shapes, all zeros of one element in memory and on disk."""
    config = DecoderConfig.named(name, condition=condition)
    with torch.device("meta"):
        shapes = {key: one.shape for key, one in to_llamagen(DecoderModel(config)).items()}
    torch.save({key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}, tmp_path / "big.pt")
    monkeypatch.setattr("qlip.lm.llamagen.require_finite", lambda *_: None)
    found = read_llamagen(tmp_path / "big.pt")
    assert found.model.config.to_dict() == config.to_dict() | {"intermediate_size": config.ffn_width}
    assert len(found.notes) == 1 and "taken as 16 x 16" in found.notes[0]


class Evil:
    """Makes a folder when it is unpickled by a reader that runs what it reads."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("where", ["beside", "inside args"])
def test_read__pickled_code_is_not_run(where: str, tmp_path: Path) -> None:
    evil, path = Evil(tmp_path / "ran"), tmp_path / "evil.pt"
    content = {"model": Fixture("c2i").weights}
    torch.save(content | ({"args": argparse.Namespace(a=evil)} if where == "inside args" else {"hook": evil}), path)
    with pytest.raises(QLIPError, match=r"holds Python objects \(\w+\.mkdir\), which are never loaded"):
        read_llamagen(path)
    assert not (tmp_path / "ran").exists()


def edited(fault: str) -> Any:
    weights = dict(Fixture("c2i").weights)
    if fault == "another model":
        return {"encoder.conv_in.weight": torch.zeros(3)}
    if fault == "no dict":
        return [1, 2]
    if fault == "missing":
        del weights["norm.weight"]
    if fault == "unexpected":
        weights["layers.0.attention.wqkv.bias"] = torch.zeros(3)
    if fault == "shape":
        weights["layers.1.attention.wo.weight"] = torch.zeros(48, 47)
    if fault == "nan":
        weights["norm.weight"] = torch.full((48,), float("nan"))
    if fault == "condition":
        del weights["cls_embedding.embedding_table.weight"]
    return weights


@pytest.mark.parametrize(
    ("fault", "heads", "said"),
    [
        ("another model", 4, "no decoder of LlamaGen: it has no matrix 'tok_embeddings.weight'"),
        ("no dict", 4, "holds a list, not a state dict"),
        ("missing", 4, "tensor 'norm.weight' is missing"),
        ("unexpected", 4, "unexpected tensor 'layers.0.attention.wqkv.bias'"),
        ("shape", 4, r"tensor 'layers.1.attention.wo.weight' has shape \(48, 47\), the others make it \(48, 48\)"),
        ("nan", 4, "'norm.weight' hold NaN"),
        ("condition", 4, "has neither 'cls_embedding.uncond_embedding'"),
        ("heads", None, "2 layers of width 48 are no size of LlamaGen's"),
        ("heads", 5, "5 heads do not divide the width 48"),
        ("heads", 16, "needs a head_dim that is a multiple of 4"),
    ],
)
def test_read__faults_are_one_line(fault: str, heads: int | None, said: str, tmp_path: Path) -> None:
    torch.save(edited(fault), tmp_path / "file.pt")
    with pytest.raises(QLIPError, match=said) as caught:
        read_llamagen(tmp_path / "file.pt", heads=heads, grid=(4, 4))
    assert "\n" not in str(caught.value) and "file.pt" in str(caught.value)


def test_read__key_value_heads_that_fit_no_heads_are_one_line(tmp_path: Path) -> None:
    torch.save(Fixture("c2i_gqa").weights, tmp_path / "file.pt")
    with pytest.raises(QLIPError, match="has 128 rows, which fit no number of key-value heads of width 64"):
        read_llamagen(tmp_path / "file.pt", heads=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": "chain"}, "head 'chain': LlamaGen's decoders have a flat head"),
        ({"head": "flat", "num_groups": 1}, "rotary 'raster': LlamaGen's decoders have 'axial'"),
        ({"head": "flat", "rotary": "axial", "prefix_rotary": "zero"}, "num_groups 3: LlamaGen's decoders have 1"),
    ],
)
def test_to_llamagen__of_another_model_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(QLIPError, match=said):
        to_llamagen(DecoderModel(tiny(**changes)))
