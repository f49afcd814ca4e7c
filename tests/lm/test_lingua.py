"""Checkpoints of lingua: a stock model's numbers from its names and rows, round trips, faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlip.errors import QLIPError
from qlip.lm.causal import CausalModel, config_of, stock_weights
from qlip.lm.export.lingua import lingua_weights, own_lingua_weights
from qlip.modeling.checkpoint import Files

FIXTURES = Path(__file__).parents[1] / "fixtures" / "decoder"
NAMES = pytest.mark.parametrize("name", ["llama_untied", "qwen3_untied"])


@NAMES
def test_lingua_weights__are_stock_ones_with_permuted_rows(name: str) -> None:
    model = CausalModel.from_pretrained(FIXTURES / name)
    config = model.config
    ours, theirs = lingua_weights(model.state_dict(), config), stock_weights(model.state_dict(), config)
    for part, heads in (("q", config.num_attention_heads), ("k", config.kv_heads)):
        rows = theirs[f"model.layers.1.self_attn.{part}_proj.weight"].view(heads, 2, config.head_width // 2, -1)
        assert torch.equal(ours[f"layers.1.attention.w{part}.weight"], rows.transpose(1, 2).flatten(0, 2))
        if config.qk_norm:
            norm = theirs[f"model.layers.1.self_attn.{part}_norm.weight"].view(2, -1)
            assert torch.equal(ours[f"layers.1.attention.{part}_norm.weight"], norm.T.flatten())
    again = own_lingua_weights(ours, config)
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], one) for name, one in model.state_dict().items())


@NAMES
@torch.no_grad()
def test_lingua_folder__is_the_stock_model_that_it_was(name: str, tmp_path: Path) -> None:
    model = CausalModel.from_pretrained(FIXTURES / name)
    model.save_lingua(tmp_path / "lingua")
    stored = load_file(tmp_path / "lingua" / "model.safetensors")
    assert {"tok_embeddings.weight", "output.weight", "layers.0.attention.wk.weight"} < stored.keys()
    loaded = CausalModel.from_pretrained(tmp_path / "lingua")
    loaded.save_pretrained(tmp_path / "stock")
    expected = load_file(FIXTURES / name / "outputs.safetensors")["logits"]
    ids = load_file(FIXTURES / name / "inputs.safetensors")["input_ids"]
    for one in (loaded, CausalModel.from_pretrained(tmp_path / "stock")):
        torch.testing.assert_close(one(ids), expected, atol=1e-5, rtol=0)
    sizes = loaded.config.to_dict()
    assert sizes.items() >= {"rope_theta": model.config.rope_theta, "rms_norm_eps": model.config.rms_norm_eps}.items()


def lingua_folder(folder: Path, **changes: Any) -> Path:
    """A checkpoint with the settings of the run that wrote it."""
    model = CausalModel.from_pretrained(FIXTURES / "llama_untied")
    model.save_lingua(folder)
    args = json.loads((folder / "params.json").read_text())["model"]
    # lingua's own width: two thirds of 4 dim, times the multiplier, rounded down, then up to the multiple
    width = int(args["ffn_dim_multiplier"] * int(2 * 4 * args["dim"] / 3))
    assert width == model.config.intermediate_size and args["multiple_of"] == 1
    values = {"name": "run", "optim": {"lr": 3e-4}, "model": args | changes}
    (folder / "params.json").write_text(json.dumps(values))
    return folder


def test_config_of__a_lingua_folder_needs_no_weights_in_memory(tmp_path: Path) -> None:
    model = CausalModel.from_pretrained(FIXTURES / "qwen3_untied")
    model.save_lingua(tmp_path)
    found = config_of(Files(tmp_path))
    ids = {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert {name for name, one in found if getattr(model.config, name) != one} <= ids


def test_lingua_folder__with_tied_weights(tmp_path: Path) -> None:
    config = CausalModel.from_pretrained(FIXTURES / "llama_untied").config
    model = CausalModel(config.model_copy(update={"tie_word_embeddings": True}))
    model.save_lingua(tmp_path)
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(CausalModel.from_pretrained(tmp_path)(ids), model(ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 512}, "params.json: sliding_window"),
        ({"alibi": True}, "params.json: unknown key 'alibi'"),
        ({"dim": 96}, "tensor '.*' has shape"),
        ({"n_kv_heads": 3}, "num_key_value_heads 3 does not divide"),
    ],
)
def test_lingua_folder__that_the_model_cannot_hold(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = lingua_folder(tmp_path, **changes)
    with pytest.raises(QLIPError, match=message) as caught:
        CausalModel.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_lingua_folder__of_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    folder = lingua_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "consolidated.pth")
    with pytest.raises(QLIPError, match=r"consolidated.pth is a pickle and is never loaded: convert it to safetensors"):
        CausalModel.from_pretrained(folder)


def test_save_lingua__refuses_scaled_rotary_frequencies(tmp_path: Path) -> None:
    config = CausalModel.from_pretrained(FIXTURES / "llama_untied").config
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    scaled = type(config).from_dict(config.to_dict() | {"rope_scaling": {"rope_type": "llama3"} | scaling})
    with pytest.raises(QLIPError, match="rope_scaling: lingua has no scaled rotary frequencies"):
        CausalModel(scaled).save_lingua(tmp_path)
    assert not list(tmp_path.iterdir())
