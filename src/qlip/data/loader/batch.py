"""From images with words to the batch that a step trains on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from qlip.data.loader.transforms import TrainTransform
from qlip.data.sources.base import CaptionedImages, RawSample
from qlip.data.sources.captions import draw_caption, match_id
from qlip.data.storage.storage import RETRIES, StorageError
from qlip.errors import QLIPError
from qlip.modeling.images import load_image

Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]
"""Texts to (input_ids, attention_mask), int64 (B, T), T the same always; it pickles, to run in workers."""


def no_text(texts: list[str]) -> tuple[Tensor, Tensor]:
    """A `Tokenize` for where no words are wanted: a single 0 for each, (B, 1)."""
    empty = torch.zeros(len(texts), 1, dtype=torch.int64)
    return empty, empty


@dataclass(frozen=True)
class Treatment:
    """What a stream makes of a source's samples."""

    transform: TrainTransform
    templates: tuple[str, ...] = ()
    captions: bool = True  # False: its words are ignored, its images train reconstruction alone

    def words(self, raw: RawSample, rng: np.random.Generator) -> tuple[str | None, int]:
        """The caption drawn for a sample, and its match id."""
        caption = draw_caption(raw, self.templates, rng) if self.captions else None
        return caption, match_id(raw.label, caption)


@dataclass(frozen=True)
class BrokenSample:
    """A sample that could not be read or decoded, and why, in one line."""

    key: str
    source: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """One augmented image, float32 (3, H, W), and the caption drawn for it."""

    pixels: Tensor
    caption: str | None
    match_id: int
    key: str


@dataclass
class Batch:
    """B samples that could be read, of the batch's positions; `broken` has the others.

    Attributes:
        pixel_values: float32 (B, 3, H, W), normalised.
        input_ids: int64 (B, T); the tokens of "" where there is no caption.
        has_caption: bool (B,).
        match_ids: int64 (B,): equal where two captioned images mean the same, 0 without caption.
        keys: "source/key" of each sample.
        captions: the text that `input_ids` encode, or None.
        broken: samples left out.
        retries: requests to a store that were made again for it.
    """

    pixel_values: Tensor
    input_ids: Tensor
    has_caption: Tensor
    match_ids: Tensor
    keys: list[str]
    captions: list[str | None]
    broken: list[BrokenSample] = field(default_factory=list)
    retries: int = 0

    def __len__(self) -> int:
        return len(self.keys)


class BatchBuilder:
    """A batch under construction: pixels are written to their place at once.

    Args:
        capacity: samples at most.
        size: height and width.
        tokenize: see `Tokenize`.
    """

    def __init__(self, capacity: int, size: tuple[int, int], tokenize: Tokenize) -> None:
        self._buffer = _buffer(capacity, size)
        self._pixels = self._buffer.numpy()
        self._tokenize = tokenize
        self._captions: list[str | None] = []
        self._match_ids: list[int] = []
        self._keys: list[str] = []
        self._broken: list[BrokenSample] = []

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, raw: RawSample, source: str, how: Treatment, rng: np.random.Generator) -> None:
        """Decode, augment and word one sample; a broken image goes to the broken ones."""
        try:
            how.transform.into(load_image(raw.image), rng, self._pixels[len(self._keys)])
        except QLIPError as error:
            self.drop(BrokenSample(raw.key, source, str(error)))
            return
        caption, match = how.words(raw, rng)
        self._captions.append(caption)
        self._match_ids.append(match)
        self._keys.append(f"{source}/{raw.key}")

    def drop(self, sample: BrokenSample) -> None:
        """Count one that could not be read."""
        self._broken.append(sample)

    def finish(self) -> Batch:
        """The batch; B may be 0."""
        count, captions = len(self._keys), self._captions
        input_ids, _ = self._tokenize([caption or "" for caption in captions] or [""])
        return Batch(
            pixel_values=self._buffer[:count],
            input_ids=input_ids[:count],
            has_caption=torch.tensor([caption is not None for caption in captions], dtype=torch.bool),
            match_ids=torch.tensor(self._match_ids, dtype=torch.int64),
            keys=self._keys,
            captions=captions,
            broken=self._broken,
            retries=RETRIES.take(),
        )


@dataclass
class RawBatch:
    """Samples as they lie in their sources, nothing decoded or drawn; `names` has the source of each."""

    samples: list[RawSample]
    names: list[str]
    broken: list[BrokenSample] = field(default_factory=list)
    retries: int = 0

    def __len__(self) -> int:
        return len(self.samples)


def read_or_break(images: CaptionedImages, index: int) -> RawSample | BrokenSample:
    """A sample, or why it cannot be read. A store that is down raises: that is no sample's fault."""
    try:
        return images.read(index)
    except StorageError:
        raise
    except QLIPError as error:
        return BrokenSample(images.key(index), images.name, str(error))


def _buffer(capacity: int, size: tuple[int, int]) -> Tensor:
    """float32 (capacity, 3, H, W); in a worker in memory that its parent sees, so that nothing is copied on the way."""
    shape = (capacity, 3, *size)
    if get_worker_info() is None:
        return torch.empty(shape)
    count = capacity * 3 * size[0] * size[1]
    storage = torch.UntypedStorage._new_shared(4 * count, device="cpu")  # as torch's own collate does
    return torch.empty(0).set_(storage, 0, shape)  # type: ignore[call-overload,no-any-return]
