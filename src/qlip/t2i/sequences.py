"""Captioned sequences: what a text-to-image model trains on, from the batches of a token dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from qlip.archive.dataset.stream import TokenBatch
from qlip.data.sources.base import RawSample
from qlip.data.sources.captions import draw_caption
from qlip.errors import QLIPError
from qlip.lm.sequences import SequenceLayout
from qlip.runtime.rng import generator


@dataclass(frozen=True)
class CaptionedSequence:
    """Training sample of a text-to-image model: a caption and the ids of its image, int64 (S,)."""

    caption: str
    ids: Tensor
    key: str


def text_to_image(
    batch: TokenBatch, layout: SequenceLayout, seed: int = 0, templates: Sequence[str] = ()
) -> Iterator[CaptionedSequence]:
    """Iterate over the batch's images that have a caption or label, with one caption each.

    Of several captions one is drawn, by seed, epoch and row, so that a resumed run draws the same. Without captions a
    label is put into one of the templates (each with one ``{}``).

    Raises:
        QLIPError: the batch was read without captions.
    """
    if batch.captions is None or batch.labels is None:
        raise QLIPError("text to image needs captions; open the stream with captions=True")
    for ids, captions, label, key, epoch, row in zip(
        (layout.to_sequence(indices) for indices in batch.indices),
        batch.captions,
        batch.labels,
        batch.keys,
        batch.epochs.tolist(),
        batch.rows.tolist(),
        strict=True,
    ):
        sample = RawSample(b"", captions, label, key)
        caption = draw_caption(sample, tuple(templates), generator(seed, "caption", epoch, row))
        if caption is not None:
            yield CaptionedSequence(caption, ids, key)
