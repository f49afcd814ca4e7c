"""`qlip eval --pairs`, and options that exclude each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from qlip.evaluation.report.result import Result
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


def test_pairs__report_is_strict_json_with_an_infinite_psnr(qlip: Command, photos: Path, tmp_path: Path) -> None:
    """JSON has no infinite numbers; strict readers refuse them."""
    copied = tmp_path / "copied.png"
    original = next(path for path in sorted(photos.rglob("*.png")))
    Image.open(original).convert("RGB").save(copied)
    (tmp_path / "one.csv").write_text(f"original,rebuilt\n{original},{copied}\n")

    def refused(name: str) -> None:
        raise AssertionError(name)

    report = json.loads(qlip("eval", "--pairs", tmp_path / "one.csv", "--json").out, parse_constant=refused)
    assert report["measured"][0]["tables"]["best_psnr"][0]["psnr"] == "Infinity"


def test_pairs__result_can_be_verified(qlip: Command, listed: Path, photos: Path) -> None:
    ran = qlip("eval", "--pairs", listed, "-o", "out")
    assert ran.code == 0 and "Compared as the files are: 24x24" in ran.out and f"--pairs {listed} --verify" in ran.out
    result = Result.load(Path("out/result.json"))
    (row,) = result.measured
    assert row.count == 4 and row.values["psnr"].value > 20 and row.data == str(listed)
    assert len(row.digest) == len(result.subject["fingerprint"]) == 64 and result.subject["name"] == "pairs"
    assert "data:image/png" in Path("out/report.html").read_text()
    assert qlip("eval", "--pairs", listed, "--verify", "out/result.json").code == 0
    none = qlip("eval", "--verify", "out/result.json")
    assert none.code == 2 and "is a result of pairs of files; give the list with --pairs" in none.err
    write_images(listed.parent / "rebuilt", 4, 24, 0, contrast=0.8)
    changed = qlip("eval", "--pairs", listed, "--verify", "out/result.json")
    assert changed.code == 1 and "the model's fingerprint" in changed.out
    again = qlip("eval", "--pairs", listed, "-o", "out")
    assert again.code == 2 and "out: holds another result" in again.err


def test_pairs__replaced_original_is_measured_again(qlip: Command, listed: Path) -> None:
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
        (
            ["--model", "gone", "--data", "x", "--evaluator", "codebook", "--codecs"],
            2,
            "needs the evaluator reconstruction",
        ),
        (["--model", "gone.py:made", "--data", "x", "--dtype", "float16"], 2, "leave out --dtype"),
        (["--pairs", "FOLDER"], 1, "two folders have no pairs"),
        (["--pairs", "LIST", "--evaluator", "zero_shot"], 1, "pairs cannot encode image or encode text"),
    ],
)
def test_eval__options_that_exclude_each_other(
    qlip: Command, listed: Path, arguments: list[str], code: int, says: str
) -> None:
    files = {"LIST": str(listed), "FOLDER": str(listed.parent)}
    ran = qlip("eval", *[files.get(one, one) for one in arguments])
    assert ran.code == code and says in ran.err and len(ran.error_lines) == 1, ran.err
