"""Batches of samples for training.

`SampleBatch` gives a batch class what the Trainer needs: a length, `split` into micro-batches, `to` a device, and the
samples that were skipped. `Batch` is the batch of captioned images; `BatchBuilder` decodes and augments one sample
after the other into it. `RawBatch` holds samples before decoding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Self, TypeVar, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from qlip.data.loader.transforms import TrainTransform
from qlip.data.sources.base import CaptionedImages, RawSample, printable
from qlip.data.sources.captions import draw_caption, match_id, without_sides
from qlip.data.storage.retry import RETRIES, StorageError
from qlip.errors import QLIPError, QLIPWarning
from qlip.modeling.images import load_image

Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]
"""Texts to (input_ids, attention_mask), int64 (B, T), always the same T; it pickles, to run in workers."""

Value = TypeVar("Value")
PerSample = Annotated[Value, "per sample"]
"""Type of a batch's field with an entry for each sample: a tensor, list or tuple of length B, or None."""
Shared = Annotated[Value, "shared"]
"""Type of a batch's field that belongs to the whole batch, so that every micro-batch has all of it."""


@dataclass(frozen=True)
class SkippedSample:
    """A sample that could not be read or decoded, with the reason in one line."""

    key: str
    source: str
    reason: str


@dataclass
class SampleBatch:
    """Base of batch dataclasses, with `split` and `to` for the Trainer.

    `split` asks that each field is declared as `PerSample[...]` or `Shared[...]`. A batch whose samples are not entries
    of its fields, such as packed sequences, defines `__len__` and `split` itself.

        @dataclass
        class TextBatch(SampleBatch):
            ids: PerSample[Tensor]  # int64 (B, S)
            pad_id: Shared[int]

    Attributes:
        skipped: samples of the batch's positions that could not be read.
    """

    skipped: Shared[list[SkippedSample]] = field(default_factory=list, kw_only=True)

    def __len__(self) -> int:
        """Number of samples: the length of the first per-sample field."""
        for name, kind in field_kinds(type(self)).items():
            if kind == "per sample" and (value := getattr(self, name)) is not None:
                return len(value)
        raise TypeError(f"{type(self).__name__} has no PerSample field; define __len__")

    def split(self, number: int) -> list[Self]:
        """Cut into micro-batches whose sizes differ by at most one; with fewer samples than that, some are empty.

        Raises:
            TypeError: a field is declared neither per-sample nor shared.
            ValueError: a per-sample field has another length than the batch.
        """
        rows, cuts = len(self), list[str]()
        for name, kind in field_kinds(type(self)).items():
            where, value = f"{type(self).__name__}.{name}", getattr(self, name)
            if kind is None:
                raise TypeError(f"{where} is neither PerSample nor Shared; declare one, or define split")
            if kind == "per sample" and value is not None:
                if len(value) != rows:
                    raise ValueError(f"{where} has {len(value)} entries, the batch {rows} samples; need one for each")
                cuts.append(name)
        if number == 1:
            return [self]
        bounds = [rows * part // number for part in range(number + 1)]
        slices = [slice(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]
        return [replace(self, **{name: getattr(self, name)[part] for name in cuts}) for part in slices]

    def to(self, device: torch.device) -> Self:
        """Copy with all tensors on a device; a copy to a GPU goes through pinned memory and does not block."""
        if device.type == "cpu":
            return self
        return replace(self, **{one.name: _to_device(getattr(self, one.name), device) for one in fields(self)})


def field_kinds(batch: type[SampleBatch]) -> dict[str, str | None]:
    """Kind of each field of a batch class: "per sample", "shared", or None where it declares neither."""
    hints = get_type_hints(batch, include_extras=True)
    marks = {one.name: getattr(hints[one.name], "__metadata__", ()) for one in fields(batch)}
    return {name: next((m for m in mark if m in ("per sample", "shared")), None) for name, mark in marks.items()}


def _to_device(value: Any, device: torch.device) -> Any:
    """Move a tensor, or a list of tensors, to a device; return anything else unchanged."""
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [_to_device(one, device) for one in value]
    if not isinstance(value, Tensor):
        return value
    pinned = value if value.is_pinned() or device.type != "cuda" else value.pin_memory()
    return pinned.to(device, non_blocking=True)


def no_text(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Tokenize for models without text: a single 0 per sample, (B, 1)."""
    empty = torch.zeros(len(texts), 1, dtype=torch.int64)
    return empty, empty


@dataclass(frozen=True)
class SampleTransform:
    """How a stream turns a source's samples into training samples."""

    transform: TrainTransform
    templates: tuple[str, ...] = ()
    captions: bool = True  # False: text is ignored, images train reconstruction alone

    def into(self, raw: RawSample, rng: np.random.Generator, out: NDArray[np.float32]) -> tuple[str | None, int]:
        """Decode and augment a sample to `out`, float32 (3, H, W), and draw its caption, which is true of a flip too.

        A flipped image draws from its captions that name no side; if all name one, the image is not flipped.

        Returns:
            The caption and its match id.

        Raises:
            QLIPError: the image cannot be decoded.
        """
        image = load_image(raw.image)
        if not self.captions:
            self.transform.into(image, rng, out)
            return None, 0
        texts = raw.captions or ((raw.label,) if raw.label is not None and self.templates else ())
        true = without_sides(texts) if self.transform.flip else texts
        flipped = self.transform.into(image, rng, out, may_flip=bool(true) or not texts)
        if flipped and raw.captions:
            raw = replace(raw, captions=true)
        caption = draw_caption(raw, self.templates, rng)
        return caption, match_id(raw.label, caption)


@dataclass(frozen=True)
class Sample:
    """One augmented image, float32 (3, H, W), and the caption drawn for it."""

    pixels: Tensor
    caption: str | None
    match_id: int
    key: str
    text_fault: str | None = None


@dataclass
class Batch(SampleBatch):
    """B captioned images that could be read.

    Attributes:
        pixel_values: float32 (B, 3, H, W), normalised.
        input_ids: int64 (B, T); the tokens of "" where there is no caption.
        has_caption: bool (B,).
        match_ids: int64 (B,), equal for samples of equal label or caption; 0 without caption.
        keys: "source/key" of each sample.
        captions: the text that `input_ids` encode, or None.
        text_faults: why captions or labels were left out or repaired, a line for each such sample.
        retries: repeated requests to a store while the batch was read.
    """

    pixel_values: PerSample[Tensor]
    input_ids: PerSample[Tensor]
    has_caption: PerSample[Tensor]
    match_ids: PerSample[Tensor]
    keys: PerSample[list[str]]
    captions: PerSample[list[str | None]]
    text_faults: Shared[list[str]] = field(default_factory=list)
    retries: Shared[int] = 0


class BatchBuilder:
    """A batch under construction; each sample's pixels are written to their final place.

    Args:
        capacity: greatest number of samples.
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
        self._skipped: list[SkippedSample] = []
        self._text_faults: list[str] = []

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, raw: RawSample, source: str, how: SampleTransform, rng: np.random.Generator) -> None:
        """Decode and augment one sample and draw its caption; an image that cannot be decoded is skipped."""
        try:
            caption, match = how.into(raw, rng, self._pixels[len(self._keys)])
        except QLIPError as error:
            self.skip(SkippedSample(raw.key, source, str(error)))
            return
        if how.captions and raw.text_fault is not None:
            self._text_faults.append(raw.text_fault)
        self._captions.append(caption)
        self._match_ids.append(match)
        self._keys.append(f"{source}/{raw.key}")

    def skip(self, sample: SkippedSample) -> None:
        """Record a sample that could not be read."""
        self._skipped.append(sample)

    def finish(self) -> Batch:
        """Make the batch; B may be 0."""
        count, captions = len(self._keys), self._captions
        input_ids, _ = self._tokenize([caption or "" for caption in captions] or [""])
        return Batch(
            pixel_values=self._buffer[:count],
            input_ids=input_ids[:count],
            has_caption=torch.tensor([caption is not None for caption in captions], dtype=torch.bool),
            match_ids=torch.tensor(self._match_ids, dtype=torch.int64),
            keys=self._keys,
            captions=captions,
            skipped=self._skipped,
            text_faults=self._text_faults,
            retries=RETRIES.take(),
        )


@dataclass
class RawBatch:
    """Samples before decoding; `names` has the source of each."""

    samples: list[RawSample]
    names: list[str]
    skipped: list[SkippedSample] = field(default_factory=list)
    retries: int = 0

    def __len__(self) -> int:
        return len(self.samples)


@dataclass
class TextFaults:
    """Counts how often captions or labels were left out or repaired, where batches arrive.

    `add` warns at the first time and whenever the count is ten times as large; `close` warns of the rest.
    """

    count: int = 0
    first: str = ""
    warned: int = 0

    def add(self, faults: Sequence[str]) -> None:
        """Count the faults of a batch."""
        self.first = self.first or next(iter(faults), "")
        self.count += len(faults)
        if self.count >= 10 * self.warned and self.count:
            self.close()

    def close(self) -> None:
        """Warn, if there are faults of which there was no warning yet."""
        if self.count > self.warned:
            self.warned = self.count
            message = (
                f"captions or labels left out or repaired {self.count:,} {'time' if self.count == 1 else 'times'}, the"
                f" images are used; the first: {printable(self.first)}"
            )
            warnings.warn(message, QLIPWarning, stacklevel=2)


def read_or_skip(images: CaptionedImages, index: int) -> RawSample | SkippedSample:
    """Read a sample, or return the reason to skip it. A failed storage raises: the sample may be readable."""
    try:
        return images.read(index)
    except StorageError:
        raise
    except QLIPError as error:
        return SkippedSample(images.key(index), images.name, printable(str(error)))


def _buffer(capacity: int, size: tuple[int, int]) -> Tensor:
    """Allocate float32 (capacity, 3, H, W); in a worker, in shared memory, so that the parent needs no copy."""
    shape = (capacity, 3, *size)
    if get_worker_info() is None:
        return torch.empty(shape)
    count = capacity * 3 * size[0] * size[1]
    storage = torch.UntypedStorage._new_shared(4 * count, device="cpu")  # as torch's default collate does
    return torch.empty(0).set_(storage, 0, shape)  # type: ignore[call-overload,no-any-return]
