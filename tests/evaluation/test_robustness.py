"""Degradations against reference packages, and what is found of images that are not at their best."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from qlip import QLIPError, QLIPModel, QLIPProcessor, assets, indices_to_bits
from qlip.evaluation import open_evaluation
from qlip.evaluation.evaluators import registry
from qlip.evaluation.evaluators.base import Finding
from qlip.evaluation.evaluators.degradations import KINDS, PARAMETERS, Kind, degraded
from qlip.evaluation.evaluators.robustness import CEILING, Robustness, plot
from qlip.evaluation.metrics.pixel import psnr
from qlip.evaluation.models.base import QLIPSubject
from qlip.evaluation.run.evaluate_dataset import measure
from qlip.modeling.model import unit

from .plain import Plain, opened, write_pictures

PICTURES = sorted(assets.path("images").glob("*.jpg"))[:3]


def photographs(side: int = 64) -> Tensor:
    arrays = [np.array(Image.open(path).convert("RGB").resize((side, side))) for path in PICTURES]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("kind", KINDS)
def test_each_severity_is_worse_than_the_one_before(kind: Kind) -> None:
    pictures, keys = photographs(), ["a", "b", "c"]
    figures = torch.stack([psnr(degraded(pictures, keys, kind, severity), pictures) for severity in range(1, 6)])
    assert (figures.diff(dim=0) < 0).all()
    for severity in (1, 5):
        found = degraded(pictures, keys, kind, severity)
        assert found.shape == pictures.shape and found.min() >= 0 and found.max() <= 1
        torch.testing.assert_close(found * 255, (found * 255).round())
        # an image's own, whatever else is in the batch
        torch.testing.assert_close(degraded(pictures[1:2], ["b"], kind, severity), found[1:2])


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("side", [64, 224])
def test_the_blur_is_scipys(severity: int, side: int) -> None:
    picture = photographs(side)[:1]
    sigma = PARAMETERS["blur"][severity - 1] / 100 * side
    expected = gaussian_filter(picture[0].double().numpy(), (0, sigma, sigma), mode="mirror", truncate=4)
    found = degraded(picture, ["a"], "blur", severity)[0].numpy()
    assert np.abs(found - expected).max() < 0.51 / 255


def test_noise_has_its_deviation_and_its_keys_seed() -> None:
    grey = torch.full((2, 3, 128, 128), 128 / 255)
    mild, strong = (degraded(grey, ["a", "b"], "noise", severity) - grey for severity in (1, 2))
    assert float(mild.std()) == pytest.approx(0.08, rel=0.02) and abs(float(mild.mean())) < 0.002
    torch.testing.assert_close(strong[0], mild[0] * 1.5, atol=0.03, rtol=0)  # one draw, scaled; clamped, rarely
    assert abs(float((mild[0] * mild[1]).mean())) < 1e-4
    assert torch.equal(degraded(grey, ["b", "a"], "noise", 1)[0], degraded(grey, ["a", "b"], "noise", 1)[1])


def test_jpeg_and_resizing_are_pillows(tmp_path: Path) -> None:
    picture = photographs()[:1]
    image = Image.fromarray((picture[0] * 255).round().byte().permute(1, 2, 0).numpy())
    image.save(tmp_path / "x.jpg", quality=15, subsampling="4:2:0")
    found = degraded(picture, ["a"], "jpeg", 3)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found * 255, np.asarray(Image.open(tmp_path / "x.jpg")), atol=1e-3)
    smaller = image.resize((26, 26), Image.Resampling.BICUBIC).resize((64, 64), Image.Resampling.BICUBIC)
    near = degraded(picture, ["a"], "resize", 3)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(near - np.asarray(smaller)).mean() < 2  # enlarging, Pillow's bicubic has another parameter


def test_a_models_figures_are_what_a_user_would_compute() -> None:
    model, processor = QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled")
    data = open_evaluation(str(assets.path("images", "drawings")), processor, limit=2)
    evaluator = Robustness(kinds=("noise", "jpeg"), severities=(4, 2))
    whole = measure(QLIPSubject(model, processor, "nano"), data, [evaluator], batch_size=2)
    assert whole is not None
    found = whole.findings["robustness"]
    (batch,) = data.batches(2)
    prepared = processor.preprocessing
    originals = (prepared.denormalize(batch.pixel_values) * 255).round() / 255
    with torch.inference_mode():
        clean = model.encode(batch.pixel_values)
        seen = prepared.normalize(degraded(originals, batch.keys, "noise", 4))
        indices = model.encode(seen)
        rebuilt = (prepared.denormalize(model.decode(indices)) * 255).round() / 255
        vectors = [unit(model.get_image_features(pixels)) for pixels in (seen, batch.pixel_values)]
    bits = [indices_to_bits(one, model.group_size) for one in (clean, indices)]
    (record,) = (one for one in found.tables["curves"] if (one["kind"], one["severity"]) == ("noise", 4))
    assert record["parameter"] == 0.26
    assert record["psnr"] == pytest.approx(float(psnr(rebuilt, originals).mean()), abs=1e-4)
    assert record["bits_equal"] == pytest.approx(100 * float((bits[0] == bits[1]).double().mean()), abs=1e-6)
    assert record["cosine"] == pytest.approx(float((vectors[0] * vectors[1]).sum(1).mean()), abs=1e-5)
    both = [one["psnr"] for one in found.tables["curves"] if one["kind"] == "noise" and one["severity"]]
    assert len(both) == 2 and found.values["noise_psnr"].value == pytest.approx(np.mean(both))
    assert found.values["noise_psnr"].value < found.values["clean_psnr"].value
    assert found.values["jpeg_bits_equal"].unit == "%" and 0 < found.values["jpeg_bits_equal"].value < 100


def plain(tmp_path: Path) -> Finding:
    write_pictures(tmp_path / "set", torch.full((3, 3, 32, 32), 90, dtype=torch.uint8))
    subject = Plain(32, lambda pixels: pixels)
    whole = measure(subject, opened(tmp_path / "set", subject), [Robustness(severities=(1, 5))])
    assert whole is not None
    return whole.findings["robustness"]


def test_a_subject_without_tokens_or_embeddings_has_the_other_figures(tmp_path: Path) -> None:
    found = plain(tmp_path)
    assert {name.split("_", 1)[1] for name in found.values} == {"psnr", "psnr_seen", "psnr_input"}
    # flat images that come back exactly: no blur harms them, and no figure is infinite
    assert found.values["clean_psnr"].value == found.values["blur_psnr"].value == CEILING
    assert found.values["noise_psnr"].value < 25
    assert all(math.isfinite(one.value) for one in found.values.values())


def test_curves_are_drawn(tmp_path: Path) -> None:
    path = plot(plain(tmp_path), tmp_path / "robustness.png", "flat grey")
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 400
    with pytest.raises(QLIPError, match="nothing to draw, for robustness was not measured"):
        plot(Finding({}), tmp_path / "other.png")


def test_settings_say_what_is_done_and_wrong_ones_are_refused() -> None:
    settings = Robustness(kinds=("jpeg",), severities=(5, 1)).settings()
    assert settings["parameters"] == {"jpeg": [25, 7]} and settings["severities"] == [1, 5]
    assert isinstance(registry.evaluator("robustness"), Robustness)
    for wrong in ({"kinds": ("fog",)}, {"severities": (6,)}, {"severities": ()}):
        with pytest.raises(QLIPError, match="robustness is under jpeg, blur, noise, resize at severities 1 to 5; got"):
            Robustness(**wrong)  # type: ignore[arg-type]
    with pytest.raises(QLIPError, match="got jpeg at 6"):
        degraded(photographs(), ["a", "b", "c"], "jpeg", 6)
