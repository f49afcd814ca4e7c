"""Metrics per image: each value stands beside its image's key, also where some images take no part."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import PER_IMAGE, MetricResult
from qlip.evaluation.evaluators.zero_shot import ZeroShot
from qlip.evaluation.report.per_image import per_image_records, write_per_image
from qlip.evaluation.report.result import EvalResult, Result

from .known import Known, rows_of


def result(*datasets: str) -> Result:
    rows = [
        EvalResult.model_construct(evaluator="x", data=data, values={}, notes={}, tables={}, broken=[])
        for data in datasets
    ]
    return Result.model_construct(measured=rows)


def test_per_image_records__images_of_equal_keys_have_rows_of_their_own() -> None:
    one, two = (MetricResult({}, arrays={f"{PER_IMAGE}{name}": torch.tensor([1.0, 2.0, 3.0])}) for name in "ab")
    for found in (one, two):
        found.keep_keys(["x", "y", "x"])
    assert [(row["key"], row["a"], row["b"]) for row in per_image_records(result("d", "d"), [one, two])] == [
        ("x", 1.0, 1.0),
        ("y", 2.0, 2.0),
        ("x", 3.0, 3.0),
    ]


def test_per_image_records__evaluators_of_a_dataset_share_rows() -> None:
    one, two, three = (MetricResult({}, arrays={f"{PER_IMAGE}{name}": torch.tensor([1.0, 2.0])}) for name in "aba")
    two.arrays["confusion"] = torch.zeros(3)
    two.keys = {f"{PER_IMAGE}b": ["y", "z"]}
    for found in (one, two, three):
        found.keep_keys(["x", "y"])
    assert per_image_records(result("d", "d", "e"), [one, two, three]) == [
        {"key": "x", "source": "d", "a": 1.0, "b": None},
        {"key": "y", "source": "d", "a": 2.0, "b": 1.0},
        {"key": "z", "source": "d", "a": None, "b": 2.0},
        {"key": "x", "source": "e", "a": 1.0, "b": None},
        {"key": "y", "source": "e", "a": 2.0, "b": None},
    ]
    assert per_image_records(result("d", "d"), [one, three])[1] == {"key": "y", "source": "d", "a": 2.0, "a#1": 2.0}


def test_per_image_records__images_that_take_no_part_have_no_value() -> None:
    model, labels = Known(), ["cat", None, "dog", "cat"]
    embeddings = torch.stack([model.vector(f"a {label}") for label in labels])
    rows = rows_of({"embedding": embeddings}, labels)
    named = ZeroShot(templates=["a {}"]).summarize(model, rows)
    assert named.keys and all(
        keys == [rows.keys[n] for n in (0, 2, 3)] and len(named.arrays[name]) == 3 for name, keys in named.keys.items()
    )


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_write_per_image__without_values_is_an_error(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(QLIPError, match="none of the metrics has a value per image"):
        write_per_image(tmp_path / f"x{suffix}", result("d"), [MetricResult({})])


def test_write_per_image__infinite_values_and_missing_ones(tmp_path: Path) -> None:
    found = MetricResult({}, arrays={f"{PER_IMAGE}psnr": torch.tensor([math.inf])})
    other = MetricResult({}, arrays={f"{PER_IMAGE}l1": torch.tensor([0.5])})
    found.keep_keys(["a,b"])
    other.keep_keys(["c"])
    assert write_per_image(tmp_path / "x.csv", result("d", "d"), [found, other]) == 2
    assert (tmp_path / "x.csv").read_text() == 'key,source,psnr,l1\n"a,b",d,inf,\nc,d,,0.5\n'
