"""What a subject makes of a batch, computed once however many evaluators ask, and compared as 8-bit images.

Shapes: B images of H x W pixels, E dimensions of the shared space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor

from qlip.data.loader.eval_set import EvalBatch, EvalSet
from qlip.errors import QLIPError
from qlip.evaluation.models.base import Rebuilt, Subject
from qlip.modeling import to_uint8

T = TypeVar("T")


class _Memory:
    """What was made of one batch by one subject; it lets go of all when another comes, or when the batch dies."""

    def __init__(self) -> None:
        self._batch: ref[EvalBatch] | None = None
        self._subject: ref[Subject] | None = None
        self._kept: dict[str, Any] = {}

    def of(self, subject: Subject, batch: EvalBatch) -> dict[str, Any]:
        """By what it is, for these very objects; empty where they are new."""
        known = self._batch is not None and self._batch() is batch
        if not known or self._subject is None or self._subject() is not subject:
            kept: dict[str, Any] = {}
            self._kept = kept
            self._batch, self._subject = ref(batch, lambda _: kept.clear()), ref(subject)
        return self._kept


_MEMORY = _Memory()


def once(subject: Subject, batch: EvalBatch, what: str, compute: Callable[[], T]) -> T:
    """What ``compute`` gives for this very batch, computed the first time and kept until the next batch.

    Args:
        subject, batch: known by identity; the subject must not change while the batch lives.
        what: tells apart what is kept of a batch.
        compute: called without arguments.
    """
    kept = _MEMORY.of(subject, batch)
    if what not in kept:
        kept[what] = compute()
    found: T = kept[what]
    return found


def rebuilt_of(subject: Subject, batch: EvalBatch) -> Rebuilt:
    """``subject.rebuild`` of a batch, its pixels clamped and rounded to 8 bits: (B, 3, H, W) float32 in [0, 1]."""

    def compute() -> Rebuilt:
        found = subject.rebuild_named(batch.pixel_values, batch.keys)
        return Rebuilt(eight_bit(found.pixels.clamp(0, 1)), found.num_bytes, found.indices)

    return once(subject, batch, "rebuild", compute)


def originals_of(subject: Subject, batch: EvalBatch) -> Tensor:
    """What the subject saw, as 8-bit pixels: (B, 3, H, W) float32 in [0, 1], on the subject's device."""
    return once(subject, batch, "originals", lambda: eight_bit(subject.preprocessing.denormalize(batch.pixel_values)))


def embedded_of(subject: Subject, batch: EvalBatch) -> Tensor:
    """``subject.embed`` of a batch: unit vectors (B, E) float32, on the subject's device."""
    return once(subject, batch, "embed", lambda: subject.embed(batch.pixel_values))


def indices_of(subject: Subject, batch: EvalBatch) -> Tensor:
    """The tokens of a batch, (B, N, K) int64: those of its rebuilding where it was rebuilt, else ``subject.encode``."""
    kept = _MEMORY.of(subject, batch).get("rebuild")
    if isinstance(kept, Rebuilt) and kept.indices is not None:
        return kept.indices
    return once(subject, batch, "indices", lambda: subject.encode(batch.pixel_values))


def eight_bit(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1], any float type, to the float32 numbers k / 255 that an 8-bit file can hold."""
    return (pixels.float() * 255).round() / 255


@torch.inference_mode()
def pairs_again(subject: Subject, data: EvalSet, keys: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """A few images of a set once more, to be looked at: the worst and best of a measurement.

    Alone in their batch, so that a bit may differ from the measurement's, rarely.

    Args:
        subject: in eval mode.
        data: that was measured.
        keys: of images in it; where a set has a key twice, the first.

    Returns:
        By key, what the subject saw and what it rebuilt, (3, H, W) uint8 on the CPU each.

    Raises:
        QLIPError: no such key, or the image cannot be read.
    """
    places = {data.source.key(index): index for index in reversed(range(len(data)))}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for key in keys:
        if key not in places:
            raise QLIPError(f"{data.source.name}: has no picture {key}; was another set measured?")
        batch = data.collate([data[places[key]]]).to(subject.device)
        if not len(batch):
            raise QLIPError(f"{key}: {batch.skipped[0].reason}")
        pixels = originals_of(subject, batch)[0], rebuilt_of(subject, batch).pixels[0]
        found[key] = to_uint8(pixels[0]).cpu(), to_uint8(pixels[1]).cpu()
    return found
