"""Preprocess a shard: images to batches of pixels, and encoded batches to the table of a part.

The images of a batch depend on the shard, the views and the batch size alone, not on the worker: a part that is made
again has the same bytes. `batches_of` yields `ReadyBatch`es and one `ShardEnd`.

Shapes: B views of H x W pixels.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date, time
from decimal import Decimal
from typing import Any

import numpy as np

from qlip.archive.dataset.layout import SkippedImage
from qlip.archive.dataset.parquet_reader import arrow_buffer
from qlip.archive.dataset.schema import DatasetInfo, Views, arrow_schema
from qlip.archive.tokenize.crops import Pixels, ViewMaker
from qlip.archive.tokenize.inputs import InputShard
from qlip.archive.tokenize.url_list import UnreachableError
from qlip.data.sources.base import CaptionedImages, RawSample, printable
from qlip.data.storage.retry import DeniedError, StorageError
from qlip.errors import QLIPError, require
from qlip.files import encodable
from qlip.modeling.processor import Preprocessing

AHEAD = 32
"""Images that are prefetched from a store, or decoded by threads, ahead of time."""
WAITING = 8
"""Batches of views that may wait for others of their size."""
POSITION = "position"
"""Temporary column with the order of a shard's rows."""


@dataclass(frozen=True)
class Work:
    """Everything that a worker needs besides its shard; pickles small.

    Attributes:
        info: description of the dataset.
        model: folder or name of the model.
        preprocessing: of the model.
        tables: content of the entropy coder's file; None if tokens are stored raw.
        key_column: field of an image's record that is its key; None takes the source's.
    """

    info: DatasetInfo
    model: str
    preprocessing: Preprocessing
    tables: bytes | None = None
    key_column: str | None = None


@dataclass(frozen=True)
class Row:
    """Columns of a view's row besides its tokens."""

    position: int
    key: str
    view: int
    original_size: tuple[int, int]
    captions: tuple[str, ...]
    label: str | None
    extra: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class ReadyBatch:
    """Views of one size, ready for the model.

    Attributes:
        number: index of the batch in its shard, from 0.
        pixels: uint8 (B, H, W, 3).
        rows: B rows.
    """

    number: int
    pixels: Any
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class ShardEnd:
    """End of a shard's batches.

    Attributes:
        batches: number of batches.
        inputs: number of images in the shard.
        errors: images that are in no batch.
        text_faults: why captions, labels or columns of images were left out, empty or repaired.
    """

    batches: int
    inputs: int
    errors: tuple[SkippedImage, ...]
    text_faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Image:
    row: Row
    views: list[Pixels]
    text_fault: str | None


def batches_of(shard: InputShard, work: Work, threads: int = 1) -> Iterator[ReadyBatch | ShardEnd]:
    """Read, decode and resize a shard's images.

    Args:
        shard: to read.
        work: preprocessing, views and batch size.
        threads: that decode ahead; the result does not depend on their number.

    Yields:
        batches, then one `ShardEnd`.

    Raises:
        QLIPError: the shard as a whole cannot be read. A single image that cannot be read is in `errors`.
        DeniedError: access to an image is denied, as a rule to all others too.
    """
    maker, size = ViewMaker(work.preprocessing, work.info.views), work.info.batch_size
    errors: list[SkippedImage] = []
    text_faults: list[str] = []
    waiting: OrderedDict[tuple[int, ...], list[tuple[Row, Pixels]]] = OrderedDict()
    number = inputs = 0
    unreachable = dict[str, str]()
    with shard.opened() as (images, positions):
        for found in _read_images(images, positions, shard, maker, work, threads, unreachable):
            inputs += 1
            if isinstance(found, SkippedImage):
                errors.append(found)
                continue
            text_faults += [] if found.text_fault is None else [found.text_fault]
            for view, pixels in enumerate(found.views):
                group = waiting.setdefault(pixels.shape, [])
                group.append((_of_view(found.row, view), pixels))
                if len(group) == size:
                    yield _batch(number, waiting.pop(pixels.shape))
                    number += 1
                elif (
                    sum(map(len, waiting.values())) > WAITING * size
                ):  # many sizes: the oldest views are encoded without others
                    yield _batch(number, waiting.popitem(last=False)[1])
                    number += 1
    if unreachable and len(unreachable) == inputs and shard.retried is None:
        first = next(iter(unreachable.values()))
        raise QLIPError(
            f"{shard.name}: none of its {inputs:,} images can be fetched ({first}); check the network and the"
            " credentials, then start again"
        )
    for group in waiting.values():
        yield _batch(number, group)
        number += 1
    yield ShardEnd(number, inputs, tuple(errors), tuple(text_faults))


def _batch(number: int, group: Sequence[tuple[Row, Pixels]]) -> ReadyBatch:
    return ReadyBatch(number, np.stack([pixels for _, pixels in group]), tuple(row for row, _ in group))


def _of_view(row: Row, view: int) -> Row:
    return row if view == 0 else replace(row, view=view)


def _read_images(
    images: CaptionedImages,
    positions: Sequence[int],
    shard: InputShard,
    maker: ViewMaker,
    work: Work,
    threads: int,
    unreachable: dict[str, str],
) -> Iterator[_Image | SkippedImage]:
    """Read images in this thread and decode them in others; yields in order."""

    def decode(position: int, raw: RawSample) -> _Image | SkippedImage:
        try:
            image = maker.preprocessing.load(raw.image)
            views = maker(image)
        except QLIPError as error:
            return SkippedImage(key=raw.key, reason=_reason(error, raw.key, f"{len(raw.image)} bytes"))
        texts: tuple[tuple[str, ...], str | None] = (raw.captions, raw.label) if work.info.captions else ((), None)
        fault = raw.text_fault if work.info.captions else None
        names = work.info.columns or ()
        absent = [one for one in (work.key_column, *names) if one is not None and one not in raw.record]
        if absent and fault is None:
            found = ", ".join(map(repr, sorted(raw.record)[:8])) or "no field"
            fault = f"{raw.key}: field {absent[0]!r} is empty or absent; it has {found}"
        extra = tuple(text_of_field(raw.record.get(name)) for name in names)
        key = raw.key if work.key_column is None else text_of_field(raw.record.get(work.key_column)) or raw.key
        return _Image(Row(position, key, 0, image.size, *texts, extra), views, fault and printable(fault))

    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode") if threads > 1 else None
    pending: deque[Future[_Image | SkippedImage]] = deque()
    ahead = 2 * threads if maker.views.fit == "tiles" else AHEAD  # tiles are as large as their image
    try:
        for place, position in enumerate(positions):
            if images.remote and place % AHEAD == 0:
                images.prefetch(positions[place : place + 2 * AHEAD])
            found = _read(images, position, shard, unreachable)
            if pool is None:
                yield found if isinstance(found, SkippedImage) else decode(position, found)
                continue
            if isinstance(found, SkippedImage):
                done: Future[_Image | SkippedImage] = Future()
                done.set_result(found)
                pending.append(done)
            else:
                pending.append(pool.submit(decode, position, found))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)


def text_of_field(value: object) -> str | None:
    """Return a field of a record as text: dates as in ISO 8601, lists and objects as JSON, NaN and None as None."""
    if value is None or value != value:
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return f"{value:f}"
    nested = isinstance(value, bool | list | tuple | dict)
    return encodable(json.dumps(value, ensure_ascii=False, default=text_of_field) if nested else str(value))


def _read(
    images: CaptionedImages, position: int, shard: InputShard, unreachable: dict[str, str]
) -> RawSample | SkippedImage:
    try:
        return images.read(position)
    except (StorageError, DeniedError):
        raise
    except QLIPError as error:
        key = images.key(position)
        skipped = SkippedImage(key=key, reason=_reason(error, key, shard.place))
        if isinstance(error, UnreachableError):
            unreachable[key] = str(error)
        return skipped


def _reason(error: QLIPError, key: str, place: str) -> str:
    """Return an error's reason without the place of the input, which differs between machines."""
    text = printable(" ".join(str(error).split())).removeprefix(printable(place)).lstrip(os.sep + ": ")
    return text.removeprefix(key).lstrip(": ")


def to_bytes(table: Any) -> bytes:
    """Write a table in Arrow's stream format."""
    arrow = require("pyarrow", extra="tables")
    sink = arrow.BufferOutputStream()
    with arrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def from_bytes(content: bytes) -> Any:
    """Read a table that `to_bytes` wrote."""
    return require("pyarrow", extra="tables").ipc.open_stream(arrow_buffer(content)).read_all()


def table_of(info: DatasetInfo, pieces: Sequence[Any], end: ShardEnd, shard: str) -> Any:
    """Join a shard's encoded batches to the part's table, in the order of images and views.

    Args:
        info: of the dataset.
        pieces: tables of the batches.
        end: of the shard.
        shard: name of the shard.

    Raises:
        QLIPError: images are missing or repeated: distinct keys and errors do not add up to the shard's images.
    """
    arrow = require("pyarrow", extra="tables")
    schema = arrow_schema(info)
    if pieces:
        table = arrow.concat_tables(pieces).combine_chunks()
        table = table.sort_by([(POSITION, "ascending"), ("view", "ascending")]).select(schema.names).cast(schema)
        table = table.combine_chunks()
    else:
        table = schema.empty_table()
    keys = len(table.column("key").unique())
    if keys + len(end.errors) != end.inputs or table.num_rows != _count_rows(table, keys, info.views):
        raise QLIPError(
            f"{shard}: {keys:,} keys, {table.num_rows:,} rows and {len(end.errors):,} skipped images do not add up to"
            f" its {end.inputs:,} images; two of them have the same key: rename one"
        )
    return table


def _count_rows(table: Any, keys: int, views: Views) -> int:
    """Count the rows that images should have: of tiles, by the sizes that their first rows name."""
    if views.count is not None:
        return keys * views.count
    firsts = table.filter(require("pyarrow.compute", extra="tables").equal(table.column("view"), 0))
    return sum(views.count_of((width, height)) for width, height in firsts.column("original_size").to_pylist())
