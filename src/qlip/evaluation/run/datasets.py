"""Datasets to evaluate on, by name, and a description of their preprocessing."""

from __future__ import annotations

from qlip.data.loader.eval_set import EvalSet
from qlip.data.loader.transforms import EvalTransform
from qlip.data.public import DATASETS, open_named
from qlip.data.sources.base import CaptionedImages
from qlip.data.sources.labelled import open_labelled
from qlip.data.sources.open import open_path
from qlip.errors import QLIPError
from qlip.modeling import Preprocessing, QLIPProcessor
from qlip.modeling.processor import PREPARATION_RULES, RESAMPLING


def open_evaluation(name: str, processor: QLIPProcessor, limit: int | None = None) -> EvalSet:
    """Open a dataset, preprocessed for a checkpoint.

    Args:
        name: a public set and split such as ``cifar10:test``, or a path to a folder or tar shards.
        processor: of the checkpoint that is measured.
        limit: number of images, drawn at random by `EvalSet`; None takes all.

    Raises:
        QLIPError: no such set or path.
    """
    return EvalSet(open_set(name), EvalTransform(processor.preprocessing), limit)


def open_set(name: str) -> CaptionedImages:
    """Open the images of a dataset by its name.

    Args:
        name: a public set and split such as ``cifar10:test``; a path to a folder, tar shards or another layout that
            `qlip.data.open_path` takes; or, with labels of one's own, ``PATH#CLASSES`` or ``PATH#CLASSES+LABELS`` where
            classes are ``imagenet`` or a text file, and labels a text file of one an image.

    Raises:
        QLIPError: no such set or path, or it is not in the cache.
    """
    if not isinstance(name, str):
        raise QLIPError(f"{str(name)[:70]!r}: give the name or the path of a dataset, not {type(name).__name__}")
    if name.partition(":")[0] in DATASETS:
        return open_named(name)
    path, mark, how = name.rpartition("#")
    if not mark:
        return open_path(name)
    classes, _, labels = how.partition("+")
    return open_labelled(path, classes or None, labels or None)


def preparation(preprocessing: Preprocessing) -> str:
    """Size, filter, crop and version of the rules in words, as they stand in a result."""
    height, width = preprocessing.size
    crop = "centre crop" if preprocessing.shortest_edge is not None else "no crop"
    colours = "" if preprocessing.color_profiles == "convert" else ", colour profiles ignored"
    filter_name = RESAMPLING[preprocessing.resample].name.lower()
    return f"{width}x{height}, {filter_name}, {crop}{colours}, rules {PREPARATION_RULES}"
