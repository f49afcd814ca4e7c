"""Throughput says what it timed, in the right unit, and on what."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from qlip import QLIPError, QLIPModel, QLIPProcessor
from qlip.evaluation.evaluators.throughput import measure_throughput
from qlip.evaluation.models.base import QLIPEvalModel
from qlip.runtime.machine import describe_machine

from .plain import Plain


def slow(pixels: Tensor) -> Tensor:
    time.sleep(0.02 * len(pixels))
    return pixels


def test_throughput__a_rate_is_images_over_seconds() -> None:
    found = measure_throughput(Plain(16, slow), batch_size=4, rounds=3)
    rate = found.rates["rebuild"]
    assert list(found.rates) == ["rebuild"] and rate.unit == "images/s"
    slowest, fastest = found.ranges["rebuild"]
    assert slowest <= rate.value <= fastest <= 50
    assert rate.value > 5  # a busy machine is slower than 50, not ten times


def test_throughput__a_model_is_timed_in_all_it_does() -> None:
    model, processor = QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled")
    found = measure_throughput(QLIPEvalModel(model, processor, "nano"), batch_size=2, rounds=2)
    assert set(found.rates) == {"encode", "decode", "rebuild", "embed"}
    assert found.rates["rebuild"].value < found.rates["encode"].value
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    assert weights < found.peak < 2**36
    values = found.values()
    assert values["peak_gib"].value == pytest.approx(found.peak / 2**30) and values["encode_per_second"].value > 0
    assert f"PyTorch {torch.__version__}" in found.machine and "threads" in describe_machine()


def test_throughput__the_peak_is_that_of_the_work() -> None:
    def large(pixels: Tensor) -> Tensor:
        return pixels + torch.ones(2**27).sum() * 0  # half a GiB, gone afterwards

    little = measure_throughput(Plain(16, lambda pixels: pixels), batch_size=1, rounds=1, warmup=0)
    much = measure_throughput(Plain(16, large), batch_size=1, rounds=1, warmup=0)
    again = measure_throughput(Plain(16, lambda pixels: pixels), batch_size=1, rounds=1, warmup=0)
    assert much.peak - little.peak > 0.4 * 2**30
    assert again.peak < much.peak - 0.4 * 2**30


def test_throughput__nothing_to_time_is_said() -> None:
    model = Plain(16, slow)
    model.capabilities = frozenset()
    with pytest.raises(QLIPError, match="plain: it neither reconstructs nor embeds images"):
        measure_throughput(model)
    with pytest.raises(QLIPError, match="must be positive, got 0 and 5"):
        measure_throughput(Plain(16, slow), batch_size=0)
