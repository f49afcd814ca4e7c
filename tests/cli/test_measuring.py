"""`qlip eval` of what is no model, and of what is no image: pairs of files, throughput."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from qlip.evaluation.report.result import Result
from qlip.evaluation.run import evaluate as running
from qlip.evaluation.run.suites import limited, specs_for, suite
from tests.cli.conftest import Command
from tests.evaluation.tiny import write_images


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A list of four pairs."""
    write_images(tmp_path / "originals", 4, 24, 0)
    write_images(tmp_path / "rebuilt", 4, 24, 0, contrast=0.9)
    path = tmp_path / "pairs.csv"
    path.write_text("original,rebuilt\n" + "".join(f"originals/{n:03d}.png,rebuilt/{n:03d}.png\n" for n in range(4)))
    return path


def test_the_report_is_json_where_a_image_came_back_exactly(qlip: Command, photos: Path, tmp_path: Path) -> None:
    """Its PSNR is infinite, a number that JSON has not: other readers than Python's refuse it."""
    copied = tmp_path / "copied.png"
    original = next(path for path in sorted(photos.rglob("*.png")))
    Image.open(original).convert("RGB").save(copied)
    (tmp_path / "one.csv").write_text(f"original,rebuilt\n{original},{copied}\n")

    def refused(name: str) -> None:
        raise AssertionError(name)

    report = json.loads(qlip("eval", "--pairs", tmp_path / "one.csv", "--json").out, parse_constant=refused)
    assert report["measured"][0]["tables"]["best_psnr"][0]["psnr"] == "Infinity"


def test_pairs_of_files_make_a_result_that_holds(qlip: Command, listed: Path, photos: Path) -> None:
    ran = qlip("eval", "--pairs", listed, "-o", "out")
    assert ran.code == 0 and "Compared as the files are: 24x24" in ran.out and f"--pairs {listed} --verify" in ran.out
    result = Result.load(Path("out/result.json"))
    (row,) = result.measured
    assert row.count == 4 and row.values["psnr"].value > 20 and row.data == str(listed)
    assert len(row.digest) == len(result.subject["fingerprint"]) == 64 and result.subject["name"] == "pairs"
    assert "data:image/png" in Path("out/report.html").read_text()
    assert qlip("eval", "--pairs", listed, "--verify", "out/result.json").code == 0
    none = qlip("eval", "--verify", "out/result.json")
    assert none.code == 2 and "of pairs of files; give the list with --pairs" in none.err
    write_images(listed.parent / "rebuilt", 4, 24, 0, contrast=0.8)
    changed = qlip("eval", "--pairs", listed, "--verify", "out/result.json")
    assert changed.code == 1 and "the model's fingerprint" in changed.out
    again = qlip("eval", "--pairs", listed, "-o", "out")
    assert again.code == 1 and "another evaluation (subject differ)" in again.err


def test_an_original_that_was_replaced_is_measured_again(qlip: Command, listed: Path) -> None:
    def psnr() -> float:
        ran = qlip("eval", "--pairs", listed, "-o", "out", "--json")
        return float(ran.json["measured"][0]["values"]["psnr"]["value"])

    before = psnr()
    write_images(listed.parent / "originals", 1, 24, 7)
    assert psnr() < before - 1


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--pairs", "LIST", "--model", "other"], 2, "leave out --model"),
        (["--pairs", "LIST", "--data", "x", "--size", "8", "8"], 2, "leave out --data, --size"),
        (["--pairs", "LIST", "--device", "cpu", "--dtype", "float16"], 2, "leave out --device, --dtype"),
        (["--pairs", "LIST", "--evaluator", "reconstruction", "--evaluator", "throughput"], 1, "nothing to time"),
        (["--verify", "gone.json", "--codecs"], 2, "leave out --codecs"),
        (["--model", "gone", "--evaluator", "throughput", "--limit", "3"], 2, "leave out --limit"),
        (["--model", "gone", "--data", "x", "--evaluator", "codebook", "--codecs"], 2, "measure reconstruction too"),
        (["--model", "gone.py:made", "--data", "x", "--dtype", "float16"], 2, "leave out --dtype"),
        (["--pairs", "FOLDER"], 1, "two folders have no pairs"),
        (["--pairs", "LIST", "--evaluator", "zero_shot"], 1, "pairs cannot encode image or encode text"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    qlip: Command, listed: Path, arguments: list[str], code: int, says: str
) -> None:
    files = {"LIST": str(listed), "FOLDER": str(listed.parent)}
    ran = qlip("eval", *[files.get(one, one) for one in arguments])
    assert ran.code == code and says in ran.err and len(ran.error_lines) == 1, ran.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("-o", "out"), "stopped; the same command goes on from there"),
        ((), "stopped; nothing was reported"),
        (("--verify", "done/result.json", "-o", "out"), "stopped; nothing was reported"),  # which begins anew each time
    ],
)
def test_what_is_true_is_said_when_it_is_stopped(
    qlip: Command, model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], says: str
) -> None:
    assert qlip("eval", "--model", model, "--data", photos, "-o", "done").code == 0

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "run_specs", stopped)
    of = () if "--verify" in options else ("--data", photos)
    ran = qlip("eval", "--model", model, *of, *options)
    assert ran.code == 130 and ran.error_lines == [says]


def test_throughput_is_a_row_that_verifying_leaves_out(qlip: Command, model: Path, photos: Path) -> None:
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


def test_throughput_needs_no_set_and_is_measured_once() -> None:
    assert [item.evaluator for item in specs_for([], ["throughput"])] == ["throughput"]
    both = specs_for(["a", "b"], ["throughput", "codebook"], limit=3)
    assert [item.evaluator for item in both] == ["codebook", "codebook", "throughput"]
    assert limited(both, 2)[-1] == both[-1]
    assert suite("full")[-1].evaluator == "throughput"
