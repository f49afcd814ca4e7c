"""Batches of a vision-language model: rows of ids with labels, and the images that stand in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from qlip.data.loader.batch import PerSample, SampleBatch, Shared
from qlip.vlm.config import IGNORED
from qlip.vlm.model import trained_labels


@dataclass
class VLMBatch(SampleBatch):
    """B rows of T positions with the M images in them.

    Attributes:
        ids: int64 (B, T), `IMAGE_ID` at image tokens.
        labels: int64 (B, T), not shifted; `IGNORED` where there is no loss.
        positions: int64 (B, T), from 0 in every document.
        documents: int64 (B, T), number of the document in its row; -1 at padding.
        images_per_row: int64 (B,).
        images: float32 (M, 3, H, W) pixels, in order of occurrence.
        features: float32 (M, N, C), the tower's features instead of `images`; None reads `images`.
        cut_per_row: int64 (B,), documents that lost labels because they are too long.
    """

    ids: PerSample[Tensor]
    labels: PerSample[Tensor]
    positions: PerSample[Tensor]
    documents: PerSample[Tensor]
    images_per_row: PerSample[Tensor]
    images: Shared[Tensor]
    features: Shared[Tensor | None] = None
    cut_per_row: PerSample[Tensor | None] = None

    @property
    def num_labels(self) -> int:
        """Number of labels with a loss."""
        return int(trained_labels(self.labels, self.documents).sum())

    def split(self, number: int) -> list[Self]:
        """Cut into micro-batches of rows, each with its own images; the first has the skipped samples."""
        if number == 1:
            return [self]
        found, begin = [], 0
        for place, piece in enumerate(super().split(number)):
            end = begin + int(piece.images_per_row.sum())
            features = None if self.features is None else self.features[begin:end]
            skipped = [] if place else self.skipped
            found.append(replace(piece, images=self.images[begin:end], features=features, skipped=skipped))
            begin = end
        return found


@dataclass(frozen=True)
class Row:
    """Documents that stand one behind the other in a row of a batch.

    Attributes:
        ids, labels: int64 (T,) of each document.
        num_images: in all of them.
        num_cut: documents that lost labels because they are too long.
    """

    ids: Sequence[Tensor]
    labels: Sequence[Tensor]
    num_images: int
    num_cut: int = 0


def stack(rows: Sequence[Row]) -> VLMBatch:
    """Make a batch of rows, padded at the right to the longest; without images, which the caller sets.

    Args:
        rows: B rows; B may be 0.
    """
    length = max((sum(len(one) for one in row.ids) for row in rows), default=1)
    shape = (len(rows), length)
    ids, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels, documents = torch.full(shape, IGNORED), torch.full(shape, -1)
    for number, row in enumerate(rows):
        begin = 0
        for document, (own, wanted) in enumerate(zip(row.ids, row.labels, strict=True)):
            place = slice(begin, begin + len(own))
            ids[number, place], labels[number, place] = own, wanted
            positions[number, place] = torch.arange(len(own))
            documents[number, place] = document
            begin += len(own)
    counts = torch.tensor([row.num_images for row in rows], dtype=torch.int64)
    cut = torch.tensor([row.num_cut for row in rows], dtype=torch.int64)
    return VLMBatch(ids, labels, positions, documents, counts, torch.zeros(0, 3, 0, 0), cut_per_row=cut)
