"""`ModelBatch`: outputs of a model on a batch are computed once and released with the batch."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from weakref import ref

import torch
from torch import Tensor

from qlip.data.loader.eval_set import EvalBatch
from qlip.evaluation.metrics.pixel import round_to_8_bit
from qlip.evaluation.models.base import EvalModel, Reconstructed
from qlip.evaluation.models.batch import ModelBatch
from qlip.modeling import Preprocessing


class Counting(EvalModel):
    """Rebuilds everything a little darker, and counts how often it is asked."""

    def __init__(self) -> None:
        self.name, self.capabilities, self.device = (
            "counting",
            frozenset({"reconstruct", "encode_image", "tokenize"}),
            torch.device("cpu"),
        )
        self.preprocessing, self.fingerprint = Preprocessing((8, 8), 8), "0" * 64
        self.asked: list[str] = []

    def reconstruct(self, pixel_values: Tensor) -> Reconstructed:
        """0.9 of it."""
        self.asked.append("rebuild")
        count = len(pixel_values)
        pixels = self.preprocessing.denormalize(pixel_values) * 0.9
        return Reconstructed(pixels, torch.full((count,), 5), torch.ones(count, 2, 1, dtype=torch.int64))

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """One direction for all."""
        self.asked.append("embed")
        return torch.ones(len(pixel_values), 1)

    def tokenize(self, pixel_values: Tensor) -> Tensor:
        """As it rebuilds."""
        self.asked.append("encode")
        return torch.ones(len(pixel_values), 2, 1, dtype=torch.int64)


def batch(values: Sequence[float]) -> EvalBatch:
    pixels = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    keys = [str(number) for number in range(len(values))]
    return EvalBatch(pixels, [()] * len(values), [None] * len(values), keys)


def test_model_batch__each_output_once() -> None:
    model, other = Counting(), Counting()
    first, second = ModelBatch(model, batch([0.0, 0.5])), ModelBatch(model, batch([-1.0]))
    for _ in range(2):
        assert first.reconstruction is first.reconstruction
        assert len(first.embeddings) == len(first.originals) == 2
        assert first.indices is first.reconstruction.indices  # tokens come with it
        assert first.shared("noise", lambda: torch.rand(3)) is first.shared("noise", lambda: torch.rand(3))
    assert model.asked == ["rebuild", "embed"]
    assert len(second.reconstruction.pixels) == 1
    third = ModelBatch(other, batch([-1.0]))
    assert third.indices is third.indices
    assert model.asked == ["rebuild", "embed", "rebuild"] and other.asked == ["encode"]
    assert len(first.reconstruction.pixels) == 2


def test_model_batch__pixels_are_those_of_an_8_bit_file() -> None:
    images = ModelBatch(Counting(), batch([0.1234]))
    for pixels in (images.reconstruction.pixels, images.originals):
        values = pixels * 255
        torch.testing.assert_close(values, values.round())
    whole = torch.arange(256) / 255
    assert torch.equal(round_to_8_bit(whole), whole)


def test_model_batch__nothing_outlives_it() -> None:
    images = ModelBatch(Counting(), batch([0.0]))
    kept = ref(images.reconstruction.pixels)
    del images
    gc.collect()
    assert kept() is None
