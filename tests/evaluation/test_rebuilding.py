"""What is made of a batch is made once, is that batch's, and is gone with it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from weakref import ref

import torch
from torch import Tensor

from qlip.data.loader.eval_set import EvalBatch
from qlip.evaluation.models.base import Rebuilt, Subject
from qlip.evaluation.run.batch_cache import eight_bit, embedded_of, indices_of, originals_of, rebuilt_of
from qlip.modeling import Preprocessing


class Counting(Subject):
    """Rebuilds everything a little darker, and counts how often it is asked."""

    def __init__(self) -> None:
        self.name, self.can, self.device = "counting", frozenset({"rebuild", "embed", "tokens"}), torch.device("cpu")
        self.preprocessing, self.fingerprint = Preprocessing((8, 8), 8), "0" * 64
        self.asked: list[str] = []

    def rebuild(self, pixel_values: Tensor) -> Rebuilt:
        """0.9 of it."""
        self.asked.append("rebuild")
        count = len(pixel_values)
        pixels = self.preprocessing.denormalize(pixel_values) * 0.9
        return Rebuilt(pixels, torch.full((count,), 5), torch.ones(count, 2, 1, dtype=torch.int64))

    def embed(self, pixel_values: Tensor) -> Tensor:
        """One direction for all."""
        self.asked.append("embed")
        return torch.ones(len(pixel_values), 1)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """As it rebuilds."""
        self.asked.append("encode")
        return torch.ones(len(pixel_values), 2, 1, dtype=torch.int64)


def batch(values: Sequence[float]) -> EvalBatch:
    pixels = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    keys = [str(number) for number in range(len(values))]
    return EvalBatch(pixels, [()] * len(values), [None] * len(values), keys)


def test_each_thing_is_computed_once_a_batch_and_subject() -> None:
    subject, other = Counting(), Counting()
    first, second = batch([0.0, 0.5]), batch([-1.0])
    for _ in range(2):
        assert rebuilt_of(subject, first) is rebuilt_of(subject, first)
        embedded_of(subject, first), originals_of(subject, first)
        assert indices_of(subject, first) is rebuilt_of(subject, first).indices  # tokens come with it
    assert subject.asked == ["rebuild", "embed"]
    assert len(rebuilt_of(subject, second).pixels) == 1
    indices_of(other, second), indices_of(other, second)
    assert subject.asked == ["rebuild", "embed", "rebuild"] and other.asked == ["encode"]
    assert len(rebuilt_of(subject, first).pixels) == 2


def test_pixels_are_what_an_eight_bit_file_holds() -> None:
    subject, pictures = Counting(), batch([0.1234])
    for pixels in (rebuilt_of(subject, pictures).pixels, originals_of(subject, pictures)):
        values = pixels * 255
        torch.testing.assert_close(values, values.round())
    whole = torch.arange(256) / 255
    assert torch.equal(eight_bit(whole), whole)


def test_nothing_outlives_its_batch() -> None:
    subject, pictures = Counting(), batch([0.0])
    kept = ref(rebuilt_of(subject, pictures).pixels)
    del pictures
    gc.collect()
    assert kept() is None
