"""Every debug recipe goes through both stages on real images, is killed, goes on, and gives a model that works."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlip import QLIPModel, QLIPProcessor, assets
from qlip.data.sources.training_text import RECORD, TrainingText
from tests.weights import lpips_weights

FAMILIES = ("QLIP-B-16-256", "QLIP-B-8-256", "QLIP-L-14-392", "single-gpu", "nano")
ALIKE = ("QLIP-B-8-256", "QLIP-L-14-392", "single-gpu")  # the debug model of B-16 again, other patches or options


def train(recipe: str, folder: Path, kill_at_first_checkpoint: bool = False) -> None:
    """`qlip train RECIPE`, in a folder of its own."""
    command = [sys.executable, "-m", "qlip", "train", recipe]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    checkpoints = folder / "runs" / recipe / "checkpoints"
    allowed = time.monotonic() + 240
    while kill_at_first_checkpoint and process.poll() is None and time.monotonic() < allowed:
        if list(checkpoints.glob("step-*")):
            process.kill()
            break
        time.sleep(0.01)
    output, _ = process.communicate(timeout=240)
    assert process.returncode in (0, -signal.SIGKILL) if kill_at_first_checkpoint else process.returncode == 0, output


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=pytest.mark.slow) if one in ALIKE else one for one in FAMILIES]
)
def test_both_stages_killed_resumed_and_exported(family: str, tmp_path: Path) -> None:
    lpips_weights()
    for stage in ("debug-stage1", "debug-stage2"):
        train(f"{family}/{stage}", tmp_path, kill_at_first_checkpoint=True)
        train(f"{family}/{stage}", tmp_path)
        steps = [json.loads(line)["step"] for line in (tmp_path / "runs" / family / stage / "log.jsonl").open()]
        assert steps == sorted(set(steps)), "no line comes twice"
        assert list((tmp_path / "runs" / family / stage / "pictures").glob("*.png"))
    first, second = (tmp_path / "runs" / family / stage / "model" for stage in ("debug-stage1", "debug-stage2"))
    before, after = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(("vision_decoder.", "vision_model.quant_embed")) for name in moved)
    assert TrainingText.read(first).complete
    assert (first / RECORD).read_bytes() == (second / RECORD).read_bytes()
    one, two = QLIPModel.from_pretrained(first), QLIPModel.from_pretrained(second)
    processor = QLIPProcessor.from_pretrained(second)
    inputs = processor(images=str(assets.path("images") / "cat.jpg"), text=["a photo of a cat."])
    with torch.inference_mode():
        for name in ("image_embeds", "text_embeds"):
            assert torch.equal(getattr(one(**inputs), name), getattr(two(**inputs), name))
        rebuilt = processor.to_images(two.decode(two.encode(inputs["pixel_values"])))[0]
    assert rebuilt.size == (processor.size[1], processor.size[0])
