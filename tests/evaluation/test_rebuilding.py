"""What is made of a batch is made once, is that batch's, and is gone with it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from weakref import ref

import torch
from torch import Tensor

from qlip.data.loader.eval_set import EvalBatch
from qlip.evaluation.models.base import EvalModel, Reconstructed
from qlip.evaluation.run.batch_cache import eight_bit, embedded_of, indices_of, originals_of, reconstructed_of
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


def test_each_thing_is_computed_once_a_batch_and_subject() -> None:
    model, other = Counting(), Counting()
    first, second = batch([0.0, 0.5]), batch([-1.0])
    for _ in range(2):
        assert reconstructed_of(model, first) is reconstructed_of(model, first)
        embedded_of(model, first), originals_of(model, first)
        assert indices_of(model, first) is reconstructed_of(model, first).indices  # tokens come with it
    assert model.asked == ["rebuild", "embed"]
    assert len(reconstructed_of(model, second).pixels) == 1
    indices_of(other, second), indices_of(other, second)
    assert model.asked == ["rebuild", "embed", "rebuild"] and other.asked == ["encode"]
    assert len(reconstructed_of(model, first).pixels) == 2


def test_pixels_are_what_an_eight_bit_file_holds() -> None:
    model, pictures = Counting(), batch([0.1234])
    for pixels in (reconstructed_of(model, pictures).pixels, originals_of(model, pictures)):
        values = pixels * 255
        torch.testing.assert_close(values, values.round())
    whole = torch.arange(256) / 255
    assert torch.equal(eight_bit(whole), whole)


def test_nothing_outlives_its_batch() -> None:
    model, pictures = Counting(), batch([0.0])
    kept = ref(reconstructed_of(model, pictures).pixels)
    del pictures
    gc.collect()
    assert kept() is None
