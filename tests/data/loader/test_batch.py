"""Batches: per-sample and shared fields, micro-batches, and batch classes that split themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qlip.data.loader.batch import Batch, PerSample, SampleBatch, Shared, SkippedSample


@dataclass
class TextBatch(SampleBatch):
    ids: PerSample[Tensor]
    keys: PerSample[list[str]]
    captions: PerSample[tuple[str, ...] | None] = None
    pad_id: Shared[int] = 0
    prompt: Shared[Tensor | None] = None


@dataclass
class Undeclared(SampleBatch):
    ids: PerSample[Tensor]
    lengths: list[int]


@dataclass
class PackedBatch(SampleBatch):
    """Sequences behind each other: sample i is ids[cu_seqlens[i] : cu_seqlens[i + 1]]."""

    ids: Tensor  # (T,)
    cu_seqlens: Tensor  # (n + 1,)

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def split(self, number: int) -> list[PackedBatch]:
        bounds = [len(self) * part // number for part in range(number + 1)]
        ends = self.cu_seqlens.tolist()
        return [
            replace(self, ids=self.ids[ends[low] : ends[high]], cu_seqlens=self.cu_seqlens[low : high + 1] - ends[low])
            for low, high in pairwise(bounds)
        ]


def text_batch(rows: int) -> TextBatch:
    prompt = torch.arange(rows)  # of the batch's length, and shared all the same
    return TextBatch(torch.arange(rows * 3).view(rows, 3), [str(row) for row in range(rows)], pad_id=9, prompt=prompt)


def test_split__cuts_what_is_per_sample_and_copies_what_is_shared() -> None:
    batch = text_batch(7)
    batch.skipped = [SkippedSample("a", "s", "why")] * 7  # as many as samples: not cut
    parts = batch.split(3)
    assert [len(part) for part in parts] == [2, 2, 3] and all(type(part) is TextBatch for part in parts)
    assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids)
    assert [key for part in parts for key in part.keys] == batch.keys
    for part in parts:
        assert part.pad_id == 9 and part.prompt is batch.prompt and part.skipped == batch.skipped
        assert part.captions is None


def test_split__of_few_samples_leaves_empty_batches_and_of_one_part_is_the_batch() -> None:
    parts = text_batch(2).split(4)
    assert sorted(len(part) for part in parts) == [0, 0, 1, 1] and parts[0].ids.shape == (0, 3)
    batch = text_batch(2)
    assert batch.split(1)[0] is batch


@pytest.mark.parametrize("number", [1, 3])
def test_split__refuses_a_field_that_is_neither_per_sample_nor_shared(number: int) -> None:
    batch = Undeclared(torch.zeros(4, 2), [1, 2, 3, 4])
    with pytest.raises(TypeError, match=r"Undeclared\.lengths is neither PerSample nor Shared"):
        batch.split(number)


def test_split__refuses_a_per_sample_field_of_another_length() -> None:
    batch = text_batch(4)
    batch.keys = batch.keys[:3]
    with pytest.raises(ValueError, match=r"TextBatch\.keys has 3 entries, the batch 4 samples"):
        batch.split(2)


def test_split__is_a_batch_class_s_own_where_samples_are_packed() -> None:
    lengths = [5, 1, 4, 2, 7]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    batch = PackedBatch(torch.arange(19), ends, skipped=[SkippedSample("a", "s", "why")])
    parts = batch.split(3)
    assert len(batch) == 5 and [len(part) for part in parts] == [1, 2, 2]
    assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids)
    assert [length for part in parts for length in part.cu_seqlens.diff().tolist()] == lengths
    assert all(part.cu_seqlens[0] == 0 and part.cu_seqlens[-1] == len(part.ids) for part in parts)
    assert batch.to(torch.device("meta")).ids.is_meta


def test_to__moves_tensors_and_lists_of_tensors() -> None:
    batch = text_batch(2)
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    assert moved.ids.is_meta and moved.prompt is not None and moved.prompt.is_meta and moved.keys == batch.keys
    assert not batch.ids.is_meta
    ragged = Undeclared(torch.zeros(1), [torch.zeros(2), torch.zeros(3)])  # type: ignore[list-item]
    assert all(one.is_meta for one in ragged.to(torch.device("meta")).lengths)  # type: ignore[attr-defined]


def test_batch__of_images_splits_every_field() -> None:
    pixels = torch.rand(5, 3, 4, 4)
    numbers = torch.arange(5)
    names = list("abcde")
    batch = Batch(pixels, numbers[:, None], numbers > 2, numbers, names, [None, *names[1:]], retries=3)
    first, second = batch.split(2)
    assert (len(first), len(second), first.retries) == (2, 3, 3)
    assert torch.equal(torch.cat([first.pixel_values, second.pixel_values]), pixels)
    assert first.captions + second.captions == batch.captions and first.keys + second.keys == names
