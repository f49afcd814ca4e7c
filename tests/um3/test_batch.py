"""Batches of packed documents: ids, document numbers, positions and kinds of each row."""

from __future__ import annotations

import torch

from qlip.um3.batch import KINDS, Row, stack


def rows() -> list[Row]:
    documents = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
    return [Row("image-to-text", documents, dropped=4), Row("text", [torch.tensor([1, 2])]), Row("text")]


def test_batch__documents_are_numbered_and_positions_restart() -> None:
    batch = stack(rows(), 6)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9, 0], [1, 2, 0, 0, 0, 0], [0] * 6]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, -1], [0, 0, -1, -1, -1, -1], [-1] * 6]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0] * 6]
    assert batch.kinds.tolist() == [[KINDS.index("image-to-text")] * 5 + [0], [0] * 6, [0] * 6]
    assert batch.kinds.dtype == torch.int8
    assert batch.dropped.tolist() == [4, 0, 0]


def test_batch__without_document_masks_a_row_is_one_document() -> None:
    batch = stack(rows(), 6, document_masks=False)
    assert batch.documents.tolist()[0] == [0, 0, 0, 0, 0, -1]
    assert batch.positions.tolist()[0] == [0, 1, 2, 3, 4, 0]
    assert batch.ids.equal(stack(rows(), 6).ids)


def test_batch__split_cuts_rows() -> None:
    first, second = stack(rows(), 6).split(2)
    assert (len(first), len(second)) == (1, 2)
    assert first.dropped.tolist() == [4]
    assert len(stack([], 6)) == 0
