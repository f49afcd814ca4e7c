"""Entropy tables: their file, and the tables that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qlip.errors import QLIPError
from qlip.tokens import Tables
from tests.tokens.samples import entropy_tables


def test_tables__file_round_trip(tmp_path: Path) -> None:
    tables = entropy_tables(5)
    tables.save(tmp_path / "t.safetensors", {"data": "drawn"})
    read = Tables.load(tmp_path / "t.safetensors")
    assert read.digest == tables.digest and read.shift.shape == ()
    tables.save(tmp_path / "again.safetensors")
    assert Tables.load(tmp_path / "again.safetensors").digest == tables.digest
    assert entropy_tables(5, seed=1).digest != tables.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": np.array(30, np.int32)}, "shift must be 0 to 23, not 30"),
        ({"shift": np.array([8], np.int32)}, r"shift must be int32 \(\), not int32 \(1,\)"),
        ({"bias": np.zeros((2, 4), np.int64)}, r"bias must be int32 \(2, 4\), not int64"),
        ({"hidden_around": np.zeros((4, 9, 3), np.int16)}, r"hidden_around must be \(2, L, 9, H\)"),
        ({"output": np.full((2, 4, 3), 32767, np.int16)}, "sums may reach .* must stay below 16,777,216"),
        ({"probabilities": np.array([1, 0], np.uint16)}, "from 1 to 65,535 each"),
        ({"linear_around": np.ones((2, 4, 9, 4), np.int16)}, "weights for planes that are coded later"),
    ],
)
def test_tables__inexact_or_malformed_arrays_are_refused(change, message: str) -> None:  # type: ignore[no-untyped-def]
    tables = entropy_tables(4)
    with pytest.raises(QLIPError, match=message):
        Tables(**(tables._tensors() | change))


def test_tables__other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(QLIPError, match="cannot be read"):
        Tables.load(path)
    path.write_bytes(b"tables")
    with pytest.raises(QLIPError, match=r"t\.safetensors: not a whole safetensors file"):
        Tables.load(path)
    entropy_tables().save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(QLIPError, match="not a whole"):
        Tables.load(path)
    save_file({"weights": np.zeros(3)}, path)
    with pytest.raises(QLIPError, match="not a file of entropy tables"):
        Tables.load(path)
