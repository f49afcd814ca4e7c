"""The work itself, as plain functions of a shard: images to batches of pixels, batches to rows of a table.

Which images share a batch depends on the shard, the views and the batch size alone, never on who does the work: so a
part that is made again is made of the same bytes.

Shapes: B views of H x W pixels.
"""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlip.archive.dataset.layout import SkippedImage
from qlip.archive.dataset.schema import DatasetInfo, Views, arrow_schema
from qlip.archive.tokenize.crops import Pixels, ViewMaker
from qlip.archive.tokenize.inputs import InputShard
from qlip.archive.tokenize.url_list import UnreachableError
from qlip.data.sources.base import CaptionedImages, RawSample
from qlip.data.storage.retry import DeniedError, StorageError
from qlip.errors import QLIPError, require
from qlip.modeling.images import load_image
from qlip.modeling.processor import Preprocessing

AHEAD = 32
"""Images that are announced to a store, or decoded by threads, before they are needed."""
WAITING = 8
"""Batches' worth of views that may wait for company of their size."""
POSITION = "position"
"""Column that puts a shard's rows in order, and is then left out."""


@dataclass(frozen=True)
class Work:
    """All that a worker needs to know besides its shard; pickles small.

    Attributes:
        info: of the dataset.
        model: folder or name of the model.
        preprocessing: the model's.
        tables: content of the entropy coder's file, where tokens are coded.
    """

    info: DatasetInfo
    model: str
    preprocessing: Preprocessing
    tables: bytes | None = None


@dataclass(frozen=True)
class Row:
    """What a view's row says besides its tokens."""

    position: int
    key: str
    view: int
    original_size: tuple[int, int]
    captions: tuple[str, ...]
    label: str | None


@dataclass(frozen=True)
class ReadyBatch:
    """Views of one size, ready for the model.

    Attributes:
        number: batches of a shard are counted from 0 on.
        pixels: uint8 (B, H, W, 3).
        rows: B of them.
    """

    number: int
    pixels: Any
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class ShardEnd:
    """What comes after a shard's batches.

    Attributes:
        batches: how many they were.
        inputs: images of the shard.
        errors: those that are in no batch.
    """

    batches: int
    inputs: int
    errors: tuple[SkippedImage, ...]


@dataclass(frozen=True)
class _Picture:
    row: Row
    views: list[Pixels]


def batches_of(shard: InputShard, work: Work, threads: int = 1) -> Iterator[ReadyBatch | ShardEnd]:
    """Read, decode and fit a shard's images.

    Args:
        shard: to read.
        work: says how.
        threads: that decode ahead; the result is the same with any number.

    Yields:
        batches, then one `ShardEnd`.

    Raises:
        QLIPError: the shard as a whole cannot be read. A single image that cannot is an entry of `errors`.
        DeniedError: an image may not be read; the next ones and other shards' may not either, as a rule.
    """
    maker, size = ViewMaker(work.preprocessing, work.info.views), work.info.batch_size
    errors: list[SkippedImage] = []
    waiting: OrderedDict[tuple[int, ...], list[tuple[Row, Pixels]]] = OrderedDict()
    number = inputs = 0
    unreachable = dict[str, str]()
    with shard.opened() as (images, positions):
        for found in _pictures(images, positions, shard, maker, work.info.captions, threads, unreachable):
            inputs += 1
            if isinstance(found, SkippedImage):
                errors.append(found)
                continue
            for view, pixels in enumerate(found.views):
                company = waiting.setdefault(pixels.shape, [])
                company.append((_of_view(found.row, view), pixels))
                if len(company) == size:
                    yield _batch(number, waiting.pop(pixels.shape))
                    number += 1
                elif sum(map(len, waiting.values())) > WAITING * size:  # many sizes: the oldest goes alone
                    yield _batch(number, waiting.popitem(last=False)[1])
                    number += 1
    if unreachable and len(unreachable) == inputs:
        first = next(iter(unreachable.values()))
        raise QLIPError(
            f"{shard.name}: not one of its {inputs:,} pictures can be fetched ({first}); see to the network and the"
            " credentials, then start again"
        )
    for company in waiting.values():
        yield _batch(number, company)
        number += 1
    yield ShardEnd(number, inputs, tuple(errors))


def _batch(number: int, company: Sequence[tuple[Row, Pixels]]) -> ReadyBatch:
    return ReadyBatch(number, np.stack([pixels for _, pixels in company]), tuple(row for row, _ in company))


def _of_view(row: Row, view: int) -> Row:
    return row if view == 0 else Row(row.position, row.key, view, row.original_size, row.captions, row.label)


def _pictures(
    images: CaptionedImages,
    positions: range,
    shard: InputShard,
    maker: ViewMaker,
    captions: bool,
    threads: int,
    unreachable: dict[str, str],
) -> Iterator[_Picture | SkippedImage]:
    """In order; reading is this thread's, decoding goes on in others."""

    def decode(position: int, raw: RawSample) -> _Picture | SkippedImage:
        try:
            image = load_image(raw.image)
            views = maker(image)
        except QLIPError as error:
            return SkippedImage(key=raw.key, reason=_reason(error, raw.key, f"{len(raw.image)} bytes"))
        words: tuple[tuple[str, ...], str | None] = (raw.captions, raw.label) if captions else ((), None)
        return _Picture(Row(position, raw.key, 0, image.size, *words), views)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode") if threads > 1 else None
    under_way: deque[Future[_Picture | SkippedImage]] = deque()
    ahead = 2 * threads if maker.views.fit == "tiles" else AHEAD  # tiles are as large as their image
    try:
        for position in positions:
            if images.remote and (position - positions.start) % AHEAD == 0:
                images.prefetch(range(position, min(position + 2 * AHEAD, positions.stop)))
            found = _read(images, position, shard, unreachable)
            if pool is None:
                yield found if isinstance(found, SkippedImage) else decode(position, found)
                continue
            if isinstance(found, SkippedImage):
                done: Future[_Picture | SkippedImage] = Future()
                done.set_result(found)
                under_way.append(done)
            else:
                under_way.append(pool.submit(decode, position, found))
            if len(under_way) > ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)


def _read(
    images: CaptionedImages, position: int, shard: InputShard, unreachable: dict[str, str]
) -> RawSample | SkippedImage:
    try:
        return images.read(position)
    except (StorageError, DeniedError):
        raise
    except QLIPError as error:
        key = images.key(position)
        broken = SkippedImage(key=key, reason=_reason(error, key, shard.place))
        if isinstance(error, UnreachableError):
            unreachable[key] = str(error)
        return broken


def _reason(error: QLIPError, key: str, place: str) -> str:
    """What was wrong, without where the input lies: that is another place on another machine."""
    text = " ".join(str(error).split()).removeprefix(place).lstrip(os.sep + ": ")
    return text.removeprefix(key).lstrip(": ")


def to_bytes(table: Any) -> bytes:
    """A table in Arrow's stream format."""
    arrow = require("pyarrow", extra="tables")
    sink = arrow.BufferOutputStream()
    with arrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def of_bytes(content: bytes) -> Any:
    """The table that `to_bytes` wrote."""
    return require("pyarrow", extra="tables").ipc.open_stream(content).read_all()


def table_of(info: DatasetInfo, pieces: Sequence[Any], end: ShardEnd, shard: str) -> Any:
    """A part's table: the rows of its batches in the order of images and views.

    Args:
        info: of the dataset.
        pieces: what an encoder made of each batch.
        end: what the shard's reader said last.
        shard: its name.

    Raises:
        QLIPError: images are missing or double: distinct keys and errors are not the shard's images.
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
            f"{shard}: {keys:,} keys, {table.num_rows:,} rows and {len(end.errors):,} broken pictures do not add up to"
            f" its {end.inputs:,} pictures; two of them have one key: rename one"
        )
    return table


def _count_rows(table: Any, keys: int, views: Views) -> int:
    """Count the rows that images should have: of tiles, by the sizes that their first rows name."""
    if views.count is not None:
        return keys * views.count
    firsts = table.filter(require("pyarrow.compute", extra="tables").equal(table.column("view"), 0))
    return sum(views.count_of((width, height)) for width, height in firsts.column("original_size").to_pylist())
