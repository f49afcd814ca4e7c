"""Batches of packed documents of text and image tokens.

A row of T positions holds documents of one kind, one behind the other, padded at the right.
`stack` makes a batch of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from qlip.data.loader.batch import PerSample, SampleBatch
from qlip.lm.causal import positions_within

DocumentKind = Literal["text", "image-to-text", "text-to-image", "interleaved"]
KINDS: tuple[DocumentKind, ...] = get_args(DocumentKind)
"""Kinds of documents; `UM3Batch.kinds` holds places in this tuple."""
PADDING = -1
"""Document number of padding."""


@dataclass
class UM3Batch(SampleBatch):
    """B rows of T positions.

    Attributes:
        ids: int64 (B, T), 0 at padding.
        documents: int64 (B, T), number of the document in its row from 0 on; `PADDING` at padding. Positions attend
            only to earlier ones of their document.
        positions: int64 (B, T), from 0 in every document; 0 at padding.
        kinds: int8 (B, T), place in `KINDS` of the document's kind; 0 at padding.
        dropped: int64 (B,), tokens of the row's documents that are not in the row, since they do not fit.
    """

    ids: PerSample[Tensor]
    documents: PerSample[Tensor]
    positions: PerSample[Tensor]
    kinds: PerSample[Tensor]
    dropped: PerSample[Tensor]


@dataclass
class Row:
    """Documents that stand one behind the other in a row.

    Attributes:
        kind: of the documents.
        documents: int64 (S,) ids of each, together at most T.
        dropped: tokens of the documents that are left out.
    """

    kind: DocumentKind
    documents: list[Tensor] = field(default_factory=list)
    dropped: int = 0


def stack(rows: Sequence[Row], length: int, document_masks: bool = True) -> UM3Batch:
    """Make a batch of rows.

    Args:
        rows: B rows; B may be 0.
        length: T.
        document_masks: number the documents of a row; otherwise all of a row are one document, so that positions
            attend to earlier documents too and are counted from the row's begin, as lingua does.
    """
    shape = (len(rows), length)
    ids, documents = torch.zeros(shape, dtype=torch.int64), torch.full(shape, PADDING)
    kinds = torch.zeros(shape, dtype=torch.int8)
    for number, row in enumerate(rows):
        lengths = torch.tensor([len(one) for one in row.documents], dtype=torch.int64)
        filled = int(lengths.sum())
        assert filled <= length, f"{filled} tokens in a row of {length}"
        if not filled:
            continue
        ids[number, :filled] = torch.cat(row.documents)
        kinds[number, :filled] = KINDS.index(row.kind)
        documents[number, :filled] = torch.arange(len(lengths)).repeat_interleave(lengths) if document_masks else 0
    positions = positions_within(documents).masked_fill_(documents == PADDING, 0)
    dropped = torch.tensor([row.dropped for row in rows], dtype=torch.int64)
    return UM3Batch(ids, documents, positions, kinds, dropped)
