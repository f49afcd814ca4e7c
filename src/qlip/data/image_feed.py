"""Image feeds of a recipe: `open_feed` opens its sources; the other functions read or describe what a feed holds."""

from __future__ import annotations

from collections.abc import Iterator

from qlip.data.config import DataConfig, SourceConfig
from qlip.data.loader.batch import Tokenize, read_or_skip
from qlip.data.loader.feed import share_of
from qlip.data.loader.stream import ImageFeed, Source, TrainingStream
from qlip.data.shards.streaming import MixedStream, StreamedFeed, StreamedSource
from qlip.data.sources.base import RawSample
from qlip.modeling.processor import Preprocessing


def open_feed(
    config: DataConfig,
    seed: int,
    preprocessing: Preprocessing,
    tokenize: Tokenize,
    batch_size: int,
) -> ImageFeed | StreamedFeed:
    """Open the feed that a recipe describes.

    Args:
        config: the recipe's data section.
        seed: of order, augmentation and captions.
        preprocessing: of the model's processor; size and normalisation are taken, the rest is the recipe's.
        tokenize: see `qlip.data.loader.batch.Tokenize`.
        batch_size: positions per batch, of all ranks together.

    Raises:
        QLIPError: a source that cannot be opened, or cursors that do not fit the batch or the shards.
    """
    if not any(source.streaming for source in config.sources):
        stream = open_stream(config, seed, preprocessing, tokenize)
        return ImageFeed(stream, batch_size, config.num_workers, config.prefetch)
    sources = [open_source(config, one, seed, preprocessing, batch_size) for one in config.sources]
    return StreamedFeed(MixedStream(sources, seed, tokenize, batch_size), config.num_workers, config.prefetch)


def open_stream(
    config: DataConfig,
    seed: int,
    preprocessing: Preprocessing,
    tokenize: Tokenize,
) -> TrainingStream:
    """Open the training stream that a recipe describes.

    Args:
        config: the recipe's data section.
        seed: of order, augmentation and captions.
        preprocessing: of the model's processor; size and normalisation are taken, the rest is the recipe's.
        tokenize: see `qlip.data.loader.batch.Tokenize`.
    """
    sources = [_open_indexed(config, one, preprocessing) for one in config.sources]
    return TrainingStream(sources, seed, tokenize)


def open_source(
    config: DataConfig,
    one: SourceConfig,
    seed: int,
    preprocessing: Preprocessing,
    batch_size: int,
) -> Source | StreamedSource:
    """Open one source of a recipe, streamed or not; see `open_stream` for the arguments."""
    if not one.streaming:
        return _open_indexed(config, one, preprocessing)
    shards = one.open_streamed(seed, batch_size, config.store)
    return StreamedSource(shards, one.transform(preprocessing), one.weight, one.all_templates, one.captions)


def _open_indexed(config: DataConfig, one: SourceConfig, preprocessing: Preprocessing) -> Source:
    transform = one.transform(preprocessing)
    return Source(one.open(config.store), transform, one.weight, one.all_templates, one.captions, one.blocks)


def readable(source: Source | StreamedSource, limit: int) -> Iterator[RawSample]:
    """Iterate over the readable samples among the first `limit` of a source, in its own order."""
    if isinstance(source, StreamedSource):
        yield from source.images.first(limit)
        return
    for index in range(min(limit, len(source.images))):
        raw = read_or_skip(source.images, index)
        if isinstance(raw, RawSample):
            yield raw


def captions_of(feed: ImageFeed | StreamedFeed, limit: int) -> Iterator[str]:
    """Iterate over captions that training may draw, of up to `limit` samples per source, to make a vocabulary.

    A sample without captions but with a label gives it in one template.
    """
    for source in feed.sources:
        if not source.captions:
            continue
        for number, raw in enumerate(readable(source, limit)):
            if raw.captions:
                yield from raw.captions
            elif raw.label is not None and source.templates:
                yield source.templates[number % len(source.templates)].replace("{}", raw.label)


def describe_feed(feed: ImageFeed | StreamedFeed, world: int = 1) -> list[str]:
    """Describe a feed's sources and the share of every rank, one line for each."""
    scale = sum(source.weight for source in feed.sources)
    lines = []
    for source in feed.sources:
        share = f"{source.images.name}: {source.weight / scale:.1%} of the stream"
        if isinstance(source, StreamedSource):
            streamed = source.images
            lines.append(
                f"{share}, {len(streamed.shards):,} streamed shards, {streamed.num_cursors} cursors x"
                f" {streamed.cursor_sets} sets" + (", drawn with replacement" if streamed.replacement else "")
            )
        else:
            order = "in blocks" if source.blocks else "shuffled"
            lines.append(f"{share}, {len(source.images):,} samples {order}")
    for rank in range(world):
        low, high = share_of(feed.batch_size, rank, world)
        lines.append(f"rank {rank}: places {low} to {high - 1} of every batch of {feed.batch_size}")
    return lines
