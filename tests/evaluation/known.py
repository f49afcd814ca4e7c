"""Rows of the tests' own making, and subjects whose vectors are known."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qlip.evaluation.evaluators.base import Chunk, Rows
from qlip.evaluation.models.base import EvalModel
from qlip.modeling import Preprocessing
from qlip.modeling.model import unit


def rows_of(
    columns: Mapping[str, Tensor],
    labels: Sequence[str | None] | None = None,
    captions: Sequence[tuple[str, ...]] | None = None,
    chunk: int = 7,
) -> Rows:
    """Columns as stored in chunks of some size."""
    count = len(next(iter(columns.values())))
    labels = [None] * count if labels is None else list(labels)
    captions = [()] * count if captions is None else list(captions)
    keys = [f"{number:03d}" for number in range(count)]
    chunks = [
        Chunk(
            start,
            {name: column[start : start + chunk] for name, column in columns.items()},
            keys[start : start + chunk],
            list(labels[start : start + chunk]),
            list(captions[start : start + chunk]),
            [],
            "",
        )
        for start in range(0, count, chunk)
    ]
    return Rows(lambda: iter(chunks))


class Known(EvalModel):
    """Reads texts to vectors that depend on the text alone, and counts them."""

    def __init__(self, dimensions: int = 8, fingerprint: str = "0" * 64) -> None:
        self.name, self.capabilities = "known", frozenset({"encode_image", "encode_text"})
        self.preprocessing, self.device = Preprocessing((8, 8), 8), torch.device("cpu")
        self.fingerprint, self.dimensions, self.texts_read = fingerprint, dimensions, 0

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Noise seeded by the text."""
        self.texts_read += len(texts)
        return unit(torch.stack([self.vector(text) for text in texts]))

    def vector(self, text: str) -> Tensor:
        """(E,) of a text, not of unit length."""
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        return torch.randn(self.dimensions, generator=torch.Generator().manual_seed(seed))
