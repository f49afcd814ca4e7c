"""The `data` section of a recipe: weighted sources and how their images are used, strictly validated."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qlip.data.loader.stream import Blocks
from qlip.data.loader.transforms import Resample, TrainTransform
from qlip.data.public import open_named
from qlip.data.shards.shard_patterns import expand
from qlip.data.shards.streaming import StreamedShards, choose_cursors
from qlip.data.sources.base import CHECKED, CaptionedImages, check_captions
from qlip.data.sources.captions import load_templates
from qlip.data.sources.open import is_table, is_tars, open_path
from qlip.data.storage.retry import RetryPolicy
from qlip.data.storage.storage import Storage, is_remote
from qlip.errors import QLIPError
from qlip.modeling.processor import Preprocessing

Share = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=0)]


class SourceConfig(BaseModel):
    """One source, a public dataset by name or a path, and how its images are used.

    Attributes:
        name: a public dataset and split, such as ``cifar10:train``; either this or `path`.
        path: a folder of images, tar shards (with braces or a glob), or ``bundled``, the package's own images; tars
            and folders may be at any address that fsspec knows, such as ``s3://bucket/train-{000..999}.tar``.
        weight: share of the stream, relative to the other sources' weights.
        crop_scale: minimum and maximum share of the area that a random crop covers.
        crop_ratio: minimum and maximum aspect ratio (width over height) of a crop, relative to the target's.
        flip: probability of a left-right flip; use 0 for images with text or arrows. A flipped image draws from
            its captions that name no side; if all name one, it is not flipped.
        resample: filter of the resize.
        blur: probability of a random blur after the resize (`TrainTransform.filtered`).
        sharpen: probability of a random sharpening instead; at most 1 - `blur`.
        caption_field: JSON field or table column of the caption; by default ``caption`` and the list ``captions``.
        templates: a packaged list, such as ``cifar`` or ``imagenet``, or a text file: turns labels into captions for
            samples without captions.
        captions: False ignores all captions and labels, so that the images train reconstruction alone.
        index: folder of the tars' index files; beside the tars by default.
        order: ``shuffle``, one permutation of all samples per pass, or ``blocks``, for tars with expensive requests:
            blocks of consecutive samples in a random order, mixed within windows. By default ``blocks`` for parquet
            tables, which are read by row groups, and ``shuffle`` for all other sources.
        block_size, window: samples per block (256 by default; row groups are a table's blocks), blocks per window (4).
            Each worker that needs a sample of a block reads the whole block, so a window should be no larger than a
            rank's share of a batch. For a table, a worker caches the row groups of a window.
        streaming: read tars from front to back, so that they need no index; see `qlip.data.shards.streaming`.
        num_cursors: positions in the shards that streaming reads a batch from (at most 8 by default), each its equal
            part; best a multiple of the ranks. They divide the batch size. ``lanes`` in recipes of version 0.1.
        cursor_sets: sets of that many cursors between which batches take turns (at most 4 by default); best a multiple
            of the workers. All cursors together are at most as many as the shards. ``turns`` in version 0.1.
        shuffle_buffer: samples that streaming shuffles (2,048 by default), of all cursors together.
        replacement: streaming draws each next shard from all of them, so there are no passes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = None
    path: str | None = None
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    crop_scale: tuple[Share, Share] = (0.9, 1.0)
    crop_ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)
    flip: float = Field(default=0.0, ge=0, le=1)
    resample: Resample = "bicubic"
    blur: float = Field(default=0.0, ge=0, le=1)
    sharpen: float = Field(default=0.0, ge=0, le=1)
    caption_field: str | None = None
    templates: str | None = None
    captions: bool = True
    index: str | None = None
    order: Literal["shuffle", "blocks"] | None = None
    block_size: int | None = Field(default=None, ge=1)
    window: int | None = Field(default=None, ge=1)
    streaming: bool = False
    num_cursors: int | None = Field(default=None, ge=1)
    cursor_sets: int | None = Field(default=None, ge=1)
    shuffle_buffer: int | None = Field(default=None, ge=1)
    replacement: bool = False

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, values: Any) -> Any:
        """Rename keys of version 0.1, and set the default order, so that a resolved recipe names it."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for old, new in (("lanes", "num_cursors"), ("turns", "cursor_sets")):
            if old in values:
                if values.get(new) is not None:
                    raise ValueError(f"{old!r} is the old name of {new!r}; remove it")
                values[new] = values.pop(old)
        if values.get("order") is not None:
            return values
        path = values.get("path")
        return values if isinstance(path, str) and is_table(path) else values | {"order": "shuffle"}

    @model_validator(mode="after")
    def _consistent(self) -> SourceConfig:
        if (self.name is None) == (self.path is None):
            raise ValueError("give either 'name' (a public dataset, such as cifar10:train) or 'path', not both")
        for field, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high:
                raise ValueError(f"{field} [{low}, {high}] runs backwards; write [{high}, {low}]")
        if self.blur + self.sharpen > 1:
            raise ValueError(f"blur {self.blur} and sharpen {self.sharpen} exclude each other: together at most 1")
        if self.name is not None and self.caption_field is not None:
            raise ValueError("'caption_field' goes with 'path'; public datasets have fixed captions")
        if not self.captions and (self.templates or self.caption_field):
            raise ValueError("'captions: false' ignores all captions; remove 'templates' and 'caption_field'")
        self._refuse_unused_fields()
        return self

    def _refuse_unused_fields(self) -> None:
        tars = self.path is not None and is_tars(self.path)
        rules = (
            ("index", tars and not self.streaming, "the path of tars that are not streamed"),
            ("streaming", tars, "the path of tars"),
            ("block_size", self.order == "blocks" and not self._is_table, "'order: blocks' of tars"),
            ("window", self.order == "blocks" or (self._is_table and self.order is None), "'order: blocks'"),
            ("num_cursors", self.streaming, "'streaming: true'"),
            ("cursor_sets", self.streaming, "'streaming: true'"),
            ("shuffle_buffer", self.streaming, "'streaming: true'"),
            ("replacement", self.streaming, "'streaming: true'"),
        )
        for field, read, partner in rules:
            if getattr(self, field) and not read:
                raise ValueError(f"{field!r} goes with {partner}; remove it")
        if self.order == "blocks" and (self.streaming or not (self.name is not None or tars or self._is_table)):
            raise ValueError("'order: blocks' goes with tars that are not streamed, and tables; remove it")

    @property
    def _is_table(self) -> bool:
        return self.path is not None and is_table(self.path)

    @property
    def blocks(self) -> Blocks | None:
        """Blocks of `order: blocks`, chosen or by default; None for `shuffle`."""
        if self._is_table and self.order is None or self.order == "blocks":
            return Blocks(None if self._is_table else self.block_size or 256, self.window or 4)
        return None

    @property
    def all_templates(self) -> tuple[str, ...]:
        """The templates as a list."""
        return load_templates(self.templates) if self.templates else ()

    def transform(self, preprocessing: Preprocessing) -> TrainTransform:
        """Augmentation of its images, to the size and normalisation of a model's preprocessing."""
        return TrainTransform(
            preprocessing.size,
            self.crop_scale,
            self.crop_ratio,
            self.flip,
            self.resample,
            preprocessing.mean,
            preprocessing.std,
            self.blur,
            self.sharpen,
        )

    def open(self, retry: RetryPolicy | None = None) -> CaptionedImages:
        """Open the images for random access.

        Raises:
            QLIPError: the dataset is not in the cache, or the path does not exist or cannot be read.
        """
        if self.streaming:
            raise QLIPError(f"{self.path}: is streamed, without random access; use open_feed")
        if self.name is not None:
            return open_named(self.name)
        assert self.path is not None
        size, window = (None, None) if self.blocks is None else (self.blocks.size, self.blocks.window)
        return open_path(self.path, self.caption_field, index=self.index, retry=retry, block_size=size, window=window)

    def open_streamed(self, seed: int, batch_size: int, retry: RetryPolicy | None = None) -> StreamedShards:
        """Open the tars to be streamed from front to back.

        Raises:
            QLIPError: nothing matches, the first shard is not there, or the cursors do not fit the batch or the shards.
        """
        assert self.streaming and self.path is not None
        storage = Storage(retry)
        shards = tuple(expand(self.path, storage))
        storage.size(shards[0])  # a wrong address or no permission is an error, not a skipped sample
        cursors = choose_cursors(
            self.num_cursors, self.cursor_sets, len(shards), batch_size, self.replacement, self.path
        )
        buffer = self.shuffle_buffer or 2048
        field = self.caption_field
        streamed = StreamedShards(
            self.path, shards, seed, *cursors, buffer, storage, self.replacement, field, self.captions
        )
        if field is not None:
            first = list(streamed.first(CHECKED))
            check_captions(first.__getitem__, len(first))
        return streamed


class DataConfig(BaseModel):
    """Sources and loader settings.

    Attributes:
        sources: at least one.
        num_workers: number of decoding processes; 0 decodes in the training process.
        prefetch: batches that each worker prefetches.
        store: retries of requests to remote storage; only with a remote source.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: list[SourceConfig] = Field(min_length=1)
    num_workers: int = Field(default=1, ge=0)
    prefetch: int = Field(default=4, ge=1)
    store: RetryPolicy | None = None

    @model_validator(mode="after")
    def _store_is_used(self) -> DataConfig:
        if self.store is not None and not any(source.path and is_remote(source.path) for source in self.sources):
            raise ValueError("'store' goes with sources of an address such as s3://; remove it")
        return self
