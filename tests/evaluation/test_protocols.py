"""Metrics against literal twins, and protocols on the package's own images and model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from qlip import QLIPError, QLIPModel, QLIPProcessor, assets
from qlip.evaluation import open_evaluation, psnr, ssim
from qlip.evaluation.evaluators.base import Evaluator
from qlip.evaluation.evaluators.codebook import Codebook
from qlip.evaluation.evaluators.reconstruction import Reconstruction, shrink_to_bytes
from qlip.evaluation.evaluators.text_embeddings import classifier
from qlip.evaluation.evaluators.zero_shot import ZeroShot
from qlip.evaluation.models.base import QLIPEvalModel
from qlip.evaluation.run.datasets import preparation
from qlip.evaluation.run.evaluate_dataset import PassResult, evaluate_dataset
from qlip.modeling import indices_to_bits


@pytest.fixture(scope="module")
def bundled() -> QLIPEvalModel:
    return QLIPEvalModel(QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled"), assets.BUNDLED)


def images(count: int = 3, side: int = 24) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_protocol__psnr_is_an_images_own() -> None:
    originals = images()
    noisy = (originals + 0.1 * torch.randn(originals.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    expected = [10 * np.log10(1 / np.mean((a.numpy() - b.numpy()) ** 2)) for a, b in zip(noisy, originals, strict=True)]
    np.testing.assert_allclose(psnr(noisy, originals).numpy(), expected, rtol=1e-5)
    assert torch.isinf(psnr(originals, originals)).all()


def literal_ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Wang et al., equation 13, at every pixel, the image mirrored beyond its edges."""

    def blur(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, truncate=5 / 1.5, mode="mirror")

    values = []
    for a, b in zip(first.astype(np.float64), second.astype(np.float64), strict=True):
        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
        covariance = blur(a * b) - mean_a * mean_b
        top = (2 * mean_a * mean_b + 0.01**2) * (2 * covariance + 0.03**2)
        values.append(np.mean(top / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2))))
    return float(np.mean(values))


def test_protocol__ssim_against_its_equation() -> None:
    originals = images(side=40)
    noisy = (originals + 0.2 * torch.randn(originals.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    expected = [literal_ssim(a.numpy(), b.numpy()) for a, b in zip(noisy, originals, strict=True)]
    np.testing.assert_allclose(ssim(noisy, originals).numpy(), expected, atol=1e-4)


def test_protocol__unpaired_images_are_refused() -> None:
    with pytest.raises(QLIPError, match="no pairs"):
        psnr(images(3), images(2))


def test_protocol__the_baseline_keeps_within_its_bytes() -> None:
    originals = images(1, 64)
    # 224 bytes are 74 pixels of 3 bytes: 8 rows of 9; what is left has no more than so many degrees of freedom
    shrunk = shrink_to_bytes(originals, 224)
    assert shrunk.shape == originals.shape
    assert np.linalg.matrix_rank(shrunk[0, 0].double().numpy(), tol=1e-4) <= 9
    whole = shrink_to_bytes(originals, 3 * 64 * 64)
    torch.testing.assert_close(whole, (originals * 255).round() / 255, atol=1e-5, rtol=0)


def measured(model: QLIPEvalModel, folder: Path, *evaluators: Evaluator, batch_size: int = 64) -> PassResult:
    found = evaluate_dataset(model, open_evaluation(str(folder), model.processor), evaluators, batch_size=batch_size)
    assert found is not None
    return found


def test_protocol__reconstruction_is_what_a_user_would_measure(bundled: QLIPEvalModel) -> None:
    model, processor = bundled.model, bundled.processor
    found = measured(bundled, assets.path("images"), Reconstruction(), Codebook(), batch_size=3)
    values, ones = [], []
    for path in sorted(assets.path("images").rglob("*.[jp][pn]g")):
        seen = processor(images=path)["pixel_values"]
        indices = model.encode(seen)
        rebuilt = processor.to_images(model.decode(indices))[0]
        original = np.asarray(processor.to_images(seen)[0], dtype=np.float64)
        values.append(10 * np.log10(255**2 / np.mean((original - np.asarray(rebuilt, dtype=np.float64)) ** 2)))
        ones.append(indices_to_bits(indices, model.group_size).double().mean((0, 1)).numpy())
    assert found.count == len(values) and not found.broken
    figures = found.metric_results["reconstruction"].values
    # another batch size may move a bit, so not to the last digit
    assert figures["psnr"].value == pytest.approx(np.mean(values), abs=0.05)
    assert figures["shrink_psnr"].value < figures["psnr"].value
    shares = [record["ones"] for record in found.metric_results["codebook"].tables["bits"]]
    np.testing.assert_allclose(shares, 100 * np.mean(ones, axis=0), atol=0.2)
    assert preparation(bundled.preprocessing) == "64x64, bicubic, centre crop, rules 2"


def test_protocol__broken_images_are_counted_and_in_no_figure(bundled: QLIPEvalModel, tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(assets.path("images", "cat.jpg").read_bytes())
    alone = measured(bundled, tmp_path, Reconstruction())
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    found = measured(bundled, tmp_path, Reconstruction())
    assert found.count == 1 and [key for key, _ in found.broken] == ["broken.jpg"]
    assert found.metric_results == alone.metric_results
    (tmp_path / "cat.jpg").unlink()
    with pytest.raises(QLIPError, match="no image could be read"):
        measured(bundled, tmp_path, Reconstruction())


def test_protocol__a_class_is_the_average_of_its_prompts_unit_vectors(bundled: QLIPEvalModel) -> None:
    templates = ("a photo of a {}.", "{}")
    table = classifier(bundled, ["cat", "ship"], templates)
    for row, name in zip(table, ("cat", "ship"), strict=True):
        text = bundled.processor(text=[template.replace("{}", name) for template in templates])
        mean = bundled.model(input_ids=text["input_ids"]).text_embeds.mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=1e-5, atol=1e-6)


def test_protocol__classification_takes_the_labels_of_the_set(bundled: QLIPEvalModel, tmp_path: Path) -> None:
    for path in assets.path("images", "drawings").glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / f"{path.stem}.json").write_text(f'{{"label": "{path.stem}"}}')
    found = measured(bundled, tmp_path, ZeroShot(templates=["a photo of a {}."]))
    values = found.metric_results["zero_shot"].values
    assert values["prompt_classes"].value == 10 and values["prompt_chance"].value == 10 and found.count == 10
    classes = sorted(path.stem for path in tmp_path.glob("*.png"))
    table = classifier(bundled, classes, ("a photo of a {}.",))
    first, five = 0, 0
    for name in classes:
        pixels = bundled.processor(images=tmp_path / f"{name}.png")["pixel_values"]
        with torch.inference_mode():
            scores = (bundled.model.get_image_features(pixels) @ table.t())[0]
        ranked = [classes[at] for at in scores.argsort(descending=True).tolist()]
        first, five = first + (ranked[0] == name), five + (name in ranked[:5])
    assert values["prompt_top1"].value == pytest.approx(10 * first)
    assert values["prompt_top5"].value == pytest.approx(10 * five)
    assert values["prompt_top1"].value > 30  # three times chance: the bundled model has learned its ten words
    with pytest.raises(QLIPError, match="needs two or more"):
        measured(bundled, tmp_path, ZeroShot(without=[name for name in classes if name != "cat"]))
