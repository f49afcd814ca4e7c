"""The exported folder: plain transformers loads it where this package cannot be imported, with our numbers."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlip import QLIPModel, assets
from qlip.cli.main import run as qlip
from qlip.hf.remote_code import FILE, remote_code

WITHOUT_QLIP = """
import sys
import torch
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "qlip":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
torch.set_num_threads(1)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, pipeline
folder, image, inputs, outputs = sys.argv[1:]
given = load_file(inputs)
with torch.no_grad():
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    found = model(**given, reconstruct=True)
    model.save_pretrained(folder + "/again")
    again = AutoModel.from_pretrained(folder + "/again", trust_remote_code=True)
    assert torch.equal(again(**given).logits_per_image, found.logits_per_image)
names = ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds", "reconstructions", "indices")
processor = AutoProcessor.from_pretrained(folder)
texts = ["a photo of a cat", "two trucks at night"]
prepared = processor(images=Image.open(image), text=texts, padding="max_length", return_tensors="pt")
classify = pipeline("zero-shot-image-classification", model=folder, trust_remote_code=True)
rows = classify(image, candidate_labels=texts, hypothesis_template="{}")
scores = torch.tensor([next(row["score"] for row in rows if row["label"] == text) for text in texts])
save_file({name: found[name].contiguous() for name in names} | dict(prepared) | {"scores": scores}, outputs)
"""


def test_remote_code__defines_each_name_once_and_imports_two_packages() -> None:
    tree = ast.parse(remote_code())
    names = Counter(node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef))
    assert not {name for name, times in names.items() if times > 1}
    imports = {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
    assert imports - set(sys.stdlib_module_names) == {"torch", "transformers"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "qlip-nano-hf"
    assert qlip(["export", "--format", "transformers", "-o", str(folder)]) == 0
    return folder


def test_export__holds_the_code_that_the_sources_make(folder: Path) -> None:
    assert (folder / FILE).read_text() == remote_code()


@torch.no_grad()
def test_export__plain_transformers_gives_our_numbers(
    folder: Path, ours: QLIPModel, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(inputs, tmp_path / "inputs.safetensors")
    image = sorted(assets.path("images").glob("*.jpg"))[0]
    files = [str(folder), str(image), str(tmp_path / "inputs.safetensors"), str(tmp_path / "outputs.safetensors")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_QLIP, *files], capture_output=True, text=True, check=False, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    found, expected = load_file(tmp_path / "outputs.safetensors"), ours(**inputs)
    for name in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds", "reconstructions", "indices"):
        assert torch.equal(found[name], getattr(expected, name)), name
    assert torch.equal(found["pixel_values"], inputs["pixel_values"][:1])
    assert torch.equal(found["input_ids"], inputs["input_ids"])
    torch.testing.assert_close(found["scores"], expected.logits_per_image[0].softmax(-1))
    assert QLIPModel.from_pretrained(folder).code_fingerprint == ours.code_fingerprint
