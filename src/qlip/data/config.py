"""The data part of a recipe: sources with weights and what is done to each, checked strictly."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qlip.data.loader.mixed_stream import StreamedSource
from qlip.data.loader.stream import Blocks, Source, Tokenize, TrainingStream
from qlip.data.loader.transforms import Resample, TrainTransform
from qlip.data.public import open_named
from qlip.data.shards.shard_patterns import expand
from qlip.data.shards.streaming import TarLanes, choose_lanes
from qlip.data.sources.base import CaptionedImages
from qlip.data.sources.captions import load_templates
from qlip.data.sources.open import is_table, is_tars, open_path
from qlip.data.storage.retry import RetryPolicy
from qlip.data.storage.storage import Storage, is_remote
from qlip.errors import QLIPError

Share = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=0)]


class SourceConfig(BaseModel):
    """One source: a public set by name, or a path, and how its images are used.

    Attributes:
        name: a set and split of the registry, such as ``cifar10:train``; this or `path`.
        path: a folder of images, tar shards (with braces or a glob), or ``bundled``, the package's own; tars and
            folders may lie at any address that fsspec knows, such as ``s3://bucket/train-{000..999}.tar``.
        weight: its share of the stream, on the scale of the other sources' weights.
        crop_scale: least and largest share of the area that a random crop covers.
        crop_ratio: least and largest width over height of a crop, relative to the target's.
        flip: chance of a left-right flip; images with text or arrows want 0.
        resample: filter of the resize.
        caption_field: json field or table column; by default ``caption`` and the list ``captions``.
        templates: ``cifar``, ``imagenet`` or a text file: makes captions from labels where there is none.
        captions: False ignores all words, so that the images train reconstruction alone.
        index: folder of the tars' index files (`qlip data index -o`); beside the tars by default.
        order: ``shuffle``, one permutation of all samples a pass, or ``blocks``, for tars of which a request is dear:
            blocks of consecutive samples in a random order, mixed within windows. By default ``blocks`` for parquet
            tables, which are read by row groups, and ``shuffle`` for everything else.
        block_size, window: samples a block (256 by default; of a table its row groups), blocks a window (4). Every
            worker that needs a sample of a block reads it whole, so a window should be no larger than a rank's share
            of a batch. Of a table it keeps a window's row groups.
        streaming: read tars from front to back, so that they need no index; see `qlip.data.shards.streaming`.
        lanes: of a batch (at most 8 by default); best a multiple of the ranks. They divide the batch.
        turns: sets of lanes that batches take turns with (at most 4); best a multiple of the workers. All lanes
            together are at most as many as the shards.
        shuffle_buffer: samples that streaming mixes (2,048), of all lanes together.
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
    caption_field: str | None = None
    templates: str | None = None
    captions: bool = True
    index: str | None = None
    order: Literal["shuffle", "blocks"] | None = None
    block_size: int | None = Field(default=None, ge=1)
    window: int | None = Field(default=None, ge=1)
    streaming: bool = False
    lanes: int | None = Field(default=None, ge=1)
    turns: int | None = Field(default=None, ge=1)
    shuffle_buffer: int | None = Field(default=None, ge=1)
    replacement: bool = False

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, values: Any) -> Any:
        """What is read in no order of its own is shuffled, and a resolved recipe says so, as those of before do."""
        if not isinstance(values, dict) or values.get("order") is not None:
            return values
        path = values.get("path")
        return values if isinstance(path, str) and is_table(path) else values | {"order": "shuffle"}

    @model_validator(mode="after")
    def _consistent(self) -> SourceConfig:
        if (self.name is None) == (self.path is None):
            raise ValueError("give either 'name' (a public set, such as cifar10:train) or 'path', not both")
        for field, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high:
                raise ValueError(f"{field} [{low}, {high}] runs backwards; write [{high}, {low}]")
        if self.name is not None and self.caption_field is not None:
            raise ValueError("'caption_field' goes with 'path'; a public set knows its own captions")
        if not self.captions and (self.templates or self.caption_field):
            raise ValueError("'captions: false' ignores all words; remove 'templates' and 'caption_field'")
        self._refuse_what_nothing_reads()
        return self

    def _refuse_what_nothing_reads(self) -> None:
        tars = self.path is not None and is_tars(self.path)
        rules = (
            ("index", tars and not self.streaming, "the path of tars that are not streamed"),
            ("streaming", tars, "the path of tars"),
            ("block_size", self.order == "blocks" and not self._is_table, "'order: blocks' of tars"),
            ("window", self.order == "blocks" or (self._is_table and self.order is None), "'order: blocks'"),
            ("lanes", self.streaming, "'streaming: true'"),
            ("turns", self.streaming, "'streaming: true'"),
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
        """The order of blocks, if that was asked for, or is what the source is best read in."""
        if self._is_table and self.order is None or self.order == "blocks":
            return Blocks(None if self._is_table else self.block_size or 256, self.window or 4)
        return None

    @property
    def all_templates(self) -> tuple[str, ...]:
        """The templates, read."""
        return load_templates(self.templates) if self.templates else ()

    def transform(self, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> TrainTransform:
        """How its images are augmented."""
        return TrainTransform(size, self.crop_scale, self.crop_ratio, self.flip, self.resample, mean, std)

    def open(self, retry: RetryPolicy | None = None) -> CaptionedImages:
        """The images, to be read in any order.

        Raises:
            QLIPError: the set is not in the cache, the path is not there, or what is there cannot be used.
        """
        if self.streaming:
            raise QLIPError(f"{self.path}: is streamed, so its samples cannot be counted or sought; use open_feed")
        if self.name is not None:
            return open_named(self.name)
        assert self.path is not None
        size, window = (None, None) if self.blocks is None else (self.blocks.size, self.blocks.window)
        return open_path(self.path, self.caption_field, index=self.index, retry=retry, block_size=size, window=window)

    def open_lanes(self, seed: int, batch_size: int, retry: RetryPolicy | None = None) -> TarLanes:
        """The tars, to be read from front to back.

        Raises:
            QLIPError: nothing matches, the first shard is not there, or the lanes do not fit the batch or the shards.
        """
        assert self.streaming and self.path is not None
        storage = Storage(retry)
        shards = tuple(expand(self.path, storage))
        storage.size(shards[0])  # a wrong address or no permission is no broken sample
        lanes, turns = choose_lanes(self.lanes, self.turns, len(shards), batch_size, self.replacement, self.path)
        buffer = self.shuffle_buffer or 2048
        return TarLanes(self.path, shards, seed, lanes, turns, buffer, storage, self.replacement, self.caption_field)


class DataConfig(BaseModel):
    """Sources and loading.

    Attributes:
        sources: at least one.
        broken_limit: how many broken samples a run skips before it stops with an error.
        num_workers: decoding processes; 0 decodes in the training process.
        prefetch: batches that a worker keeps ready.
        store: retries of stores that fail; only where a source lies in one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: list[SourceConfig] = Field(min_length=1)
    broken_limit: int = Field(default=100, ge=0)
    num_workers: int = Field(default=1, ge=0)
    prefetch: int = Field(default=4, ge=1)
    store: RetryPolicy | None = None

    @model_validator(mode="after")
    def _some_store(self) -> DataConfig:
        if self.store is not None and not any(source.path and is_remote(source.path) for source in self.sources):
            raise ValueError("'store' goes with sources of an address such as s3://; remove it")
        return self


def open_stream(
    config: DataConfig,
    seed: int,
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    tokenize: Tokenize,
) -> TrainingStream:
    """The training stream that a recipe describes.

    Args:
        config: its data part.
        seed: of order, augmentation and captions.
        size: (height, width) of the pixels.
        mean, std: normalisation, as the model's processor has it.
        tokenize: see `qlip.data.loader.stream.Tokenize`.
    """
    sources = [_open_indexed(config, one, size, mean, std) for one in config.sources]
    return TrainingStream(sources, seed, tokenize)


def open_source(
    config: DataConfig,
    one: SourceConfig,
    seed: int,
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
) -> Source | StreamedSource:
    """One source of a recipe, streamed or not; see `open_stream` for the arguments."""
    if not one.streaming:
        return _open_indexed(config, one, size, mean, std)
    lanes = one.open_lanes(seed, batch_size, config.store)
    return StreamedSource(lanes, one.transform(size, mean, std), one.weight, one.all_templates, one.captions)


def _open_indexed(
    config: DataConfig, one: SourceConfig, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
) -> Source:
    transform = one.transform(size, mean, std)
    return Source(one.open(config.store), transform, one.weight, one.all_templates, one.captions, one.blocks)
