"""A vocabulary of the run's own, trained on the captions of its sources."""

from __future__ import annotations

from rich.console import Console

from qlip.data.image_feed import captions_of
from qlip.data.loader.stream import ImageFeed
from qlip.data.shards.streaming import StreamedFeed
from qlip.errors import QLIPError
from qlip.modeling import CLIPTokenizer
from qlip.runtime.progress import progress

SAMPLES = 1_000_000
"""Captions per source at most, the first ones: more do not improve a vocabulary."""


def train_vocabulary(
    feed: ImageFeed | StreamedFeed, size: int, length: int, console: Console, needed: bool = True
) -> CLIPTokenizer:
    """Byte-level BPE over the captions that training may draw.

    Args:
        feed: of the run; its tokenizer is not used.
        size: of the vocabulary.
        length: positions of the text tower.
        console: for progress.
        needed: refuse sources without captions; otherwise they give the vocabulary of single bytes.

    Raises:
        QLIPError: no source has words.
    """
    captions = []
    with progress("reading captions", None, console=console) as bar:
        for caption in captions_of(feed, SAMPLES):
            captions.append(caption)
            bar.advance()
    if not captions and needed:
        raise QLIPError("data: no source has captions or labels with templates; the text tower has nothing to learn")
    return CLIPTokenizer.train(captions, size, length)
