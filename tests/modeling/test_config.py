"""Configurations: defaults, strictness, and that they come back as they were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlip import QLIPConfig, QLIPError, QLIPModel, assets
from tests.modeling.helpers import (
    MODEL_FIXTURES,
    PUBLISHED,
    assert_one_line,
    load_fixture,
    rewrite_config,
    small_config,
)


@pytest.mark.parametrize("name", MODEL_FIXTURES)
def test_config__round_trip(name: str) -> None:
    """Only what differs from the defaults is written, and what nothing reads is written back."""
    stored = load_fixture(name).config
    written = QLIPConfig.from_dict(stored).to_json_dict()
    assert QLIPConfig.from_dict(written) == QLIPConfig.from_dict(stored)
    for tower in ("text_config", "vision_config", "decoder_config"):
        assert set(written[tower]) <= set(stored[tower])
    assert written["vision_config"] == {
        key: value for key, value in stored["vision_config"].items() if key in written["vision_config"]
    }
    assert written["decoder_config"]["quantizer_cfg"] == stored["decoder_config"]["quantizer_cfg"]
    assert written["text_config"]["projection_dim"] == stored["text_config"]["projection_dim"]


def test_config__published_defaults() -> None:
    config = QLIPConfig.from_dict(
        {
            "vision_projection_bias": True,
            "text_projection_bias": False,
            "vision_config": {
                "quantizer": "bsq",
                "quantizer_embed_type": "mlp",
                "quantizer_cfg": {"input_format": "blc"},
            },
            "decoder_config": {},
        }
    )
    full = config.to_dict()
    assert (full["projection_dim"], full["logit_scale_init_value"]) == (512, 2.6592)
    text, vision = full["text_config"], full["vision_config"]
    quantizer = vision["quantizer_cfg"]
    assert (text["vocab_size"], text["hidden_size"], text["num_attention_heads"]) == (49408, 512, 8)
    assert (text["pad_token_id"], text["bos_token_id"], text["eos_token_id"]) == (1, 49406, 49407)
    assert (vision["hidden_size"], vision["image_size"], vision["patch_size"]) == (768, 224, 32)
    assert (vision["layer_norm_eps"], vision["subln"], vision["rope"]) == (1e-5, False, False)
    assert (vision["k_bias"], text["k_bias"], text["swiglu"]) == (True, True, False)
    assert (quantizer["embed_dim"], quantizer["group_size"], quantizer["inv_temperature"]) == (18, 9, 100)
    assert (quantizer["beta"], quantizer["gamma_0"], quantizer["gamma_1"]) == (0, 1, 1)
    assert quantizer["l2_norm"] is True


@pytest.mark.parametrize(
    ("place", "key", "nearest"),
    [
        ("vision_config", "swigluu", "swiglu"),
        ("text_config", "hidden_sise", "hidden_size"),
        ("", "projection_dimm", "projection_dim"),
    ],
)
def test_config__unknown_key_is_an_error_with_the_nearest_name(place: str, key: str, nearest: str) -> None:
    config = small_config()
    (config[place] if place else config)[key] = 1
    with pytest.raises(QLIPError) as error:
        QLIPConfig.from_dict(config)
    assert_one_line(error, key, repr(nearest))


def test_config__unknown_key_of_the_quantizer_is_an_error() -> None:
    with pytest.raises(QLIPError) as error:
        QLIPConfig.from_dict(small_config(vision_config__quantizer_cfg__groupsize=4))
    assert_one_line(error, "groupsize", "'group_size'")


@pytest.mark.parametrize("key", ["vision_projection_bias", "text_projection_bias"])
def test_config__keys_without_default_are_required(key: str) -> None:
    config = small_config()
    del config[key]
    with pytest.raises(QLIPError) as error:
        QLIPConfig.from_dict(config)
    assert_one_line(error, key)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"vision_config__quantizer_cfg__group_size": 5}, "does not divide"),
        ({"vision_config__hidden_size_post_q": 40}, "hidden_size"),
        ({"vision_config__quantizer_embed_type": "identity"}, "embed_dim 12 must equal hidden_size 32"),
        (
            {
                "vision_config__quantizer_embed_type": "identity",
                "vision_config__quantizer_cfg__embed_dim": 32,
                "vision_config__hidden_size_post_q": 24,
                "decoder_config__hidden_size": 24,
            },
            "hidden_size_post_q 24 must equal hidden_size 32",
        ),
        ({"vision_config__num_attention_heads": 5}, "num_attention_heads"),
        ({"grid__num_attention_heads": 16}, "multiple of 4"),
        ({"grid__patch_size": 3}, "patch_size"),
        ({"decoder_config__image_size": 32}, "grid"),
        ({"vision_config__hidden_size": "large"}, "large"),
        ({"vision_config__quantizer": "none"}, "bsq"),
        ({"vision_config__quantizer_cfg__persample_entropy_compute": "both"}, "both"),
    ],
)
def test_config__sizes_that_do_not_fit_are_refused(changes: dict[str, Any], wanted: str) -> None:
    with pytest.raises(QLIPError) as error:
        QLIPConfig.from_dict(small_config(**changes))
    assert_one_line(error, wanted)


def test_config__keys_without_effect_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["vision_config"]["post_layernorm"] = True
        config["text_config"]["rope"] = True
        config["decoder_config"]["num_channels"] = 3

    rewrite_config(checkpoint, change)
    QLIPModel.from_pretrained(checkpoint).save_pretrained(tmp_path / "again")
    before = json.loads((checkpoint / "config.json").read_text())
    after = json.loads((tmp_path / "again" / "config.json").read_text())
    for tower, key in (
        ("vision_config", "post_layernorm"),
        ("vision_config", "projection_dim"),
        ("vision_config", "model_type"),
        ("text_config", "rope"),
        ("text_config", "projection_dim"),
        ("decoder_config", "num_channels"),
        ("decoder_config", "quantizer_cfg"),
        ("decoder_config", "quantizer"),
    ):
        assert after[tower][key] == before[tower][key], (tower, key)
    for key in ("architectures", "model_type", "transformers_version", "initializer_factor"):
        assert after[key] == before[key]


@pytest.mark.parametrize("name", PUBLISHED)
def test_named__published_configs(name: str) -> None:
    config = QLIPConfig.named(name)
    stored = json.loads(assets.path("configs", f"{name}.json").read_text())
    assert QLIPConfig.from_dict(stored) == config
    with torch.device("meta"):
        model = QLIPModel(config)
    _, patch, size = name.removeprefix("QLIP-").split("-")
    assert (model.image_size, model.patch_size, model.num_bits) == (int(size), int(patch), 28)


def test_named__b16_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = QLIPModel(QLIPConfig.named("QLIP-B-16-256"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 239_434_013


def test_named__unknown_name_lists_the_known() -> None:
    with pytest.raises(QLIPError) as error:
        QLIPConfig.named("QLIP-B-16-265")
    assert_one_line(error, "QLIP-B-16-265", "QLIP-B-16-256")
