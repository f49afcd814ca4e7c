"""`qlip eval statistics` and `qlip eval generated`."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlip.evaluation.metrics.statistics import Statistics
from qlip.evaluation.report.result import Result
from tests.cli.conftest import Command
from tests.evaluation.tiny import write_images


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    """Twelve real images of 48 pixels, ten duller ones of 40, each with its caption."""
    real, made = tmp_path / "real", tmp_path / "made"
    write_images(real, 12, 48, 0)
    for path in write_images(made, 10, 40, 1, contrast=0.5):
        path.with_suffix(".txt").write_text(f"an image called {path.stem}")
    return real, made


def test_generated__statistics_file_and_set_give_the_same_distance(
    qlip: Command, sets: tuple[Path, Path], model: Path
) -> None:
    real, made = sets
    ran = qlip("eval", "statistics", real, "-o", "real.safetensors", "--resolution", 40)
    assert ran.code == 0 and "fd_vgg16" in ran.out and "40x40, bicubic, centre crop" in ran.out
    origin = Statistics.load("real.safetensors").origin
    assert (origin.count, origin.size, origin.source) == (12, (40, 40), str(real))
    stored = qlip("eval", "generated", made, "--reference", "real.safetensors", "--num-images", 10, "-o", "out")
    assert stored.code == 0 and "FID" not in stored.out.upper().replace("FD_VGG16", "")
    assert "10 images for 512 features: the covariance is singular and the distance biased" in stored.err
    assert origin.digest in Path("out/report.html").read_text()
    (row,) = Result.load(Path("out/result.json")).measured
    assert set(row.values) == {"fd_vgg16", "kd_vgg16", "precision_vgg16", "recall_vgg16"}
    assert row.count == 10 and row.digest == origin.digest and row.settings["reference"]["digest"] == origin.digest
    scored = qlip("eval", "generated", made, "--reference", real, "--scorer", model, "--json").json["measured"][0]
    assert scored["values"]["fd_vgg16"]["value"] == pytest.approx(row.values["fd_vgg16"].value, rel=1e-6)
    (name,) = set(scored["values"]) - set(row.values)
    assert name.startswith("clip_score_") and "it may judge its own" in scored["notes"][name]
    assert scored["tables"]["scores"][3]["text"] == "an image called 003" and scored["settings"]["scorer"]
    side_by_side = qlip("compare", "out")
    assert side_by_side.code == 0 and "made" in side_by_side.out
    again = qlip("eval", "--verify", "out/result.json")
    assert again.code == 2 and "measure them again with qlip eval generated" in again.err


def test_generated__scorer_that_is_the_tokenizer_is_noted(qlip: Command, sets: tuple[Path, Path], model: Path) -> None:
    real, made = sets
    ran = qlip("eval", "generated", made, "--reference", real, "--scorer", model, "--tokenizer", model)
    assert ran.code == 0 and "it judges its own images" in ran.err and "may judge" not in ran.err


def test_generated__wrong_usage_is_one_line(qlip: Command, sets: tuple[Path, Path], model: Path) -> None:
    real, made = sets
    assert qlip("eval", "statistics", real, "-o", "real.safetensors", "--resolution", 48).code == 0

    def refused(code: int, says: str, *arguments: object) -> None:
        ran = qlip("eval", *arguments)
        assert ran.code == code and says in ran.err and len(ran.error_lines) == 1, ran.err

    reference = ("generated", made, "--reference")
    refused(1, "are of 48x48 pixels, these images have 40x40", *reference, "real.safetensors")
    refused(2, "holds statistics of vgg16", *reference, "real.safetensors", "--network", "resnet50")
    refused(2, "--workers needs images to read", *reference, "real.safetensors", "--workers", 2)
    refused(1, "gone.safetensors: no such file", *reference, "gone.safetensors")
    refused(1, "11 images are needed, got 10", *reference, real, "--num-images", 11)
    refused(2, "--tokenizer needs --scorer", *reference, real, "--tokenizer", "none")
    refused(2, "must end in .safetensors", "statistics", real, "-o", "real.npz", "--resolution", 48)
    refused(2, "--limit before statistics", "--limit", 3, "statistics", real, "-o", "x.safetensors", "--resolution", 48)
    (made / "003.txt").unlink()
    refused(1, "003.png: has 0 captions", *reference, real, "--scorer", model)
