"""`qlip export`, from the outside."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlip import QLIPModel
from qlip.lm import DecoderModel
from qlip.um3 import UM3Chat
from tests.cli.conftest import Command
from tests.lm.test_model import randomized, tiny
from tests.t2i.conftest import tiny as drawer
from tests.um3.conftest import um3_folder  # noqa: F401


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    randomized(tiny(head="flat", code_fingerprint="a" * 64)).save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


def test_export__tokenizer_in_another_precision(qlip: Command, model: Path) -> None:
    ran = qlip("export", "--model", model, "-o", "out", "--dtype", "float16")
    assert ran.code == 0 and "config.json" in ran.out
    assert next(iter(load_file("out/model.safetensors").values())).dtype == torch.float16
    assert QLIPModel.from_pretrained("out").config == QLIPModel.from_pretrained(model).config


def test_export__decoder_to_its_formats(qlip: Command, decoder: Path) -> None:
    report = qlip("export", "--model", decoder, "--format", "llama", "-o", "llama", "--json").json
    names = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert list(report["files"]) == [f"llama/{name}" for name in names]
    assert report["model"] == {"name": str(decoder), "code_fingerprint": "a" * 64}
    assert json.loads(Path("llama/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    ran = qlip("export", "--model", decoder, "-o", "half", "--dtype", "bfloat16")
    assert ran.code == 0 and ran.out.startswith("2 files in half")
    assert DecoderModel.from_pretrained("half").config == DecoderModel.from_pretrained(decoder).config


def test_export__drawer_to_diffusers(qlip: Command, tmp_path: Path) -> None:
    drawer("class").save_pretrained(tmp_path / "drawer")
    ran = qlip("export", "-m", tmp_path / "drawer", "--format", "diffusers", "-o", "out")
    assert ran.code == 0 and "README.md, drawer/component.py, drawer/config.json" in ran.out
    assert Path("out/drawer/tokenizer/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("which", "format", "code", "said"),
    [
        ("model", "llama", 2, "is no decoder of image tokens; its formats are safetensors, onnx"),
        (
            "decoder",
            "onnx",
            2,
            "is a decoder of image tokens; its formats are safetensors, llama, qwen3, csm, diffusers",
        ),
        ("model", "diffusers", 2, "is no decoder of image tokens; its formats are safetensors, onnx"),
        ("decoder", "diffusers", 1, "its tokens are of another tokenizer"),
        ("decoder", "qwen3", 1, "qk_norm false: does not fit Qwen3ForCausalLM; export it as llama"),
        ("absent", "llama", 1, "no such folder"),
    ],
)
def test_export__of_another_kind_is_refused_in_one_line(
    qlip: Command, model: Path, decoder: Path, which: str, format: str, code: int, said: str
) -> None:
    source = {"model": model, "decoder": decoder, "absent": Path("absent")}[which]
    ran = qlip("export", "--model", source, "--format", format, "-o", "out")
    assert (ran.code, len(ran.error_lines)) == (code, 1) and said in ran.err
    assert not Path("out").exists()


def test_export__commands_of_the_page_run(qlip: Command) -> None:
    pytest.importorskip("transformers", reason='needs pip install "qlip[hf]"')
    for name, changes in (("flat", {}), ("flat-normed", {"qk_norm": True}), ("depth", {"head": "depth"})):
        randomized(tiny(**{"head": "flat"} | changes)).save_pretrained(name)
    page = Path(__file__).parents[2] / "docs" / "decoder.md"
    commands = re.findall(r"^    qlip (export .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert qlip(*command.split()).code == 0, command
    assert {path.parent.name for path in Path().glob("*/README.md")} == {"flat-llama", "flat-qwen3", "depth-csm"}


def test_export__formats_of_a_um3(qlip: Command, um3_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    ran = qlip("export", "-m", um3_folder, "-o", tmp_path / "out", "--format", "transformers", "--json")
    assert ran.code == 0, ran.err
    names = {Path(one).name for one in ran.json["files"]}
    assert {"um3.json", "modeling_um3.py", "draw_with_stock_transformers.py", "README.md"} <= names
    ran = qlip("export", "-m", um3_folder, "-o", tmp_path / "onnx", "--format", "onnx")
    assert ran.code == 2 and "is a UM3; its formats are safetensors, transformers" in ran.err
    assert qlip("export", "-m", um3_folder, "-o", tmp_path / "half", "--dtype", "float16").code == 0
    assert {path.name for path in (tmp_path / "half").iterdir()} == {path.name for path in um3_folder.iterdir()}
    half, whole = (UM3Chat.from_pretrained(one, device="cpu") for one in (tmp_path / "half", um3_folder))
    for stored, weight in zip(half.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(stored, weight.half().float())
