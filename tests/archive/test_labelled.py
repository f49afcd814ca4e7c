"""Pairs of indices and class ids."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

from qlip import QLIPError
from qlip.archive import LabelledTokens, TokenDataset
from qlip.archive.dataset.layout import Layout
from tests.archive.made import info, made, table_of


def test_labelled_tokens__pairs_in_alphabetical_order_of_the_classes(tmp_path: Path) -> None:
    dataset = TokenDataset(made(tmp_path / "t", parts=2, rows=4).address)
    pairs = LabelledTokens(dataset)
    assert pairs.classes == ("cat", "dog") and len(pairs) == 8
    assert pairs.class_ids(range(4)).tolist() == [0, 1, -1, 0]
    indices, label = pairs[5]
    assert torch.equal(indices, dataset[5]) and label == 1
    stacked, labels = next(iter(DataLoader(pairs, batch_size=8)))
    assert torch.equal(stacked, dataset[:]) and labels.tolist() == [0, 1, -1, 0] * 2


def test_labelled_tokens__numbers_are_in_numerical_order(tmp_path: Path) -> None:
    import numpy as np

    layout = Layout(str(tmp_path / "t"))
    layout.write_info(info())
    table = table_of(info(), ["a", "b", "c"], [(2, 2)], np.random.default_rng(0))
    table = table.set_column(table.schema.get_field_index("label"), "label", pa.array(["10", "9", "0"]))
    layout.write_manifest([layout.write_part(info(), 0, "shard", 3, table)])
    dataset = TokenDataset(layout.address)
    assert LabelledTokens(dataset).classes == ("0", "9", "10")
    assert LabelledTokens(dataset, [str(n) for n in range(11)]).class_ids([0, 1, 2]).tolist() == [10, 9, 0]


def test_labelled_tokens__labels_that_are_missing_or_unknown(tmp_path: Path) -> None:
    with pytest.raises(QLIPError, match="holds no captions"):
        LabelledTokens(TokenDataset(made(tmp_path / "bare", captions=False).address))
    dataset = TokenDataset(made(tmp_path / "t").address)
    with pytest.raises(QLIPError, match=r"label 'dog' is none of the 2 classes \(did you mean 'dogs'\?\)"):
        LabelledTokens(dataset, ["cat", "dogs"]).class_ids([1])
