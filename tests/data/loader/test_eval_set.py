"""Evaluation sets: each sample once, in the source's order."""

from __future__ import annotations

from pathlib import Path

from qlip.data import EvalSet, EvalTransform
from qlip.modeling.processor import Preprocessing
from tests.data.samples import tars


def test_eval_set__each_sample_once_and_in_order(tmp_path: Path) -> None:
    source = tars(tmp_path, 23, broken=(5,))
    for num_workers in (0, 2):
        evaluation = EvalSet(source, EvalTransform(Preprocessing((16, 16), 16)))
        found = list(evaluation.batches(8, num_workers))
        assert [len(batch) for batch in found] == [7, 8, 7]
        assert [key for batch in found for key in batch.keys] == [f"{n:04d}" for n in range(23) if n != 5]
        assert [one.key for batch in found for one in batch.skipped] == ["0005"]
        assert found[0].captions[0] == ("first 0", "second 0") and found[0].labels[1] == "odd 1"
        assert found[0].pixel_values.shape == (7, 3, 16, 16)
    assert [len(batch) for batch in EvalSet(source, evaluation.transform, limit=4).batches(3)] == [3, 1]
