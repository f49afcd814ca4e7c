"""`qlip eval statistics` and `qlip eval generated`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlip.cli.evaluation import generated
from qlip.evaluation.metrics.frechet import Moments, frechet_distance
from qlip.evaluation.metrics.statistics import Statistics
from qlip.evaluation.networks import VGG16Features
from qlip.evaluation.networks.lpips import LPIPS
from qlip.evaluation.report.result import Result
from tests.cli.conftest import Command
from tests.evaluation.tiny import Tiny, TinyInception, write_images
from tests.weights import lpips_weights


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    """Twelve real images of 48 pixels, ten duller ones of 40, each with its caption; and weights for their features."""
    lpips_weights()
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
    assert set(row.values) == {"fd_vgg16", "kd_vgg16", "precision_vgg16_relu5", "recall_vgg16_relu5"}
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


def test_generated__captions_of_a_drawn_suite(
    qlip: Command, sets: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    """LlamaGen's layout of COCO-30k: captions.txt beside the folder images, a line per image."""
    real, made = sets
    (tmp_path / "suite").mkdir()
    images = made.rename(tmp_path / "suite" / "images")
    listed = [path.read_text() for path in sorted(images.glob("*.txt"))]
    command = ("eval", "generated", images, "--reference", real, "--scorer", model, "--json")
    for path in images.glob("*.txt"):
        path.unlink()
    (tmp_path / "suite" / "captions.txt").write_text("".join(f"{one}\n" for one in listed))
    (row,) = qlip(*command).json["measured"]
    assert [one["text"] for one in row["tables"]["scores"]] == listed
    (tmp_path / "suite" / "captions.txt").write_text("a cat\n")
    refused = qlip(*command)
    assert refused.code == 1 and "captions.txt: 1 captions for 10 images; give one line per image" in refused.err


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


def test_generated__cheap_checks_come_before_the_reference(
    qlip: Command, sets: tuple[Path, Path], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed sizes, a wrong count and a scorer that does not exist used to be found after the pass over real images."""
    real, made = sets
    monkeypatch.setattr(generated, "_statistics", lambda *_: pytest.fail("the real images were measured"))
    reference = ("eval", "generated", made, "--reference", real)
    assert "11 images are needed, got 10" in qlip(*reference, "--num-images", 11).err
    assert "nowhere: no such folder" in qlip(*reference, "--scorer", "./nowhere").err
    inside = qlip(*reference, "-o", made / "out")
    assert inside.code == 2 and "lies in" in inside.err and "choose a folder outside" in inside.err
    (turned,) = write_images(made / "turned", 1, 40, 5)
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(turned) as image:
        image.crop((0, 0, 40, 30)).save(turned, exif=exif)
    assert "turned/000.png: has 30x40 pixels, 000.png has 40x40" in qlip(*reference).err
    turned.write_bytes(b"no image")
    assert "turned/000.png: not an image" in qlip(*reference).err


def test_generated__statistics_of_unchanged_images_are_cached(
    qlip: Command, sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = sets
    network = VGG16Features(LPIPS("vgg"))
    monkeypatch.setattr(generated, "_network", lambda *_: network)
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path / "cache"))
    reference = ("eval", "generated", made, "--reference", real, "--json")
    first, again = qlip(*reference), qlip(*reference)
    assert "are taken from" not in first.err and "are taken from" in again.err
    assert first.json["measured"][0]["values"] == again.json["measured"][0]["values"]
    (stored,) = (tmp_path / "cache" / "statistics").iterdir()
    (real / "003.png").write_bytes((real / "004.png").read_bytes() + b" ")
    assert "are taken from" not in qlip(*reference).err
    assert len(list(stored.parent.iterdir())) == 2


def test_generated__another_result_is_not_overwritten(qlip: Command, sets: tuple[Path, Path], model: Path) -> None:
    real, made = sets
    assert qlip("eval", "--model", model, "--data", made, "-o", "out").code == 0
    before = Path("out/result.json").read_bytes()
    ran = qlip("eval", "generated", made, "--reference", real, "-o", "out")
    assert ran.code == 2 and "holds another result, of" in ran.err
    for options in (("--data", real), ("--data", made, "--evaluator", "codebook"), ("--data", made, "--limit", 3)):
        ran = qlip("eval", "--model", model, *options, "-o", "out")
        assert ran.code == 2 and "choose another folder, or delete this one" in ran.err
    assert Path("out/result.json").read_bytes() == before
    assert qlip("eval", "--model", model, "--data", made, "-o", "out").code == 0
    inside = qlip("eval", "--model", model, "--data", made, "-o", made / "out")
    assert inside.code == 2 and "lies in" in inside.err and not (made / "out").exists()


def test_generated__statistics_and_samples_as_numpy_files(
    qlip: Command, sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ADM's and clean-fid's mu and sigma, and samples as arr_0, give the distance of the files they are made of."""
    real, made = sets
    network = TinyInception()
    monkeypatch.setattr(generated, "_network", lambda *_: network)
    assert qlip("eval", "statistics", real, "-o", "real.safetensors", "--resolution", 40).code == 0
    moments = Statistics.load("real.safetensors").moments
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(made.glob("*.png"))])
    np.savez("real.npz", mu=moments.mean.numpy(), sigma=moments.covariance.numpy(), arr_0=images[:2])
    np.savez("made.npz", images)
    compare = ("eval", "generated", "--json", "--reference")
    (expected,) = qlip(*compare, "real.safetensors", made).json["measured"]
    for samples in (made, "made.npz"):
        (row,) = qlip(*compare, "real.npz", samples).json["measured"]
        assert row["values"]["gfid"]["value"] == pytest.approx(expected["values"]["gfid"]["value"], rel=1e-6)
        assert set(row["values"]) == {"gfid"} and "left out" in row["notes"]["kid"]
        assert "network and preparation are not in the file" in row["notes"]["reference"]
    for name, dimensions, code, message in (
        ("x.npz", 3, 1, r"mu is \(3,\), and fid has 5 features"),
        ("ffhq_clean_trainval_256.npz", 5, 1, "statistics of clean-fid's mode clean, which resizes .* clean-fid$"),
    ):
        np.savez(name, mu=np.zeros(dimensions), sigma=np.eye(dimensions))
        refused = qlip(*compare, name, made)
        assert refused.code == code and re.search(message, refused.err), refused.err
    refused = qlip(*compare, "real.npz", made, "--network", "vgg16")
    assert refused.code == 2 and "holds statistics of inception" in refused.err
    network.convention = "clean-fid"  # what the preparation asks for
    np.savez("ours_clean_custom_na.npz", mu=moments.mean.numpy(), sigma=moments.covariance.numpy())
    (row,) = qlip(*compare, "ours_clean_custom_na.npz", made, "--preparation", "clean-fid").json["measured"]
    assert list(row["values"].values())[0]["value"] == pytest.approx(expected["values"]["gfid"]["value"], rel=1e-6)
    refused = qlip(*compare, real, made, "--network", "inception", "--preparation", "clean-fid")
    assert refused.code == 1 and "takes its reference from an .npz file of mode clean" in refused.err


def test_generated__preparations_are_by_their_names_and_in_the_result(
    qlip: Command, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wide real images and generated ones of 40 pixels: as they are against ADM's crop, or all as LlamaGen does."""
    real, made, network, asked = tmp_path / "real", tmp_path / "made", Tiny(), list[object]()
    monkeypatch.setattr(generated, "_network", lambda *given: asked.append(str(given[2])) or network)
    write_images(made, 6, 40, 1)
    for path in (*made.glob("*.png"), *write_images(real, 6, 120, 0)):
        path.with_suffix(".txt").write_text("a cat")
    for path in real.glob("*.png"):
        with Image.open(path) as image:
            wide = image.resize((180, 100))
        wide.save(path)

    def distance(*folders: Path) -> float:
        moments = [Moments(5) for _ in folders]
        for one, folder in zip(moments, folders, strict=True):
            for path in sorted(folder.glob("*.png")):
                pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 255
                one.add(network.features(pixels))
        return frechet_distance(*moments).distance

    def prepared(folder: Path, name: str, crop: Callable[[Image.Image], Image.Image]) -> Path:
        (tmp_path / name).mkdir()
        for path in folder.glob("*.png"):
            crop(Image.open(path)).save(tmp_path / name / path.name)
        return tmp_path / name

    def adm(image: Image.Image) -> Image.Image:
        return (
            image.resize((90, 50), Image.Resampling.BOX)
            .resize((72, 40), Image.Resampling.BICUBIC)
            .crop((16, 0, 56, 40))
        )

    def llamagen(image: Image.Image) -> Image.Image:
        left = 40 if image.width == 180 else 0
        return image.crop((left, 0, image.width - left, image.height)).resize((256, 256), Image.Resampling.LANCZOS)

    command = ("eval", "generated", made, "--reference", real, "--json", "--preparation")
    (row,) = qlip(*command, "adm").json["measured"]
    assert row["values"]["fd_tiny"]["value"] == pytest.approx(distance(made, prepared(real, "adm", adm)), rel=1e-4)
    assert row["preparation"] == "40x40; reference: 40x40, ADM's centre crop"
    scored = ("--scorer", model, "--clip-score", "gigagan")
    (row,) = qlip(*command, "llamagen", *scored).json["measured"]
    expected = distance(prepared(made, "made256", llamagen), prepared(real, "real256", llamagen))
    assert row["values"]["fd_tiny"]["value"] == pytest.approx(expected, rel=1e-4)
    rule = "256x256, centre crop, then Lanczos, as LlamaGen"
    assert row["preparation"] == f"{rule}; reference: {rule}" and asked == ["adm", "llamagen"]
    (score,) = (one["value"] for name, one in row["values"].items() if name.startswith("clip_score_gigagan_"))
    assert -1 <= score <= 1
    statistics = qlip(
        "eval", "statistics", real, "-o", "x.safetensors", "--resolution", 256, "--preparation", "llamagen"
    )
    assert statistics.code == 0 and "as LlamaGen" in statistics.out
    refused = qlip("eval", "generated", made, "--reference", real, "--clip-score", "hessel")
    assert refused.code == 2 and "--clip-score needs --scorer" in refused.err
