"""A vocabulary of the run's own, trained on all captions of its sources."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.progress import track

from qlip.data.stream import Source, TrainingStream
from qlip.errors import QLIPError
from qlip.modeling import CLIPTokenizer


def train_vocabulary(stream: TrainingStream, size: int, length: int, console: Console) -> CLIPTokenizer:
    """Byte-level BPE over every caption that training may draw.

    Args:
        stream: of the run; its tokenizer is not used.
        size: of the vocabulary.
        length: positions of the text tower.
        console: for progress.

    Raises:
        QLIPError: no source has words.
    """
    captions = [caption for source in stream.sources if source.captions for caption in _captions(source, console)]
    if not captions:
        raise QLIPError("data: no source has captions or labels with templates; the text tower has nothing to learn")
    return CLIPTokenizer.train(captions, size, length)


def _captions(source: Source, console: Console) -> Iterator[str]:
    for index in track(range(len(source.images)), f"captions of {source.images.name}", console=console, transient=True):
        try:
            raw = source.images.read(index)
        except QLIPError:
            continue  # training itself will count and name it
        if raw.captions:
            yield from raw.captions
        elif raw.label is not None:
            # one template a picture: all of them for each would count a label's words many times over
            yield from (
                [source.templates[index % len(source.templates)].replace("{}", raw.label)] if source.templates else []
            )
