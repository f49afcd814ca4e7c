"""Pairs are named file by file; what is no pair is refused before anything is measured."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from qlip import QLIPError
from qlip.data.loader.eval_set import EvalSet
from qlip.data.loader.transforms import EvalTransform
from qlip.evaluation.evaluators.reconstruction import Reconstruction
from qlip.evaluation.metrics.pixel import psnr
from qlip.evaluation.models.pairs import open_pairs
from qlip.evaluation.run.evaluate_dataset import PassResult, evaluate_dataset

from .plain import write_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three originals, and what became of them under names that sort another way."""
    generator = torch.Generator().manual_seed(0)
    originals = torch.randint(0, 256, (3, 3, 20, 36), generator=generator, dtype=torch.uint8)
    rebuilt = (originals.float() * torch.tensor([0.9, 0.5, 0.7]).view(3, 1, 1, 1)).round().to(torch.uint8)
    write_images(tmp_path / "originals", originals)
    write_images(tmp_path / "rebuilt", rebuilt.flip(0))
    lines = [{"original": f"originals/{n:02d}.png", "rebuilt": f"rebuilt/{2 - n:02d}.png"} for n in range(3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    rows = "".join(f"{line['original']},{line['rebuilt']},{100 + n}\n" for n, line in enumerate(lines))
    (tmp_path / "pairs.csv").write_text("original,rebuilt,bytes\n" + rows)
    expected = psnr(rebuilt.float() / 255, originals.float() / 255)
    torch.save(expected, tmp_path / "expected.pt")
    return tmp_path


def measured(path: Path) -> PassResult:
    model, source = open_pairs(path)
    found = evaluate_dataset(
        model, EvalSet(source, EvalTransform(model.preprocessing)), [Reconstruction()], batch_size=2
    )
    assert found is not None
    return found


def test_pairs__files_are_compared_as_the_list_pairs_them(folder: Path) -> None:
    expected = torch.load(folder / "expected.pt", weights_only=True)
    for name in ("pairs.jsonl", "pairs.csv"):
        found = measured(folder / name)
        metric_result = found.metric_results["reconstruction"]
        assert found.count == 3 and found.broken == []
        assert metric_result.values["psnr"].value == pytest.approx(float(expected.mean()), abs=1e-4)
        keys = [str(record["key"]) for record in metric_result.tables["best_psnr"]]
        assert keys == ["originals/00.png", "originals/02.png", "originals/01.png"]
        if name.endswith("csv"):
            assert metric_result.values["bits_per_pixel"].value == pytest.approx(8 * 101 / (20 * 36))
            assert metric_result.notes["bits_per_pixel"] == "bytes as the list of pairs gives them"
            assert "shrink_psnr" in metric_result.values
        else:  # nobody knows the bytes: nothing is said about them
            assert not {"bits_per_pixel", "compression_ratio", "shrink_psnr"} & set(metric_result.values)


def test_pairs__the_fingerprint_is_of_what_was_rebuilt(folder: Path) -> None:
    first, _ = open_pairs(folder / "pairs.jsonl", "theirs")
    again, _ = open_pairs(folder / "pairs.jsonl")
    assert first.fingerprint == again.fingerprint and (first.name, again.name) == ("theirs", "pairs")
    (folder / "rebuilt" / "01.png").write_bytes((folder / "rebuilt" / "00.png").read_bytes())
    assert open_pairs(folder / "pairs.jsonl")[0].fingerprint != first.fingerprint


def test_pairs__a_file_that_changes_under_a_evaluation_ends_it(folder: Path) -> None:
    for side in ("originals", "rebuilt"):
        model, source = open_pairs(folder / "pairs.jsonl")
        data, file = EvalSet(source, EvalTransform(model.preprocessing)), folder / side / "01.png"
        before, stamp = file.read_bytes(), source.stamp(1)
        file.write_bytes((folder / side / "00.png").read_bytes())
        assert source.stamp(1) != stamp
        with pytest.raises(QLIPError, match=rf"{side}/01\.png: changed after the list was opened"):
            evaluate_dataset(model, data, [Reconstruction()])
        file.unlink()
        with pytest.raises(QLIPError, match=rf"{side}/01\.png: is gone since the list was opened \(No such file"):
            evaluate_dataset(model, data, [Reconstruction()])
        file.write_bytes(before)
        assert evaluate_dataset(model, data, [Reconstruction()]) is not None


def test_pairs__what_is_no_pair_is_said_in_a_line(folder: Path, tmp_path: Path) -> None:
    def refused(content: str, says: str, suffix: str = "jsonl") -> None:
        path = folder / f"wrong.{suffix}"
        path.write_text(content)
        with pytest.raises(QLIPError, match=says) as raised:
            open_pairs(path)
        assert "\n" not in str(raised.value)

    good = '{"original": "originals/00.png", "rebuilt": "rebuilt/00.png"}'
    with pytest.raises(QLIPError, match="two folders have no pairs"):
        open_pairs(folder / "originals")
    with pytest.raises(QLIPError, match="No such file"):
        open_pairs(folder / "absent.jsonl")
    refused("", "names no pair")
    refused("[1]", "line 1: a json list; each line is an object")
    refused('original,rebuilt\n"originals/00.png,rebuilt/00.png\n', "not a comma-separated table", "csv")
    refused('{"original": "originals/00.png"}', "pair 1: needs original and rebuilt")
    refused("original,bytes\na.png,3\n", "pair 1: needs original and rebuilt", "csv")
    refused(good[:-1] + ', "bytes": "few"}', "bytes must be a whole number, got 'few'")
    refused(f"{good}\n{good[:-1]}" + ', "bytes": 3}', "some lines give bytes and some do not")
    refused(f"{good}\n{good}", "originals/00.png is named twice")
    refused(f"{good}\n{good.replace('originals/00', 'originals/01')}", r"rebuilt/00\.png is named twice")
    once_more = good.replace("rebuilt/00", "rebuilt/01")  # however it is spelled, and wherever it stands
    refused(f"{good}\n{once_more.replace('originals/', './originals/')}", r"originals/00\.png is named twice")
    refused(f"{good}\n{once_more.replace('originals/', 'rebuilt/../originals/')}", "originals/00.png is named twice")
    (folder / "link.png").symlink_to(folder / "originals" / "00.png")
    refused(f"{good}\n{once_more.replace('originals/00', 'link')}", r"link\.png is named twice")
    refused(f"{good}\n{once_more.replace('originals/00', 'rebuilt/00')}", r"rebuilt/00\.png is named twice")
    refused(good.replace("rebuilt/", "originals/"), r"originals/00\.png is named twice")
    refused(good.replace("rebuilt/00", "rebuilt/07"), r"rebuilt/07\.png: cannot be read \(No such file")
    (folder / "rebuilt" / "03.png").write_bytes(b"no image")
    refused(good.replace("rebuilt/00", "rebuilt/03"), r"rebuilt/03\.png: not an image that can be read")
    write_images(folder / "small", torch.zeros(1, 3, 20, 20, dtype=torch.uint8))
    refused(good.replace("rebuilt/00", "small/00"), r"small/00\.png: 20x20 pixels, the first has 36x20")


def test_pairs__nothing_but_the_pairs_can_be_measured(folder: Path) -> None:
    model, source = open_pairs(folder / "pairs.jsonl")
    data = EvalSet(source, EvalTransform(model.preprocessing))
    with pytest.raises(QLIPError, match="nothing else can be rebuilt"):
        model.reconstruct(data.collate([data[0]]).pixel_values)


def test_open_pairs__a_pipe_is_refused(folder: Path) -> None:
    (folder / "rebuilt/00.png").unlink()
    os.mkfifo(folder / "rebuilt/00.png")
    with pytest.raises(QLIPError, match=r"00\.png: not a regular file but a pipe"):
        open_pairs(folder / "pairs.csv")
