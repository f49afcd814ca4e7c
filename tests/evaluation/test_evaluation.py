"""Metrics against literal twins, and protocols on the package's own pictures and model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from qlip import QLIPError, QLIPModel, QLIPProcessor, assets
from qlip.evaluation import measure_classification, measure_reconstruction, open_evaluation, psnr, ssim
from qlip.evaluation.reconstruction import shrink_to_bytes
from qlip.evaluation.zero_shot import class_embeddings


@pytest.fixture(scope="module")
def bundled() -> tuple[QLIPModel, QLIPProcessor]:
    return QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled")


def pictures(count: int = 3, side: int = 24) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_psnr_is_a_pictures_own() -> None:
    originals = pictures()
    noisy = (originals + 0.1 * torch.randn(originals.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    expected = [10 * np.log10(1 / np.mean((a.numpy() - b.numpy()) ** 2)) for a, b in zip(noisy, originals, strict=True)]
    np.testing.assert_allclose(psnr(noisy, originals).numpy(), expected, rtol=1e-5)
    assert torch.isinf(psnr(originals, originals)).all()


def literal_ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Wang et al., equation 13, at every pixel, the picture mirrored beyond its edges."""

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


def test_ssim_against_its_equation() -> None:
    originals = pictures(side=40)
    noisy = (originals + 0.2 * torch.randn(originals.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    expected = [literal_ssim(a.numpy(), b.numpy()) for a, b in zip(noisy, originals, strict=True)]
    np.testing.assert_allclose(ssim(noisy, originals).numpy(), expected, atol=1e-4)


def test_unpaired_pictures_are_refused() -> None:
    with pytest.raises(QLIPError, match="no pairs"):
        psnr(pictures(3), pictures(2))


def test_the_baseline_keeps_within_its_bytes() -> None:
    originals = pictures(1, 64)
    # 224 bytes are 74 pixels of 3 bytes: 8 rows of 9; what is left has no more than so many degrees of freedom
    shrunk = shrink_to_bytes(originals, 224)
    assert shrunk.shape == originals.shape
    assert np.linalg.matrix_rank(shrunk[0, 0].double().numpy(), tol=1e-4) <= 9
    whole = shrink_to_bytes(originals, 3 * 64 * 64)
    torch.testing.assert_close(whole, (originals * 255).round() / 255, atol=1e-5, rtol=0)


def test_reconstruction_is_what_a_user_would_measure(bundled: tuple[QLIPModel, QLIPProcessor]) -> None:
    model, processor = bundled
    folder = str(assets.path("pictures"))
    found = measure_reconstruction(model, processor, open_evaluation(folder, processor), batch_size=3)
    values = []
    for path in sorted(assets.path("pictures").rglob("*.[jp][pn]g")):
        seen = processor(images=path)["pixel_values"]
        rebuilt = processor.to_images(model.decode(model.encode(seen)))[0]
        original = np.asarray(processor.to_images(seen)[0], dtype=np.float64)
        values.append(10 * np.log10(255**2 / np.mean((original - np.asarray(rebuilt, dtype=np.float64)) ** 2)))
    assert found.count == len(values) and found.broken == 0
    # another batch size may move a bit, so not to the last digit
    assert found.values["psnr"] == pytest.approx(np.mean(values), abs=0.05)
    assert found.values["shrink_psnr"] < found.values["psnr"]
    assert 0 < found.values["bit_marginal_min"] <= found.values["bit_marginal_max"] < 1
    assert found.preparation == "64x64, bicubic, centre crop"


def test_broken_pictures_are_counted_and_in_no_figure(bundled: tuple[QLIPModel, QLIPProcessor], tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(assets.path("pictures", "cat.jpg").read_bytes())
    alone = measure_reconstruction(*bundled, open_evaluation(str(tmp_path), bundled[1]))
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    found = measure_reconstruction(*bundled, open_evaluation(str(tmp_path), bundled[1]))
    assert (found.count, found.broken) == (1, 1) and found.values == alone.values
    (tmp_path / "cat.jpg").unlink()
    with pytest.raises(QLIPError, match="not one picture could be read"):
        measure_reconstruction(*bundled, open_evaluation(str(tmp_path), bundled[1]))


def test_class_embeddings_average_unit_prompts(bundled: tuple[QLIPModel, QLIPProcessor]) -> None:
    model, processor = bundled
    templates = ("a photo of a {}.", "{}")
    table = class_embeddings(model, processor, ["cat", "ship"], templates)
    for row, name in zip(table, ("cat", "ship"), strict=True):
        text = processor(text=[template.replace("{}", name) for template in templates])
        mean = model(input_ids=text["input_ids"]).text_embeds.mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=1e-5, atol=1e-6)


def test_classification_names_labels_of_the_set(bundled: tuple[QLIPModel, QLIPProcessor], tmp_path: Path) -> None:
    model, processor = bundled
    for path in assets.path("pictures", "drawings").glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / f"{path.stem}.json").write_text(f'{{"label": "{path.stem}"}}')
    data = open_evaluation(str(tmp_path), processor)
    found = measure_classification(model, processor, data, ("a photo of a {}.",), protocol="drawings")
    assert found.values["classes"] == 10 and found.values["chance"] == 10 and found.count == 10
    classes = sorted(path.stem for path in tmp_path.glob("*.png"))
    table = class_embeddings(model, processor, classes, ("a photo of a {}.",))
    right = 0
    for name in classes:
        features = model.get_image_features(processor(images=tmp_path / f"{name}.png")["pixel_values"])
        right += classes[int((features @ table.t()).argmax())] == name
    assert found.values["top1"] == pytest.approx(100 * right / 10)
    assert found.values["top1"] > 30  # three times chance: the bundled model has learned its ten words
    with pytest.raises(QLIPError, match="two or more"):
        measure_classification(model, processor, data, ("{}",), protocol="x", keep=lambda label: label == "cat")
