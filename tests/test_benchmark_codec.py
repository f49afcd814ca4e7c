"""The codec's benchmark runs, on tokens that come back, and its drawing counts the coded bytes."""

from __future__ import annotations

import torch

from benchmarks import codec
from qlip import QLIPModel, QLIPProcessor


def test_the_table_has_both_grids_and_a_verdict() -> None:
    lines = list(codec.speed(rounds=1, count=2))
    assert lines[2].startswith("| 8 x 8 x 28 bits | 224, ") and lines[3].startswith("| 16 x 16 x 28 bits | 896, ")
    assert lines[-1].endswith(("met.", "missed**."))


def test_codec_benchmark__same_image_in_fewer_bytes() -> None:
    subject = codec.EntropyCoded(
        QLIPModel.from_pretrained(codec.MODEL), QLIPProcessor.from_pretrained(codec.MODEL), "coded"
    )
    subject.codec = codec.coder()
    with torch.inference_mode():
        found = subject.reconstruct(torch.zeros(2, 3, 64, 64))
    assert found.num_bytes.shape == (2,) and int(found.num_bytes.max()) < 200
