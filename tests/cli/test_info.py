"""`qlip info` with models, token files and recipes."""

from __future__ import annotations

from pathlib import Path

import yaml

from qlip import QLIPModel, recipes
from qlip.lm import DecoderModel
from qlip.modeling.parts import PARTS
from qlip.t2i import DrawSettings
from qlip.vlm.model import VisionLanguageModel
from tests.cli.conftest import TOKEN_BYTES, Command
from tests.lm.test_model import tiny
from tests.um3.tiny import tiny_um3
from tests.vlm.conftest import talker_folder  # noqa: F401


def test_info__missing_token_file(qlip: Command) -> None:
    ran = qlip("info", "missing.qlip")
    assert ran.code == 1 and ran.error_lines[0].startswith("qlip: missing.qlip: cannot be read")


def test_info__model(qlip: Command, model: Path) -> None:
    report = qlip("info", model, "--json").json
    loaded = QLIPModel.from_pretrained(model)
    assert report["parameters"] == sum(parameter.numel() for parameter in loaded.parameters())
    assert report["parameters"] == sum(report[f"{part}_parameters"] for part in PARTS)
    assert (report["tokens"], report["bits_per_token"], report["token_bytes"]) == (16, 20, TOKEN_BYTES)
    assert report["code_fingerprint"] == loaded.code_fingerprint


def test_info__decoder(qlip: Command, tmp_path: Path) -> None:
    config = tiny(head="flat", condition="tokens", prefix_length=4, code_fingerprint="a" * 64)
    decoder = DecoderModel(config)
    decoder.save_pretrained(tmp_path / "decoder")
    report = qlip("info", tmp_path / "decoder", "--json").json
    assert report["parameters"] == decoder.num_parameters() and report["code_fingerprint"] == "a" * 64
    assert report["exports"] == "safetensors, llama" and report["condition"] == "tokens, 5, 4 positions"
    assert report["bytes"] == (tmp_path / "decoder" / "model.safetensors").stat().st_size and "example" not in report
    assert "a" * 64 in qlip("info", tmp_path / "decoder").out
    said = f"qlip: {tmp_path}/decoder/config.json: model_type 'qlip_decoder' is no tokenizer of images"
    assert qlip("embed", "--text", "cat", "-m", tmp_path / "decoder", "-o", "x.npy").error_lines == [said]


def test_info__drawer(qlip: Command, tmp_path: Path) -> None:
    drawer = tmp_path / "drawer"
    DecoderModel(tiny(classes=["a cat", "b", "c", "d", "e"])).save_pretrained(drawer)
    DrawSettings(guidance="linear:1:4", temperature=0.9, tokenizer="someone/qlip").save(drawer)
    report = qlip("info", drawer, "--json").json
    assert (report["guidance"], report["temperature"], report["top_k"]) == ("linear:1:4", 0.9, 0)
    assert report["tokenizer"] == "someone/qlip" and report["exports"] == "safetensors, diffusers"
    assert report["example"] == f"qlip draw --class 'a cat' -m {drawer}"


def test_info__vision_language_model(qlip: Command, talker_folder: Path) -> None:  # noqa: F811
    report = qlip("info", talker_folder, "--json").json
    assert (report["tokens_per_image"], report["context"], report["template"]) == (16, 512, "qa")
    model = VisionLanguageModel.from_pretrained(talker_folder)
    assert report["text_decoder_parameters"] == model.llm.num_parameters()
    assert report["bytes"] == (talker_folder / "model.safetensors").stat().st_size and report["temperature"] == 0
    assert report["example"] == f"qlip chat photo.jpg -m {talker_folder}"
    said = f"qlip: {talker_folder}/config.json: model_type 'qlip_vlm' is no tokenizer of images"
    assert qlip("embed", "--text", "cat", "-m", talker_folder, "-o", "x.npy").error_lines == [said]


def test_info__um3(qlip: Command, tmp_path: Path) -> None:
    model = tiny_um3(rows="per_group")
    model.save_pretrained(tmp_path)
    report = qlip("info", tmp_path, "--json").json
    assert report["parameters"] == sum(one.numel() for one in model.parameters())
    assert (report["ids_per_image"], report["text_rows"], report["visual_rows"]) == (12, 40, "16, per group")
    assert report["softmax"] == "separate" and report["bytes"] == (tmp_path / "model.safetensors").stat().st_size


def test_info__published_name_downloads_nothing(qlip: Command) -> None:
    report = qlip("info", "QLIP-B-16-256", "--json").json
    assert report["parameters"] == 239_434_013
    assert (report["tokens"], report["compression"]) == (256, 219.4)


def test_info__token_file(qlip: Command, model: Path, photos: Path) -> None:
    qlip("encode", photos / "dog.jpg", "-m", model)
    report = qlip("info", "dog.qlip", "--json").json
    assert report["original_size"] == [64, 48] and report["grid"] == [4, 4]
    assert report["token_bytes"] == TOKEN_BYTES
    table = qlip("info", "dog.qlip")
    assert table.code == 0 and report["decoder_fingerprint"] in table.out


def test_info__packaged_recipes_in_full(qlip: Command) -> None:
    for name in recipes.names():
        ran = qlip("info", name)
        assert ran.code == 0 and yaml.safe_load(ran.out)["optimizer"]
        assert qlip("info", name, "--json").json["values"] == yaml.safe_load(ran.out)


def test_info__token_dataset_is_told_the_command(qlip: Command, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    ran = qlip("info", tmp_path)
    assert ran.code == 2 and ran.error_lines == [
        f"qlip: {tmp_path}: a token dataset, which `qlip tokens info {tmp_path}` describes"
    ]
