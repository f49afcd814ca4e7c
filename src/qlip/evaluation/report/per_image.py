"""A table of metrics with one row per image and dataset, as CSV or Parquet."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from qlip.errors import QLIPError, require
from qlip.evaluation.evaluators.base import PER_IMAGE, MetricResult
from qlip.evaluation.report.result import Result
from qlip.files import write_bytes

SUFFIXES = (".csv", ".parquet")
Record = dict[str, str | float | None]


def check_path(path: Path) -> None:
    """Refuse a path that :func:`write_per_image` cannot write. Raises QLIPError: another suffix, or no pyarrow."""
    if path.suffix not in SUFFIXES:
        raise QLIPError(f"{path}: must end in {' or '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        require("pyarrow", extra="tables")


def per_image_records(result: Result, metric_results: Sequence[MetricResult]) -> list[Record]:
    """Rows of ``key``, ``source`` (the dataset) and the metrics of an image, None where one has no value.

    A metric that is measured twice on a dataset, with other settings, is called ``METRIC#ROW`` the second time, ROW
    being its place in the result. Images of equal keys have rows of their own, in the order of the dataset.

    Args:
        result: of an evaluation.
        metric_results: one for each of ``result.measured``.
    """
    rows: dict[tuple[str, str, int], Record] = {}
    columns: dict[str, None] = {}
    taken: set[tuple[str, str]] = set()
    for number, (measured, found) in enumerate(zip(result.measured, metric_results, strict=True)):
        for array, keys in found.keys.items():
            name = array.removeprefix(PER_IMAGE)
            column = name if (measured.data, name) not in taken else f"{name}#{number}"
            taken.add((measured.data, column))
            columns[column] = None
            seen = Counter[str]()
            for key, value in zip(keys, found.arrays[array].tolist(), strict=True):
                row = rows.setdefault((measured.data, key, seen[key]), {"key": key, "source": measured.data})
                seen[key] += 1
                row[column] = value
    return [
        {"key": row["key"], "source": row["source"], **{name: row.get(name) for name in columns}}
        for row in rows.values()
    ]


def write_per_image(path: Path, result: Result, metric_results: Sequence[MetricResult]) -> int:
    """Write the table and return its number of rows.

    Raises:
        QLIPError: no metric has values of images, or the file cannot be written.
    """
    check_path(path)
    records = per_image_records(result, metric_results)
    if not records:
        raise QLIPError(f"{path}: none of the metrics has a value per image; measure reconstruction or zero_shot too")
    if path.suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        write_bytes(path, text.getvalue().encode())
        return len(records)
    arrow, parquet = require("pyarrow", extra="tables"), require("pyarrow.parquet", extra="tables")
    buffer = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(records), buffer)
    write_bytes(path, buffer.getvalue())
    return len(records)
