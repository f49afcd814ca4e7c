"""The benchmark of drawing: equal models draw equal ids, and others are refused."""

from __future__ import annotations

import pytest
import torch

from benchmarks import um3_drawing

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def test_ways__draw_equal_ids_and_refuse_other_weights() -> None:
    ways = um3_drawing.Ways(um3_drawing.shape("tiny", 1))
    lines = list(um3_drawing.table(ways, [8]))
    assert len(lines) == 3 and "2x" in lines[-1]
    with torch.no_grad():
        ways.stock.model.norm.weight.neg_()
    with pytest.raises(RuntimeError, match="transformers drew other ids"):
        ways.draw(1)
