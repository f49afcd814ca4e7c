"""Captioned sequences of a token dataset."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlip import QLIPError
from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.stream import TokenStream
from qlip.lm import SequenceLayout
from qlip.t2i.sequences import text_to_image
from tests.archive.made import made


def test_text_to_image__one_caption_per_image(tmp_path: Path) -> None:
    dataset = TokenDataset(made(tmp_path / "t", rows=6, parts=1).address, group_size=7)
    layout = SequenceLayout.for_bits(28, 7, begin=True)
    batch = next(iter(TokenStream(dataset, 6, captions=True)))
    pairs = list(text_to_image(batch, layout))
    assert [pair.key for pair in pairs] == batch.keys
    for pair, words, indices in zip(pairs, batch.captions or [], batch.indices, strict=True):
        assert pair.caption in words and torch.equal(layout.to_indices(pair.ids), indices)
    again = next(iter(TokenStream(dataset, 6, captions=True)))
    assert [pair.caption for pair in text_to_image(again, layout)] == [pair.caption for pair in pairs]
    batch.captions = [()] * 6
    named = {pair.key: pair.caption for pair in text_to_image(batch, layout, templates=["a photo of a {}"])}
    labels = {key: label for key, label in zip(batch.keys, batch.labels or [], strict=True) if label}
    assert named == {key: f"a photo of a {label}" for key, label in labels.items()} and len(named) == 4
    with pytest.raises(QLIPError, match="captions=True"):
        list(text_to_image(next(iter(TokenStream(dataset, 2))), layout))
