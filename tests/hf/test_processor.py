"""Preparation by transformers' classes: pixels and ids equal to ours, found by the Auto classes, pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, pipeline

from qlip import QLIPModel
from qlip.hf import QLIPHFVisionModel, load_processor


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    theirs.save_pretrained(folder)
    load_processor("bundled").save_pretrained(folder)
    return folder


def test_processor__equals_ours(
    folder: Path, images: list[Image.Image], texts: list[str], inputs: dict[str, Tensor]
) -> None:
    for processor in (load_processor("bundled"), AutoProcessor.from_pretrained(folder)):
        found = processor(images=images, text=texts, padding="max_length", return_tensors="pt")
        assert {name: torch.equal(found[name], inputs[name]) for name in inputs} == dict.fromkeys(inputs, True)
    pixels = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, inputs["pixel_values"])
    ids = AutoTokenizer.from_pretrained(folder)(texts, padding="max_length", return_tensors="pt")["input_ids"]
    assert torch.equal(ids, inputs["input_ids"])


@torch.no_grad()
def test_pipelines__zero_shot_classification_and_features(
    folder: Path, images: list[Image.Image], texts: list[str], inputs: dict[str, Tensor], ours: QLIPModel
) -> None:
    expected = ours(**inputs).logits_per_image[0].softmax(-1)
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    scores = {
        row["label"]: row["score"] for row in classify(images[0], candidate_labels=texts, hypothesis_template="{}")
    }
    assert [scores[text] for text in texts] == pytest.approx(expected.tolist(), abs=1e-6)
    QLIPHFVisionModel.from_pretrained("bundled", dtype=torch.float32).save_pretrained(folder / "tower")
    load_processor("bundled").image_processor.save_pretrained(folder / "tower")
    features = pipeline("image-feature-extraction", model=str(folder / "tower"))(images[0], return_tensors=True)
    last = ours.vision_model.run_encoder(inputs["pixel_values"])[0][:1]
    torch.testing.assert_close(features, last)
