"""The data part of a recipe: sources with weights and what is done to each, checked strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qlip import assets
from qlip.data.captions import load_templates
from qlip.data.datasets import open_named
from qlip.data.folder import FolderImages
from qlip.data.sources import CaptionedImages
from qlip.data.stream import Source, Tokenize, TrainingStream
from qlip.data.tars import TarImages
from qlip.data.transforms import Resample, TrainTransform
from qlip.errors import QLIPError

Share = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=0)]


class SourceConfig(BaseModel):
    """One source: a public set by name, or a path, and how its pictures are used.

    Attributes:
        name: a set and split of the registry, such as ``cifar10:train``; this or `path`.
        path: a folder of pictures, tar shards (a path, with braces or a glob), or ``bundled``, the package's own.
        weight: its share of the stream, on the scale of the other sources' weights.
        crop_scale: least and largest share of the area that a random crop covers.
        crop_ratio: least and largest width over height of a crop, relative to the target's.
        flip: chance of a left-right flip; pictures with text or arrows want 0.
        resample: filter of the resize.
        caption_field: json field or table column; by default ``caption`` and the list ``captions``.
        templates: ``cifar``, ``imagenet`` or a text file: makes captions from labels where there is none.
        captions: False ignores all words, so that the pictures train reconstruction alone.
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
        return self

    def open(self) -> CaptionedImages:
        """The pictures.

        Raises:
            QLIPError: the set is not in the cache, the path is not there, or what is there cannot be used.
        """
        if self.name is not None:
            return open_named(self.name)
        assert self.path is not None
        return open_path(self.path, self.caption_field)


class DataConfig(BaseModel):
    """Sources and loading.

    Attributes:
        sources: at least one.
        broken_limit: how many broken samples a run skips before it stops with an error.
        num_workers: decoding processes; 0 decodes in the training process.
        prefetch: batches that a worker keeps ready.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: list[SourceConfig] = Field(min_length=1)
    broken_limit: int = Field(default=100, ge=0)
    num_workers: int = Field(default=1, ge=0)
    prefetch: int = Field(default=4, ge=1)


def open_path(path: str, caption_field: str | None = None) -> CaptionedImages:
    """A folder of pictures, or tar shards (braces, globs) where it ends in ``.tar``; named by the path.

    ``bundled`` is the package's own eighteen pictures, captioned and labelled, whatever folder one starts from.
    """
    if path == "bundled":
        return FolderImages(assets.path("pictures"), caption_field, name=path)
    if path.endswith((".tar", ".tar}")):
        return TarImages(path, caption_field, name=path)
    if Path(path).is_file():
        raise QLIPError(f"{path}: neither a folder nor a .tar file; give a folder of pictures or tar shards")
    return FolderImages(path, caption_field, name=path)


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
        tokenize: see `qlip.data.stream.Tokenize`.
    """
    sources = []
    for one in config.sources:
        transform = TrainTransform(size, one.crop_scale, one.crop_ratio, one.flip, one.resample, mean, std)
        templates = load_templates(one.templates) if one.templates else ()
        sources.append(Source(one.open(), transform, one.weight, templates, one.captions))
    return TrainingStream(sources, seed, tokenize)
