"""One batch of images with everything that evaluators derive from it, each computed once.

`evaluate_dataset` wraps each batch in a `ModelBatch` and hands the same object to all evaluators: the first one that
asks for the reconstruction pays for it, the others share it. It is released together with the batch.

Shapes: B images of H x W pixels, E dimensions of the embedding, N tokens of K groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from qlip.data.loader.eval_set import EvalBatch, EvalSet
from qlip.errors import QLIPError
from qlip.evaluation.metrics.pixel import round_to_8_bit
from qlip.evaluation.models.base import EvalModel, Reconstructed
from qlip.modeling import to_uint8
from qlip.runtime.finite import require_finite

T = TypeVar("T")


class ModelBatch:
    """A batch and the outputs of one model on it.

    Args:
        model: in eval mode; it must not change while the batch lives.
        batch: at least one image, ``pixel_values`` on the model's device.
    """

    def __init__(self, model: EvalModel, batch: EvalBatch) -> None:
        self.model = model
        self.pixel_values, self.keys = batch.pixel_values, batch.keys
        self.labels, self.captions = batch.labels, batch.captions
        self._shared: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def originals(self) -> Tensor:
        """The model's input as 8-bit pixels: (B, 3, H, W) float32 in [0, 1], on the model's device."""
        return round_to_8_bit(self.model.preprocessing.denormalize(self.pixel_values))

    @cached_property
    def reconstruction(self) -> Reconstructed:
        """`EvalModel.reconstruct`, pixels clamped and rounded to 8 bits: (B, 3, H, W) float32 in [0, 1]."""
        found = self.model.reconstruct_keyed(self.pixel_values, self.keys)
        self._check(found.pixels, "reconstructed pixels")
        return Reconstructed(round_to_8_bit(found.pixels.clamp(0, 1)), found.num_bytes, found.indices)

    @cached_property
    def embeddings(self) -> Tensor:
        """`EvalModel.encode_image`: unit vectors (B, E) float32, on the model's device."""
        found = self.model.encode_image(self.pixel_values)
        self._check(found, "embeddings")
        return found

    @cached_property
    def indices(self) -> Tensor:
        """Tokens (B, N, K) int64: those of the reconstruction if it has been computed, else `EvalModel.tokenize`."""
        computed = self.__dict__.get("reconstruction")
        if computed is not None and computed.indices is not None:
            found: Tensor = computed.indices
            return found
        return self.model.tokenize(self.pixel_values)

    def _check(self, values: Tensor, what: str) -> None:
        """Refuse NaN and infinity, with the image's key: they would win comparisons, and clamping would hide them."""
        require_finite(values, what, f"the output of {self.model.name} is broken", self.keys)

    def shared(self, key: str, compute: Callable[[], T]) -> T:
        """Return ``compute()`` of the first call with this key; later calls return the stored value."""
        if key not in self._shared:
            self._shared[key] = compute()
        found: T = self._shared[key]
        return found


@torch.inference_mode()
def reconstruct_by_key(model: EvalModel, data: EvalSet, keys: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Reconstruct a few images of a dataset again, to show them.

    Each image is a batch of its own, so a bit may rarely differ from the evaluated reconstruction.

    Args:
        model: in eval mode.
        data: the evaluated dataset.
        keys: of images in it; if a key occurs twice, the first image is taken.

    Returns:
        By key, input and reconstruction, (3, H, W) uint8 on the CPU each.

    Raises:
        QLIPError: no such key, or the image cannot be read.
    """
    places = {data.key(index): index for index in reversed(range(len(data)))}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for key in keys:
        if key not in places:
            raise QLIPError(f"{data.source.name}: has no image {key}; was another dataset evaluated?")
        batch = data.collate([data[places[key]]]).to(model.device)
        if not len(batch):
            raise QLIPError(f"{key}: {batch.skipped[0].reason}")
        shown = ModelBatch(model, batch)
        found[key] = to_uint8(shown.originals[0]).cpu(), to_uint8(shown.reconstruction.pixels[0]).cpu()
    return found
