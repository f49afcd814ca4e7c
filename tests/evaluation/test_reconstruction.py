"""The figures of a reconstruction: those of the metrics over pairs, their bytes, and the images at both ends."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlip import QLIPError, QLIPModel, QLIPProcessor, assets
from qlip.evaluation import open_evaluation
from qlip.evaluation.evaluators import registry
from qlip.evaluation.evaluators.base import Evaluator, MetricResult, MetricValue
from qlip.evaluation.evaluators.reconstruction import Reconstruction, shrink_to_bytes
from qlip.evaluation.evaluators.set_distance import SetDistance
from qlip.evaluation.metrics.pixel import psnr, ssim
from qlip.evaluation.models.base import EvalModel, QLIPEvalModel
from qlip.evaluation.models.batch import reconstruct_by_key
from qlip.evaluation.networks import VGG16Features
from qlip.evaluation.networks.lpips import LPIPS
from qlip.evaluation.report.result import EvalResult, Result
from qlip.evaluation.run.evaluate_dataset import evaluate_dataset

from ..weights import lpips_weights
from .plain import Plain, opened, write_images


def darkened(pixels: Tensor) -> Tensor:
    """Each image by a tenth of its own brightness, and what is outside [0, 1] for the model's user to clamp."""
    return pixels * 1.1 - 0.05


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    levels = torch.linspace(40, 255, 5).view(-1, 1, 1, 1)
    return (torch.rand(5, 3, 48, 48, generator=generator) * levels).to(torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: Tensor) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, images)
    return folder


def found(model: EvalModel, folder: Path, evaluator: Reconstruction, batch_size: int = 2) -> MetricResult:
    whole = evaluate_dataset(model, opened(folder, model), [evaluator], batch_size=batch_size)
    assert whole is not None
    return whole.metric_results["reconstruction"]


def test_reconstruction__metrics_are_means_of_the_metrics_over_pairs(folder: Path, images: Tensor) -> None:
    model = Plain(48, darkened, num_bytes=96)
    values = found(model, folder, Reconstruction()).values
    originals = images.float() / 255
    rebuilt = (darkened(originals).clamp(0, 1) * 255).round() / 255
    shrunk = (shrink_to_bytes(originals, 96) * 255).round() / 255
    expected = {
        "psnr": psnr(rebuilt, originals),
        "ssim": ssim(rebuilt, originals),
        "l1": (rebuilt - originals).abs().mean((1, 2, 3)),
        "shrink_psnr": psnr(shrunk, originals),
        "shrink_ssim": ssim(shrunk, originals),
    }
    assert set(values) == {*expected, "bits_per_pixel", "compression_ratio"}
    for name, figure in expected.items():
        assert values[name].value == pytest.approx(float(figure.double().mean()), abs=1e-5), name
        low, high = values[name].low, values[name].high
        assert low is not None and high is not None and low < values[name].value < high
    assert values["bits_per_pixel"].value == pytest.approx(8 * 96 / 48**2)
    assert values["compression_ratio"].value == pytest.approx(3 * 48**2 / 96)
    assert (values["psnr"].unit, values["psnr"].better, values["l1"].better) == ("dB", "higher", "lower")


def test_reconstruction__a_models_metrics_are_those_of_its_own_encode_and_decode() -> None:
    model, processor = QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled")
    data = open_evaluation(str(assets.path("images")), processor)
    whole = evaluate_dataset(QLIPEvalModel(model, processor, "nano"), data, [Reconstruction()], batch_size=6)
    assert whole is not None
    metrics: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        for batch in data.batches(6):
            made = batch.pixel_values, model.decode(model.encode(batch.pixel_values))
            originals, rebuilt = ((one * 0.5 + 0.5).clamp(0, 1).mul(255).round() / 255 for one in made)
            shrunk = (shrink_to_bytes(originals, 64 * 28 // 8) * 255).round() / 255
            for name, first in (("", rebuilt), ("shrink_", shrunk)):
                metrics.setdefault(f"{name}psnr", []).append(psnr(first, originals))
                metrics.setdefault(f"{name}ssim", []).append(ssim(first, originals))
            metrics.setdefault("l1", []).append((rebuilt - originals).abs().mean((1, 2, 3)))
    found = whole.metric_results["reconstruction"]
    for name, column in metrics.items():
        assert found.values[name].value == pytest.approx(float(torch.cat(column).double().mean()), abs=1e-5), name
    assert whole.count == len(torch.cat(metrics["l1"])) == len(data)
    assert found.notes["ms_ssim"].endswith("take 176 pixels a side, not 64x64")


def test_reconstruction__tables_hold_the_images_at_both_ends(folder: Path) -> None:
    model = Plain(48, darkened)
    one = found(model, folder, Reconstruction(examples=2, thumbnails=24))
    by_key = {record["key"]: record["psnr"] for record in found(model, folder, Reconstruction()).tables["best_psnr"]}
    order = sorted(by_key, key=lambda key: by_key[key])
    assert [record["key"] for record in one.tables["worst_psnr"]] == order[:2]
    assert [record["key"] for record in one.tables["best_psnr"]] == order[:-3:-1]
    assert set(one.tables["best_psnr"][0]) == {"key", "psnr", "ssim", "l1", "bits_per_pixel"}
    again = reconstruct_by_key(model, opened(folder, model), order[:2])
    for number, key in enumerate(order[:2]):
        small, large = one.arrays["worst_psnr"][number], torch.stack(again[key])
        assert small.shape == (2, 3, 24, 24) and large.shape == (2, 3, 48, 48)
        assert abs(float(small.float().mean() - large.float().mean())) < 1
    with pytest.raises(QLIPError, match=r"has no image cat\.png; was another dataset evaluated"):
        reconstruct_by_key(model, opened(folder, model), ["cat.png"])


def test_reconstruction__the_thumbnail_of_a_small_image_is_the_image(folder: Path, images: Tensor) -> None:
    one = found(Plain(48, lambda pixels: pixels), folder, Reconstruction(examples=1, thumbnails=64))
    at = int(one.tables["worst_psnr"][0]["key"][:2])  # type: ignore[index]
    assert torch.equal(one.arrays["worst_psnr"][0], torch.stack((images[at], images[at])))


def test_reconstruction__what_comes_back_exactly_is_infinitely_near_and_said(folder: Path, tmp_path: Path) -> None:
    one = found(Plain(48, lambda pixels: pixels), folder, Reconstruction(shrink=False))
    assert one.values["psnr"].value == math.inf and one.values["psnr"].low is None
    assert one.notes["psnr"] == "5 of 5 images came back exactly; there is no error to average"
    assert one.values["psnr_exact"].value == 5
    assert one.values["ssim"].value == 1 and one.values["l1"].value == 0
    row = EvalResult(
        evaluator="reconstruction",
        settings=dict(Reconstruction().settings()),
        title="t",
        data="d",
        count=5,
        limit=None,
        broken=[],
        preparation="",
        as_shipped=True,
        digest="",
        values=one.values,
        notes=one.notes,
        tables=one.tables,
    )
    result = Result(subject={}, measured=[row], command="", time="", packages={}, machine="")
    result.save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json").measured[0].values["psnr"].value == math.inf


def test_reconstruction__large_images_have_ms_ssim(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (2, 3, 180, 180), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    write_images(tmp_path, noise)
    one = found(Plain(180, darkened), tmp_path, Reconstruction(shrink=False))
    assert 0.5 < one.values["ms_ssim"].value < 1 and "ms_ssim" not in one.notes
    assert "ms_ssim" in one.tables["worst_psnr"][0]


def test_reconstruction__lpips_of_both_networks_stands_beside(folder: Path, images: Tensor) -> None:
    lpips_weights()
    one = found(Plain(48, darkened), folder, Reconstruction(lpips=("vgg", "alex"), shrink=False))
    originals = images.float() / 255
    rebuilt = (darkened(originals).clamp(0, 1) * 255).round() / 255
    for net in ("vgg", "alex"):
        expected = LPIPS.from_cache(net)(2 * rebuilt - 1, 2 * originals - 1)  # type: ignore[arg-type]
        assert one.values[f"lpips_{net}"].value == pytest.approx(float(expected.mean()), rel=1e-4)
        ranked = [record[f"lpips_{net}"] for record in one.tables[f"worst_lpips_{net}"]]
        assert ranked == sorted(ranked, reverse=True)  # type: ignore[type-var]
        assert one.values[f"lpips_{net}"].better == "lower"


def test_reconstruction__one_pass_of_vgg_serves_lpips_and_the_distance_between_sets(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lpips_weights()
    passes: list[int] = []
    levels = LPIPS.levels_and_pooled

    def counted(self: LPIPS, images: Tensor) -> tuple[list[Tensor], Tensor]:
        passes.append(len(images))
        return levels(self, images)

    monkeypatch.setattr(LPIPS, "levels_and_pooled", counted)

    def measured(*evaluators: Evaluator) -> dict[str, dict[str, MetricValue]]:
        passes.clear()
        whole = evaluate_dataset(Plain(48, darkened), opened(folder, Plain(48, darkened)), evaluators, batch_size=2)
        assert whole is not None
        return {name: one.values for name, one in whole.metric_results.items()}  # arrays have no equality

    lpips, sets = measured(Reconstruction(("vgg",), shrink=False)), measured(SetDistance())
    assert sum(passes) == 2 * 5
    both = measured(Reconstruction(("vgg",), shrink=False), SetDistance())
    assert sum(passes) == 2 * 5 and both == lpips | sets
    # features of other weights are others
    random = measured(Reconstruction(("vgg",), shrink=False), SetDistance(VGG16Features(LPIPS("vgg"))))
    assert sum(passes) == 4 * 5 and random["sets"]["fd_vgg16"] != sets["sets"]["fd_vgg16"]


def test_reconstruction__what_cannot_be_measured_is_said_in_a_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(QLIPError, match="qlip data get lpips"):
        found(Plain(48, darkened), folder, Reconstruction(lpips=("vgg",), cache_dir=tmp_path))
    with pytest.raises(QLIPError, match=r"^plain: 24x24 pixels are too few for lpips_alex, which takes 31 a side"):
        found(Plain(24, darkened), folder, Reconstruction(lpips=("alex",)))
    with pytest.raises(QLIPError, match="LPIPS knows the networks vgg and alex, got 'squeeze'"):
        Reconstruction(lpips=("squeeze",))  # type: ignore[arg-type]
    with pytest.raises(QLIPError, match=r"^00\.png: reconstructed pixels hold NaN; the output of plain is broken"):
        found(Plain(48, lambda pixels: pixels / 0 * 0), folder, Reconstruction())
    with pytest.raises(QLIPError, match=r"^00\.png: reconstructed pixels hold infinite values"):  # not white
        found(Plain(48, lambda pixels: pixels + torch.inf), folder, Reconstruction())
    with pytest.raises(QLIPError, match="are no pairs"):
        found(Plain(48, lambda pixels: pixels[..., :-1]), folder, Reconstruction())


def test_reconstruction__is_registered() -> None:
    assert isinstance(registry.evaluator("reconstruction"), Reconstruction)
