"""Ids of documents: texts, and images with their texts.

    text            text <eos>
    image-to-text   <boi> image <eoi> text <eos>
    text-to-image   text <boi> image <eoi> <eos>
                    <boi> image <eoi>, without its text and so without an end: behind an image alone comes a text

The tokenizer's BOS comes first where it has one. Shapes: N tokens of K groups per image, S ids per document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlip.lm.tokenizer import LLMTokenizer
from qlip.um3.batch import DocumentKind
from qlip.um3.config import UM3Config
from qlip.um3.sequence import whole_image


@dataclass(frozen=True)
class DocumentBuilder:
    """Makes documents of texts and of an image's indices; pickles into workers.

    Attributes:
        config: of the model.
        tokenizer: of the model.
    """

    config: UM3Config
    tokenizer: LLMTokenizer

    @property
    def first(self) -> list[int]:
        """Ids that every document begins with: BOS, or none."""
        return [] if self.tokenizer.bos is None else [self.tokenizer.bos]

    @property
    def image_cost(self) -> int:
        """Ids of an image with its begin and end."""
        return self.config.image_length + 2

    @property
    def cost(self) -> int:
        """Ids of a document of an image beside those of its text."""
        return len(self.first) + self.image_cost + 1

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of documents of text, made on all cores."""
        first, eos = self.first, self.tokenizer.eos
        return [[*first, *ids, eos] for ids in self.tokenizer.encode_all(texts, first=True)]

    def text_ids(self, kind: DocumentKind, text: str) -> list[int]:
        """Ids of the text of a document of an image."""
        behind = kind == "image-to-text"
        return self.tokenizer.encode(text, first=not behind, after_token=behind)

    def pair(self, kind: DocumentKind, text: Sequence[int], indices: Tensor) -> Tensor:
        """Ids of a document of an image, int64 (S,).

        Args:
            kind: order of text and image.
            text: ids of the text; none leaves it out, and the end of a text-to-image document with it.
            indices: int64 (N, K) of the image.
        """
        image, behind = whole_image(self.config, indices), kind == "image-to-text"
        before = [*self.first, *([] if behind else text)]
        after = [*text, self.tokenizer.eos] if behind else [self.tokenizer.eos] if len(text) else []
        return torch.cat([torch.tensor(before, dtype=torch.int64), image, torch.tensor(after, dtype=torch.int64)])


def fit(lengths: Sequence[int], room: int) -> list[int]:
    """Shorten the longest texts, to one length, so that all fit.

    Args:
        lengths: of the texts, in ids.
        room: for all of them together.

    Returns:
        New lengths, whose sum is at most `room`, and equal to it if any is shortened.
    """
    left, found = room, list(lengths)
    for done, place in enumerate(sorted(range(len(lengths)), key=lambda one: lengths[one])):
        found[place] = min(lengths[place], left // (len(lengths) - done))
        left -= found[place]
    return found
