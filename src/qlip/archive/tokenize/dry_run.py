"""Estimate a run from encoding a few batches: images, bytes and seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from qlip.archive.dataset.layout import parquet_bytes
from qlip.archive.dataset.schema import DatasetInfo, arrow_schema
from qlip.archive.tokenize.encoder import Encoder
from qlip.archive.tokenize.inputs import count_images
from qlip.archive.tokenize.preprocess import ReadyBatch, batches_of
from qlip.archive.tokenize.runner import Run
from qlip.errors import require
from qlip.modeling import QLIPModel

BATCHES = 3
"""Batches that are encoded; the first one is warm-up and not timed."""


@dataclass(frozen=True)
class Estimate:
    """Estimate of a run.

    Attributes:
        shards, finished: shards of the input; parts that are finished.
        images: images of the shards that are left, if known.
        bytes: bytes of the rows that are left; None if unknown.
        images_per_second: of one worker that reads, decodes and encodes in turn; None if unknown.
        seconds: for all that is left; None if unknown.
        sampled: images that were encoded for the estimate.
        device: that encoded them.
    """

    shards: int
    finished: int
    images: int | None
    bytes: int | None
    images_per_second: float | None
    seconds: float | None
    sampled: int
    device: str


def estimate(run: Run, workers: int, device: str, model: QLIPModel | None = None) -> Estimate:
    """Estimate a run from the first images of the first shard that is left.

    Args:
        run: to estimate; nothing is written.
        workers: models that will run at once.
        device: to encode on.
        model: see `Encoder`.

    Raises:
        QLIPError: that shard cannot be read.
    """
    left = count_images(shard for _, shard in run.todo)
    total, done = len(run.inputs.shards), len(run.finished)
    if not run.todo:
        return Estimate(total, done, 0, 0, None, 0.0, 0, device)
    tables, rate = _sample(run, Encoder(run.work, device, model))
    rows = sum(table.num_rows for table in tables)
    images, views = _images_of(tables), run.work.info.views
    per_image = sum(map(views.count_of, images.values())) / max(1, len(images))
    rate = rate / per_image if rate and per_image else None
    size = _bytes_a_row(tables, run.work.info) if rows else None
    return Estimate(
        total,
        done,
        left,
        None if left is None or size is None else round(left * per_image * size),
        rate,
        None if left is None or rate is None else left / rate / max(1, workers),
        len(images),
        device,
    )


def _sample(run: Run, encoder: Encoder) -> tuple[list[Any], float | None]:
    """Return the tables of a few batches, and rows per second."""
    tables: list[Any] = []
    began, timed = 0.0, 0
    for found in batches_of(run.todo[0][1], run.work):
        if isinstance(found, ReadyBatch):
            tables.append(encoder(found))
            timed += tables[-1].num_rows if len(tables) > 1 else 0
            began = began or time.monotonic()
        if len(tables) == BATCHES:
            break
    seconds = time.monotonic() - began
    return tables, (timed / seconds if timed and seconds else None)


def _images_of(tables: list[Any]) -> dict[str, tuple[int, int]]:
    """Return the sizes of the images that have rows, by key."""
    pairs = ((table.column(name).to_pylist() for name in ("key", "original_size")) for table in tables)
    return {key: (width, height) for keys, sizes in pairs for key, (width, height) in zip(keys, sizes, strict=True)}


def _bytes_a_row(tables: list[Any], info: DatasetInfo) -> float:
    """Return the marginal bytes per row, without a file's fixed size."""
    arrow = require("pyarrow", extra="archive")
    whole = arrow.concat_tables(tables).select(arrow_schema(info).names)
    some = whole.slice(0, whole.num_rows // 2)
    more = len(parquet_bytes(whole.combine_chunks())) - len(parquet_bytes(some.combine_chunks()))
    size: float = more / (whole.num_rows - some.num_rows)
    return max(1.0, size)
