"""Plain arrays of ids, as other trainers map them into memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qlip import QLIPError
from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.manage.export_arrays import export_arrays
from qlip.lm import SequenceLayout
from tests.archive.made import made
from tests.cli.conftest import Command
from tests.cli.conftest import qlip as qlip  # the command, as a fixture


def test_export_arrays__npy_holds_the_group_values_and_labels(tmp_path: Path) -> None:
    dataset = TokenDataset(made(tmp_path / "t", parts=2, rows=6).address)
    path = export_arrays(dataset, tmp_path / "out")
    ids = np.load(path, mmap_mode="r")
    assert ids.dtype == np.uint16 and ids.shape == (12, 8)  # 4 tokens of 2 groups of 14 bits
    assert torch.equal(torch.from_numpy(ids.astype(np.int64)).view(12, 4, 2), dataset[:])
    facts = json.loads((tmp_path / "out/tokens.json").read_text())
    assert (facts["shape"], facts["vocabulary_size"], facts["classes"]) == ([12, 8], 16384, ["cat", "dog"])
    assert np.load(tmp_path / "out/labels.npy").tolist() == [0, 1, -1, 0, 1, -1] * 2


def test_export_arrays__bin_is_the_same_numbers_without_a_header(tmp_path: Path) -> None:
    dataset = TokenDataset(made(tmp_path / "t", captions=False).address, group_size=7)
    stream = np.memmap(export_arrays(dataset, tmp_path / "out", "bin", begin=True), dtype=np.uint16, mode="r")
    layout = SequenceLayout(7, 4, begin=True)
    assert stream.reshape(15, 17).tolist() == layout.to_sequence(dataset[:]).tolist()
    assert not (tmp_path / "out/labels.npy").exists()


def test_export_arrays__a_large_vocabulary_takes_uint32(tmp_path: Path) -> None:
    dataset = TokenDataset(made(tmp_path / "t").address, group_size=28)
    assert np.load(export_arrays(dataset, tmp_path / "out")).tolist() == dataset[:].flatten(1).tolist()
    mixed = TokenDataset(made(tmp_path / "m", grid=[(2, 2), (1, 3)]).address)
    with pytest.raises(QLIPError, match="its rows have several grids"):
        export_arrays(mixed, tmp_path / "none")


def test_tokens_export__formats(qlip: Command, tmp_path: Path) -> None:
    made(tmp_path / "t")
    ran = qlip("tokens", "export", tmp_path / "t", "-o", "out", "--format", "bin", "--group-size", 7, "--begin")
    assert (ran.code, ran.out) == (0, "15 rows in out/tokens.bin\n") and Path("out/tokens.bin").stat().st_size == 510
    assert qlip("tokens", "export", tmp_path / "t", "-o", "out", "--begin").code == 2
