"""From a recipe to what trains: vocabulary and preprocessing, the model, the task."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from rich.console import Console

from qlip.data.image_feed import open_feed, readable
from qlip.data.loader.batch import BatchBuilder, Sample, no_text
from qlip.data.loader.feed import share_of
from qlip.data.loader.stream import ImageFeed
from qlip.data.shards.streaming import StreamedFeed
from qlip.errors import QLIPError
from qlip.modeling import CLIPTokenizer, Preprocessing, QLIPConfig, QLIPModel, QLIPProcessor
from qlip.modeling.parts import part_of, renew
from qlip.runtime.rng import generator
from qlip.training.task import Wrap
from qlip.training.tasks.recipe import AnyRecipe, Stage1Recipe, Stage2Recipe, TokenizerRecipe
from qlip.training.tasks.recipe_schema import VocabularySection
from qlip.training.tasks.stage1 import Stage1
from qlip.training.tasks.stage2 import Stage2
from qlip.training.tasks.stage2_checkpoint import load_without_text
from qlip.training.tasks.vocabulary import train_vocabulary

MAX_TRIES = 4
"""Samples read at most for each image wanted."""
ImageFeeds = ImageFeed | StreamedFeed
VOCABULARY = "vocabulary"
"""Folder of a run's own vocabulary, and of the record of its captions."""


def make_vocabulary(recipe: AnyRecipe, folder: Path, console: Console) -> None:
    """Train a fresh model's vocabulary on the recipe's captions, unless the run's folder has it; one rank calls it.

    Raises:
        QLIPError: the data hold no words.
    """
    vocabulary = folder / VOCABULARY
    if recipe.model.config is None or (vocabulary / "tokenizer_config.json").exists():
        return
    preprocessing, length = _preprocessing(recipe.model.config)
    size = (recipe.vocabulary or VocabularySection()).size
    feed = open_training_feed(recipe, preprocessing, None)
    train_vocabulary(feed, size, length, console, needed=recipe.aligned).save(vocabulary)


def build_processor(recipe: TokenizerRecipe, folder: Path) -> QLIPProcessor:
    """Preprocessing and vocabulary: the checkpoint's that the run starts from, or a fresh model's.

    Args:
        recipe: checked.
        folder: of the run, where :func:`make_vocabulary` has put a fresh model's vocabulary.

    Raises:
        QLIPError: the checkpoint has no vocabulary.
    """
    if recipe.model.init is not None:
        processor = QLIPProcessor.from_pretrained(recipe.model.init)
        if processor.tokenizer is None and isinstance(recipe, Stage1Recipe):
            raise QLIPError(f"{recipe.model.init}: has no vocabulary, so its text tower cannot be trained")
        return processor
    assert recipe.model.config is not None
    preprocessing, length = _preprocessing(recipe.model.config)
    return QLIPProcessor(preprocessing, CLIPTokenizer.from_folder(folder / VOCABULARY, length))


def _preprocessing(name: str) -> tuple[Preprocessing, int]:
    """Preprocessing of a packaged configuration, and the length of its text tower."""
    config = QLIPConfig.named(name)
    side = config.vision_config.image_size
    preprocessing = Preprocessing((side, side), side, patch_size=config.vision_config.patch_size)
    return preprocessing, config.text_config.max_position_embeddings


def open_training_feed(
    recipe: TokenizerRecipe, preprocessing: Preprocessing, tokenizer: CLIPTokenizer | None
) -> ImageFeeds:
    """The recipe's images and words; without a tokenizer words become a single 0."""
    tokenize = no_text if tokenizer is None else tokenizer
    return open_feed(recipe.data, recipe.seed, preprocessing, tokenize, recipe.batch_size)


def first_images(feed: ImageFeeds, count: int) -> torch.Tensor:
    """The feed's first images, or, where some are read from front to back, each source's first ones in turn.

    Broken ones are passed over, and the next ones come in their place.

    Returns:
        (B, 3, H, W) float32, normalised; B is ``count``, or less where not as many can be read.
    """
    if isinstance(feed, ImageFeed):
        tried = map(feed.stream.__getitem__, range(MAX_TRIES * count))
        found = itertools.islice((sample for sample in tried if isinstance(sample, Sample)), count)
        return feed.stream.collate(list(found)).pixel_values
    sources = feed.sources
    builder = BatchBuilder(count, sources[0].transform.size, no_text)
    for place, source in enumerate(sources):
        first, end = share_of(count, place, len(sources))
        name = source.images.name
        for number, raw in enumerate(readable(source, MAX_TRIES * (end - first))):
            builder.add(raw, name, source.sample_transform, generator(0, "pictures", name, number))
            if len(builder) == end:
                break
    return builder.finish().pixel_values


def build_model(recipe: TokenizerRecipe, processor: QLIPProcessor) -> QLIPModel:
    """The model in training mode, on the CPU, in float32: random where the recipe says so; stage 2's has no text side.

    Raises:
        QLIPError: no such configuration or checkpoint.
    """
    if recipe.model.init is not None and isinstance(recipe, Stage2Recipe):
        model = load_without_text(recipe.model.init, recipe.model.fresh)
    elif recipe.model.init is not None:
        model = QLIPModel.from_pretrained(recipe.model.init)
        if fresh := recipe.model.fresh:
            renew(model, QLIPModel(model.config), lambda name: part_of(name) in fresh)
    else:
        assert recipe.model.config is not None and processor.tokenizer is not None
        model = QLIPModel(with_vocabulary(QLIPConfig.named(recipe.model.config), processor.tokenizer))
    return model.train()


def with_vocabulary(config: QLIPConfig, tokenizer: CLIPTokenizer) -> QLIPConfig:
    """A configuration whose text tower reads a tokenizer's ids."""
    values = config.to_json_dict()
    values["text_config"] |= {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
    }
    return QLIPConfig.from_dict(values)


def build_task(recipe: AnyRecipe, model: QLIPModel, processor: QLIPProcessor, wrap: Wrap) -> Stage1 | Stage2:
    """The task of the recipe's stage.

    Raises:
        QLIPError: nothing is left to train, or stage 2's LPIPS weights are not in the cache.
    """
    if isinstance(recipe, Stage1Recipe):
        return Stage1(model, processor, recipe, wrap)
    return Stage2(model, processor, recipe, wrap)
