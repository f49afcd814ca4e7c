"""What a model makes of a batch, computed once however many evaluators ask, and compared as 8-bit images.

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
from qlip.evaluation.models.base import EvalModel, Reconstructed
from qlip.modeling import to_uint8

T = TypeVar("T")


class _Memory:
    """What was made of one batch by one model; it lets go of all when another comes, or when the batch dies."""

    def __init__(self) -> None:
        self._batch: ref[EvalBatch] | None = None
        self._subject: ref[EvalModel] | None = None
        self._kept: dict[str, Any] = {}

    def of(self, model: EvalModel, batch: EvalBatch) -> dict[str, Any]:
        """By what it is, for these very objects; empty where they are new."""
        known = self._batch is not None and self._batch() is batch
        if not known or self._subject is None or self._subject() is not model:
            kept: dict[str, Any] = {}
            self._kept = kept
            self._batch, self._subject = ref(batch, lambda _: kept.clear()), ref(model)
        return self._kept


_MEMORY = _Memory()


def once(model: EvalModel, batch: EvalBatch, what: str, compute: Callable[[], T]) -> T:
    """What ``compute`` gives for this very batch, computed the first time and kept until the next batch.

    Args:
        model, batch: known by identity; the model must not change while the batch lives.
        what: tells apart what is kept of a batch.
        compute: called without arguments.
    """
    kept = _MEMORY.of(model, batch)
    if what not in kept:
        kept[what] = compute()
    found: T = kept[what]
    return found


def reconstructed_of(model: EvalModel, batch: EvalBatch) -> Reconstructed:
    """``model.reconstruct`` of a batch, its pixels clamped and rounded to 8 bits: (B, 3, H, W) float32 in [0, 1]."""

    def compute() -> Reconstructed:
        found = model.reconstruct_keyed(batch.pixel_values, batch.keys)
        return Reconstructed(eight_bit(found.pixels.clamp(0, 1)), found.num_bytes, found.indices)

    return once(model, batch, "rebuild", compute)


def originals_of(model: EvalModel, batch: EvalBatch) -> Tensor:
    """What the model saw, as 8-bit pixels: (B, 3, H, W) float32 in [0, 1], on the model's device."""
    return once(model, batch, "originals", lambda: eight_bit(model.preprocessing.denormalize(batch.pixel_values)))


def embedded_of(model: EvalModel, batch: EvalBatch) -> Tensor:
    """``model.embed`` of a batch: unit vectors (B, E) float32, on the model's device."""
    return once(model, batch, "embed", lambda: model.encode_image(batch.pixel_values))


def indices_of(model: EvalModel, batch: EvalBatch) -> Tensor:
    """The tokens of a batch, (B, N, K) int64: those of its rebuilding where it was rebuilt, else ``model.tokenize``."""
    kept = _MEMORY.of(model, batch).get("rebuild")
    if isinstance(kept, Reconstructed) and kept.indices is not None:
        return kept.indices
    return once(model, batch, "indices", lambda: model.tokenize(batch.pixel_values))


def eight_bit(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1], any float type, to the float32 numbers k / 255 that an 8-bit file can hold."""
    return (pixels.float() * 255).round() / 255


@torch.inference_mode()
def reconstruct_by_key(model: EvalModel, data: EvalSet, keys: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """A few images of a set once more, to be looked at: the worst and best of a measurement.

    Alone in their batch, so that a bit may differ from the measurement's, rarely.

    Args:
        model: in eval mode.
        data: that was measured.
        keys: of images in it; where a set has a key twice, the first.

    Returns:
        By key, what the model saw and what it rebuilt, (3, H, W) uint8 on the CPU each.

    Raises:
        QLIPError: no such key, or the image cannot be read.
    """
    places = {data.source.key(index): index for index in reversed(range(len(data)))}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for key in keys:
        if key not in places:
            raise QLIPError(f"{data.source.name}: has no picture {key}; was another set measured?")
        batch = data.collate([data[places[key]]]).to(model.device)
        if not len(batch):
            raise QLIPError(f"{key}: {batch.skipped[0].reason}")
        pixels = originals_of(model, batch)[0], reconstructed_of(model, batch).pixels[0]
        found[key] = to_uint8(pixels[0]).cpu(), to_uint8(pixels[1]).cpu()
    return found
