"""The record of the captions that a run trains with, see `qlip.data.sources.training_text`.

A run makes it once, before its first step, and exports it beside the weights. For a checkpoint without one::

    python -m qlip.training.tasks.training_text RECIPE CHECKPOINT
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from qlip.data.image_feed import readable
from qlip.data.loader.stream import ImageFeed, Source
from qlip.data.shards.streaming import StreamedFeed
from qlip.data.sources.training_text import RECORD, TrainingText
from qlip.errors import QLIPError
from qlip.modeling import QLIPProcessor
from qlip.modeling.checkpoint import resolve
from qlip.runtime.progress import progress
from qlip.training.recipe import load_recipe
from qlip.training.tasks.build import open_training_feed
from qlip.training.tasks.recipe import Stage1Recipe

MAX_IMAGES = 200_000
"""A source of more images, or one that is streamed, is not read: the record is then not complete."""


def record_training_text(recipe: Stage1Recipe, open_feed: Callable[[], ImageFeed | StreamedFeed], folder: Path) -> None:
    """Write the record of a run into a folder, unless there is one; one rank calls it.

    It covers the text of the checkpoint that the run starts from and, if the run aligns images with text, its own,
    for which the data are opened.

    Raises:
        QLIPError: the folder cannot be written.
    """
    if (folder / RECORD).exists():
        return
    text = TrainingText.of([]) if recipe.model.init is None else TrainingText.read(recipe.model.init)
    if recipe.aligned:
        text = text.merged(text_of(open_feed()))
    text.save(folder)


def text_of(feed: ImageFeed | StreamedFeed) -> TrainingText:
    """Make the record of all captions and labels that a feed's samples may show."""
    captioned = [source for source in feed.sources if source.captions]
    read = [one for one in captioned if isinstance(one, Source) and len(one.images) <= MAX_IMAGES]
    names = [source.images.name for source in read]
    return TrainingText.of(_texts(read), names, complete=len(read) == len(captioned))


def _texts(sources: list[Source]) -> Iterator[str]:
    """Yield each caption and label; a template's own words are no subject of an image and do not count."""
    with progress("recording captions", sum(len(source.images) for source in sources)) as bar:
        for source in sources:
            for raw in readable(source, MAX_IMAGES):
                yield from raw.captions
                if raw.label is not None:
                    yield raw.label
                bar.advance()


def main(recipe_name: str, checkpoint: str) -> None:
    """Write the record of a finished run of stage 1, by its recipe, into a checkpoint's folder."""
    recipe = load_recipe(recipe_name)
    if not isinstance(recipe, Stage1Recipe):
        raise QLIPError(f"{recipe_name}: only stage 1 reads captions; give its recipe")
    preprocessing = QLIPProcessor.from_pretrained(checkpoint).preprocessing
    record_training_text(recipe, partial(open_training_feed, recipe, preprocessing, None), resolve(checkpoint))


if __name__ == "__main__":
    main(*sys.argv[1:])
