"""`qlip convert`, from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlip import QLIPModel
from qlip.lm import DecoderModel
from tests.cli.conftest import Command
from tests.lm.llamagen import Fixture
from tests.modeling.convert_sources import config_of, make


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.safetensors"
    save_file(make("eva02_clip_base", text_width=128, text_heads=2), path)
    return path


def test_convert__result_works_with_every_command(qlip: Command, clip: Path, photos: Path) -> None:
    ran = qlip("convert", "--vision", clip, "--text", clip, "-o", "made", "--bits", 12, "--group-size", 4)
    assert ran.code == 0
    assert "vision: " in ran.err and "EVA image tower (EVA-CLIP); names under 'visual.'" in ran.err
    assert "text: " in ran.err and "EVA-CLIP or OpenCLIP text tower" in ran.err
    assert "hidden_act gelu" in ran.err and "no vocabulary" in ran.err
    lines = ran.out.splitlines()
    assert lines[0].split() == ["status", "source", "target", "tensors", "method"]
    block = "vision_model.encoder.layers.*.mlp.w1.{weight,bias}"
    assert any(
        line.startswith("mapped") and "visual.blocks.*.mlp.w1.{weight,bias}" in line and block in line for line in lines
    )
    assert {"made/config.json", "made/model.safetensors", "made/preprocessor_config.json"} <= set(lines)
    assert qlip("encode", photos, "-m", "made", "-o", "tokens").code == 0
    assert qlip("decode", "tokens", "-m", "made", "-o", "rebuilt").code == 0


def test_convert__json_lists_every_tensor(qlip: Command, clip: Path) -> None:
    Path("config.json").write_text(
        json.dumps(
            config_of(vision={"patch_size": 14, "image_size": 56}, text={"hidden_size": 128, "num_attention_heads": 2})
        )
    )
    options = ["--text", clip, "--config", "config.json", "--quick-gelu", "--seed", 3, "-o", "made", "--json"]
    report = qlip("convert", "--vision", clip, *options).json
    keys = [key for row in report["rows"] for key in row["source_keys"]]
    assert sorted(keys) == sorted(load_file(clip))
    targets = [key for row in report["rows"] for key in row["target_keys"]]
    assert sorted(targets) == sorted(load_file("made/model.safetensors"))
    assert report["counts"]["resampled"] == 1 and report["output"] == "made"
    model = QLIPModel.from_pretrained("made")
    assert model.config.text_config.hidden_act == "quick_gelu"
    assert qlip("convert", "--vision", clip, *options[:-3], "-o", "again").code == 0
    again = QLIPModel.from_pretrained("again")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_convert__takes_a_trained_models_towers(qlip: Command, model: Path) -> None:
    assert qlip("convert", "--vision", model, "--text", model, "-o", "made").code == 0
    assert qlip("embed", "--text", "a cat", "-m", "made", "-o", "here.npy").code == 0
    assert qlip("embed", "--text", "a cat", "-m", model, "-o", "there.npy").code == 0
    assert Path("here.npy").read_bytes() == Path("there.npy").read_bytes()


def test_convert__llamagens_file_to_a_decoder(qlip: Command) -> None:
    fixture = Fixture("t2i")
    torch.save({"model": fixture.weights}, "t2i.pt")
    ran = qlip("convert", "--llamagen", "t2i.pt", "--heads", 4, "--grid", 4, 4, "-o", "made")
    assert (ran.code, ran.out.splitlines()) == (0, ["made/config.json", "made/model.safetensors"])
    model = DecoderModel.from_pretrained("made")
    given = fixture.indices, fixture.condition
    assert torch.equal(model(*given), fixture.model(*given))
    ran = qlip("convert", "--llamagen", "t2i.pt", "--heads", 4, "-o", "made")
    assert "taken as 16 x 16" in ran.err and "--grid ROWS COLUMNS" in ran.err
    notes = qlip("convert", "--llamagen", "t2i.pt", "--heads", 4, "-o", "made", "--json").json["notes"]
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["-o", "made"], 2, "nothing to convert: give --vision, --text, or both"),
        (["--vision", "gone.pt", "-o", "made"], 1, "gone.pt: no such file"),
        (["--llamagen", "gone.pt", "-o", "made"], 1, "gone.pt: no such file"),
        (["--llamagen", "c2i.pt", "--bits", 28, "-o", "made"], 2, "without towers; leave out --bits"),
        (["--llamagen", "c2i.pt", "--grid", 4, 0, "-o", "made"], 2, "--grid 4 0"),
        (["--llamagen", "c2i.pt", "-o", "made"], 1, "are no size of LlamaGen's"),
        (["--vision", "clip", "--heads", 4, "-o", "made"], 2, "--heads is for --llamagen"),
        (["--vision", "made", "-o", "./made"], 2, "is both source and --output"),
        (["--vision", "clip", "--config", "QLIP-B-16-256", "-o", "made"], 1, "vision_config.hidden_size is 32"),
        (["--vision", "clip", "--bits", 20, "-o", "made"], 1, "group_size 7 does not divide embed_dim 20"),
    ],
)
def test_convert__wrong_command_writes_nothing(
    qlip: Command, clip: Path, arguments: list[object], code: int, said: str
) -> None:
    if "c2i.pt" in arguments:
        torch.save({"model": Fixture("c2i").weights}, "c2i.pt")
    ran = qlip("convert", *(clip if argument == "clip" else argument for argument in arguments))
    assert (ran.code, len(ran.error_lines)) == (code, 1) and said in ran.err
    assert not Path("made").exists()
