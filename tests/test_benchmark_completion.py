"""The benchmark of continuing text: equal models draw equal ids, and others are refused."""

from __future__ import annotations

import pytest
import torch

from benchmarks import completion

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def test_ways__are_timed_in_equally_many_turns_and_refuse_other_weights() -> None:
    ways = completion.Ways(completion.shape("tiny"))
    for row in (ways.prefill(2), ways.decode(2)):
        assert {len(times) for times in row.seconds.values()} == {ways.shape.turns}
    with torch.no_grad():
        ways.llama.model.norm.weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="transformers: logits differ"):
        ways.prefill(1)


def test_ratio__is_the_median_of_pairs() -> None:
    row = completion.Row("decode", 1, {completion.OURS: [1.0, 2.0, 10.0], completion.TRANSFORMERS: [2.0, 8.0, 10.0]})
    assert row.ratio(completion.OURS) == 2.0
