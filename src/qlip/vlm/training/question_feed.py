"""Feed of questions about made scenes, drawn while they are read: no question comes twice.

Sample n of the feed is a question of the split, or, for a share of the samples, a captioned scene that is to be
described. Where the tower is frozen and trains on a CPU, the workers compute its features too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from qlip.data.loader.feed import PositionFeed
from qlip.data.loader.sampler import Numbers
from qlip.data.public import scene_captions
from qlip.data.public.scene_questions import LENGTHS, Question, SceneQuestions, caption_question
from qlip.lm.tokenizer import LLMTokenizer
from qlip.modeling.processor import Preprocessing
from qlip.registry import unknown_name
from qlip.vlm.batch import VLMBatch, stack
from qlip.vlm.config import VLMConfig
from qlip.vlm.conversations import IMAGE, Conversation, Turn
from qlip.vlm.data import row_of
from qlip.vlm.images import pixels_of
from qlip.vlm.labels import encode_conversation
from qlip.vlm.model import Eye, load_eye
from qlip.vlm.templates import TEMPLATES
from qlip.vlm.training.recipe import VLMRecipe
from qlip.vlm.training.start import Start

DESCRIBED = "captioned"
"""Split of the captioned scenes."""
APART = 250_000
"""Samples between the first ones of two seeds."""
READ_FOR_VOCABULARY = 1000
"""Samples whose texts a vocabulary is trained on; they have all words."""


def question_at(split: str, captions: float, position: int) -> Question:
    """Return sample `position` of the feed.

    Args:
        split: of the questions.
        captions: share of the samples that are descriptions of captioned scenes.
        position: from 0; after the last question the first comes again.
    """
    before, after = math.floor(position * captions), math.floor((position + 1) * captions)
    if after > before:
        return caption_question(DESCRIBED, before % scene_captions.LENGTHS[DESCRIBED])
    return SceneQuestions(split)[(position - before) % LENGTHS[split]]


@dataclass(frozen=True)
class MakeBatch:
    """Makes batches of the questions at positions; pickles into workers.

    Attributes:
        first: sample at position 0.
        features: see `open_questions`.
    """

    first: int
    split: str
    captions: float
    config: VLMConfig
    tokenizer: LLMTokenizer
    preprocessing: Preprocessing
    max_length: int
    features: torch.dtype | None

    @cached_property
    def eye(self) -> Eye:
        """The tower; loaded once per process."""
        config = self.config
        return load_eye(config, "the recipe", self.features)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "eye"}

    def __call__(self, positions: Numbers) -> VLMBatch:
        """Draw the scenes, and encode the dialogues of one question each."""
        questions = [question_at(self.split, self.captions, self.first + position) for position in positions.tolist()]
        image_length = self.config.num_image_tokens(self.preprocessing.size)
        template = TEMPLATES[self.config.template]
        found = []
        for one in questions:
            conversation = Conversation(
                one.key, ("",), (Turn("user", f"{IMAGE}\n{one.text}"), Turn("assistant", one.answer))
            )
            example = encode_conversation(conversation, template, self.tokenizer, image_length, self.max_length)
            found.append(row_of([example]))
        batch = stack(found)
        if not questions:
            return batch
        pixels = torch.stack([pixels_of(one.image(), self.preprocessing) for one in questions])
        if self.features:
            with torch.no_grad():
                batch.features = self.eye.features(pixels).float()
        else:
            batch.images = pixels
        return batch


def open_questions(recipe: VLMRecipe, start: Start, features: torch.dtype | None) -> PositionFeed[VLMBatch]:
    """Open the feed of a recipe's questions.

    Args:
        recipe: with ``data.questions``.
        start: model, tokenizer and preprocessing.
        features: dtype of a frozen tower whose features batches hold instead of pixels; None for pixels.

    Raises:
        QLIPError: no such split.
    """
    data, config = recipe.data, start.model.config
    assert data.questions is not None
    if data.questions not in LENGTHS:
        raise unknown_name(data.questions, "split of questions about made scenes", LENGTHS)
    make = MakeBatch(
        recipe.seed * APART,
        data.questions,
        data.captions,
        config,
        start.tokenizer,
        start.preprocessing,
        data.max_length,
        features,
    )
    identity = {"questions": data.questions, "captions": data.captions, "seed": recipe.seed}
    name = f"questions about made scenes ({data.questions})"
    return PositionFeed(make, identity, recipe.batch_size, data.num_workers, name=name)


def first_texts(recipe: VLMRecipe) -> Iterator[str]:
    """Yield texts of the first samples of a recipe's questions, to train a vocabulary on."""
    assert recipe.data.questions is not None
    for position in range(READ_FOR_VOCABULARY):
        question = question_at(recipe.data.questions, recipe.data.captions, position)
        yield question.text
        yield question.answer
