"""Training batches of conversations about images.

`ConversationData` says which conversations, and how they become ids; `open_feed` makes a feed of them, whose sample at
a position depends on the seed and the position alone. A conversation without a label, or with an image that cannot be
read, is skipped, and the batch says which and why. An image stands once in a row, however many turns speak of it.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlip.data.loader.batch import SkippedSample
from qlip.data.loader.feed import PositionFeed
from qlip.data.loader.sampler import Numbers
from qlip.errors import QLIPError, QLIPWarning
from qlip.lm.tokenizer import LLMTokenizer
from qlip.modeling.processor import Preprocessing
from qlip.vlm.batch import Row, VLMBatch, stack
from qlip.vlm.config import VLMConfig
from qlip.vlm.conversations import Conversation, ConversationFile
from qlip.vlm.images import pixels_of
from qlip.vlm.labels import Example, encode_conversation
from qlip.vlm.model import Eye, load_eye
from qlip.vlm.order import Grouped, Order, Shuffled
from qlip.vlm.templates import TEMPLATES, check_tokens

KEPT_FEATURES = 1 << 28
"""Bytes of features that a process keeps, so that an image which comes again is not encoded again."""


@dataclass(frozen=True)
class ConversationData:
    """Conversations, and how a model reads them; pickles into workers.

    Attributes:
        conversations: to train on; their images are paths relative to `folder`, or what
            :func:`qlip.modeling.images.load_image` takes.
        folder: of the images.
        name: for messages.
        config: of the model: template, image tokens, margins.
        tokenizer: of the text decoder.
        preprocessing: of the tower.
        max_length: greatest number of positions of a conversation, and of a packed row.
        features: dtype of the frozen tower whose features batches hold instead of pixels, computed where the batch is
            made; None for pixels.
    """

    conversations: Sequence[Conversation]
    folder: Path
    name: str
    config: VLMConfig
    tokenizer: LLMTokenizer
    preprocessing: Preprocessing
    max_length: int
    features: torch.dtype | None = None
    _kept: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def check(self) -> None:
        """Check that samples can have labels.

        Raises:
            QLIPError: a template with control tokens that the tokenizer lacks, no folder, or images of too many tokens.
        """
        check_tokens(TEMPLATES[self.config.template], self.tokenizer)
        if not self.folder.is_dir():
            raise QLIPError(f"{self.folder}: no such folder; give the folder that the paths of the images start from")
        if self.image_length >= self.max_length:
            raise QLIPError(
                f"max_length {self.max_length}: an image alone takes {self.image_length} tokens; raise it, or give the"
                " model pool 2"
            )

    @cached_property
    def image_length(self) -> int:
        """Tokens per image, N."""
        return self.config.num_image_tokens(self.preprocessing.size)

    @cached_property
    def eye(self) -> Eye:
        """The tower; loaded once per process."""
        return load_eye(self.config, self.name, self.features)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "eye"} | {"_kept": {}}

    def example(self, index: int) -> Example:
        """Ids and labels of conversation `index`. Raises QLIPError as :func:`encode_conversation` does."""
        return self.encode(self.conversations[index])

    def encode(self, conversation: Conversation) -> Example:
        """Ids and labels of a conversation. Raises QLIPError as :func:`encode_conversation` does."""
        template = TEMPLATES[self.config.template]
        return encode_conversation(conversation, template, self.tokenizer, self.image_length, self.max_length)

    def lengths(self, indices: Numbers) -> Numbers:
        """Number of positions of conversations, int64 (n,); 0 for those without a label."""
        found = np.zeros(len(indices), dtype=np.int64)
        for place, index in enumerate(indices.tolist()):
            try:
                found[place] = len(self.example(index).ids)
            except QLIPError:
                continue
        return found

    def see(self, image: Any) -> Tensor:
        """Prepare an image.

        Args:
            image: see `conversations`.

        Returns:
            (3, H, W) pixels or (N, C) features, float32.

        Raises:
            QLIPError: it cannot be read.
        """
        path = str(self.folder / image) if isinstance(image, str) else None
        if path is not None and (kept := self._kept.get(path)) is not None:
            return kept
        pixels = pixels_of(path or image, self.preprocessing, self.config.pad_images)
        if not self.features:
            return pixels
        with torch.no_grad():
            found = self.eye.features(pixels[None])[0].float()
        if path is not None and (len(self._kept) + 1) * found.nbytes <= KEPT_FEATURES:
            self._kept[path] = found
        return found

    def nothing(self) -> Tensor:
        """Images or features of a batch without any, (0, ...)."""
        if self.features:
            return torch.zeros(0, self.image_length, self.config.feature_size)
        return torch.zeros(0, 3, *self.preprocessing.size)


@dataclass(frozen=True)
class MakeBatch:
    """Makes the batch of the conversations at positions; pickles into workers.

    Attributes:
        data: conversations.
        order: of them.
        packing: several conversations stand in one row, as many as fit.
    """

    data: ConversationData
    order: Order
    packing: bool = False

    def __call__(self, positions: Numbers) -> VLMBatch:
        """Read and encode."""
        examples, seen, skipped = list[Example](), list[list[Tensor]](), list[SkippedSample]()
        for index in self.order(positions).tolist():
            conversation = self.data.conversations[index]
            try:
                example = self.data.encode(conversation)
                images = [self.data.see(image) for image in conversation.images[: example.num_images]]
            except QLIPError as error:
                skipped.append(SkippedSample(conversation.id, self.data.name, str(error)))
                continue
            examples.append(example)
            seen.append(images)
        lengths = [len(example.ids) for example in examples]
        places = pack(lengths, self.data.max_length) if self.packing else [[place] for place in range(len(examples))]
        rows = [row_of([examples[place] for place in row]) for row in places]
        batch = stack(rows)
        batch.skipped = skipped
        found = [one for row in places for place in row for one in seen[place]]
        shown = torch.stack(found) if found else self.data.nothing()
        if self.data.features:
            batch.features = shown
        else:
            batch.images = shown
        return batch


def row_of(examples: Sequence[Example]) -> Row:
    """Put examples one behind the other."""
    return Row(
        [one.ids for one in examples],
        [one.labels for one in examples],
        sum(one.num_images for one in examples),
        sum(one.cut > 0 for one in examples),
    )


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute samples over few rows, the longest first, each to the first row that has room.

    Args:
        lengths: of the samples, none above `capacity`.
        capacity: of a row.

    Returns:
        Places of the samples in `lengths`, for each row.
    """
    rows, room = list[list[int]](), list[int]()
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fit = next((number for number, free in enumerate(room) if free >= lengths[place]), None)
        if fit is None:
            rows.append([place])
            room.append(capacity - lengths[place])
        else:
            rows[fit].append(place)
            room[fit] -= lengths[place]
    return rows


def open_feed(
    data: ConversationData,
    batch_size: int,
    *,
    seed: int,
    packing: bool = False,
    group_by_length: bool = False,
    num_workers: int = 0,
) -> PositionFeed[VLMBatch]:
    """Open a feed of conversations: every one once per epoch.

    Args:
        data: conversations.
        batch_size: conversations per batch, of all ranks together.
        seed: of the order.
        packing: put several conversations into one row of at most ``data.max_length`` positions.
        group_by_length: batches of conversations of similar length, all with images or all without.
        num_workers: reading processes.

    Raises:
        QLIPError: see :meth:`ConversationData.check`.
    """
    data.check()
    conversations = data.conversations
    identity: dict[str, Any] = {"conversations": len(conversations), "seed": seed}
    if isinstance(conversations, ConversationFile):
        identity["conversations"] = conversations.fingerprint
        if (summary := conversations.summary()) is not None:
            warnings.warn(summary, QLIPWarning, stacklevel=2)
    order: Order = Shuffled(len(conversations), seed)
    if group_by_length:
        if isinstance(conversations, ConversationFile):
            has_images = conversations.has_images
        else:
            has_images = np.array([bool(one.images) for one in conversations])
        order = Grouped(has_images, data.lengths, batch_size, seed)
        how = [data.config.template, data.max_length, data.image_length, batch_size]
        identity["grouped"] = hashlib.sha256(str(how).encode()).hexdigest()[:16]
    return PositionFeed(MakeBatch(data, order, packing), identity, batch_size, num_workers, name=data.name)
