"""Copies of drawers: in another precision, and as a pipeline of diffusers, loaded by it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qlip import QLIPError
from qlip.lm import DecoderModel
from qlip.t2i import Drawer
from qlip.t2i.export import export_folder, export_pipeline
from tests.t2i.conftest import tiny

PROMPT = "a red circle above a blue square"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def code_of(page: Path) -> str:
    found = re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def exported(drawer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "pipeline"
    export_pipeline(drawer_folder, folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    diffusers = pytest.importorskip("diffusers", reason='needs pip install "qlip[hf]"')
    modules = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(modules))
        patch.syspath_prepend(str(modules))
        place = str(exported)
        loaded = diffusers.DiffusionPipeline.from_pretrained(place, custom_pipeline=place, trust_remote_code=True)
        loaded.set_progress_bar_config(disable=True)
        yield loaded


def test_export_folder__draws_as_its_source(drawer_folder: Path, drawer: Drawer, tmp_path: Path) -> None:
    export_folder(drawer_folder, tmp_path / "copy")
    copy = Drawer.from_pretrained(tmp_path / "copy", device="cpu")
    assert copy.settings == drawer.settings
    assert torch.equal(copy(PROMPT, generator=seeded()).indices, drawer(PROMPT, generator=seeded()).indices)


def test_export_folder__half_precision_is_a_whole_drawer(drawer_folder: Path, tmp_path: Path) -> None:
    written = export_folder(drawer_folder, tmp_path / "half", torch.float16)
    assert {path.name for path in drawer_folder.iterdir()} == {path.name for path in written}
    assert Drawer.from_pretrained(tmp_path / "half", device="cpu")(PROMPT).images[0].size == (64, 64)


def test_export_folder__decoder_without_vocabulary_or_settings(tmp_path: Path) -> None:
    tiny("class").save_pretrained(tmp_path / "decoder")
    written = export_folder(tmp_path / "decoder", tmp_path / "copy")
    assert [path.name for path in written] == ["config.json", "model.safetensors"]


def test_export_folder__takes_the_tokenizer_inside_along(exported: Path, tmp_path: Path) -> None:
    export_folder(exported / "drawer", tmp_path / "copy")
    assert Drawer.from_pretrained(tmp_path / "copy", device="cpu").codec.name == str(tmp_path / "copy" / "tokenizer")


def test_export_pipeline__is_whole_wherever_it_lies(
    exported: Path, drawer: Drawer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(exported, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qlip.assets.path", lambda *parts: tmp_path / "no package data")
    moved = Drawer.from_pretrained("moved/drawer", device="cpu")
    assert torch.equal(moved(PROMPT, generator=seeded()).indices, drawer(PROMPT, generator=seeded()).indices)


def test_export_pipeline__refuses_what_does_not_draw(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "decoder")  # without the vocabulary of its captions
    with pytest.raises(QLIPError, match="decoder: has no vocabulary"):
        export_pipeline(tmp_path / "decoder", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pipeline__images_are_the_drawers(pipeline: Any, drawer: Drawer) -> None:
    options = {"negative_prompt": "a green cross", "num_images_per_prompt": 2, "output_type": "np"}
    ours = drawer([PROMPT, "a cat"], generator=seeded(), **options).images
    theirs = pipeline([PROMPT, "a cat"], generator=seeded(), **options).images
    assert np.array_equal(ours, theirs)
    [image] = pipeline(PROMPT, generator=seeded()).images
    assert isinstance(image, Image.Image) and image.size == (64, 64)
    [several] = pipeline(PROMPT, generator=seeded(), output_type="pt", return_dict=False)
    assert several.shape == (1, 3, 64, 64)


def test_pipeline__guidance_scale_changes_images(pipeline: Any) -> None:
    weak, strong = (
        pipeline(PROMPT, generator=seeded(), guidance_scale=scale, output_type="pt").images for scale in (1.0, 6.0)
    )
    assert not torch.equal(weak, strong)


def test_pipeline__callback_and_progress_bar_see_each_step(pipeline: Any, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []

    def callback(its: Any, step: int, timestep: int, values: dict[str, Any]) -> dict[str, Any]:
        assert its is pipeline and values["indices"].shape == (1, step + 1, 4)
        seen.append(step)
        return values

    pipeline.set_progress_bar_config(desc="drawing")
    pipeline(PROMPT, callback_on_step_end=callback)
    pipeline.set_progress_bar_config(disable=True)
    assert seen == list(range(64))
    assert re.search(r"drawing: 100%.* 64/64", capsys.readouterr().err)


def test_pipeline__draws_parts_of_images(pipeline: Any, drawer: Drawer) -> None:
    options = {"image": Image.new("RGB", (64, 64), "red"), "keep": 0.5, "output_type": "np"}
    ours, theirs = (draws(PROMPT, generator=seeded(), **options).images for draws in (drawer, pipeline))
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["num_inference_steps", "height", "width"])
def test_pipeline__arguments_without_a_meaning_are_refused(pipeline: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        pipeline(PROMPT, **{name: 64})


def test_pipeline__moves_to_another_precision_and_back(pipeline: Any) -> None:
    before = pipeline(PROMPT, generator=seeded(), output_type="pt").images
    decoder = pipeline.drawer.decoder
    assert pipeline.to("cpu") is pipeline and pipeline.drawer.decoder is decoder
    pipeline.to(torch.bfloat16)
    assert pipeline.dtype == pipeline.drawer.decoder.dtype == torch.bfloat16
    assert pipeline(PROMPT, output_type="pt").images.isfinite().all()
    pipeline.to("cpu", torch.float32)
    assert pipeline.device == torch.device("cpu")
    assert torch.equal(pipeline(PROMPT, generator=seeded(), output_type="pt").images, before)


def test_pipeline__saved_by_diffusers_does_not_load(pipeline: Any, tmp_path: Path) -> None:
    """README.md warns of it; once this fails, the warning can go."""
    pipeline.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "pipeline.py").exists()


def test_pipeline__readme_runs(
    pipeline: Any, exported: Path, drawer: Drawer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(exported, tmp_path / "moved"))
    exec(code_of(Path("README.md")), {})
    [expected, *_] = drawer(PROMPT, num_images_per_prompt=4, generator=seeded()).images
    assert np.array_equal(np.asarray(Image.open("drawn.png")), np.asarray(expected))


@pytest.mark.slow  # diffusers takes some seconds to import
def test_pipeline__readme_runs_in_a_process_of_its_own(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason='needs pip install "qlip[hf]"')
    moved = shutil.copytree(exported, tmp_path / "moved")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code_of(moved / "README.md")],
        cwd=moved,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert (moved / "drawn.png").is_file()


def test_export_pipeline__stores_the_decoder_in_the_precision_asked_for(drawer_folder: Path, tmp_path: Path) -> None:
    written = export_pipeline(drawer_folder, tmp_path / "half", torch.float16)
    assert written == sorted(path for path in (tmp_path / "half").rglob("*") if path.is_file())
    weights = tmp_path / "half" / "drawer" / "model.safetensors"
    assert weights.stat().st_size < 0.6 * (drawer_folder / "model.safetensors").stat().st_size
    assert DecoderModel.from_pretrained(weights.parent).dtype == torch.float32
