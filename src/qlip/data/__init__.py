"""Captioned images: where they lie, in which order they come, and what is made of them."""

from qlip.data.loader.batch import Batch, RawBatch, SkippedSample
from qlip.data.loader.eval_set import EvalBatch, EvalSet
from qlip.data.loader.stream import Source, TrainingStream, batches, raw_batches
from qlip.data.loader.transforms import EvalTransform, TrainTransform
from qlip.data.sources.base import CaptionedImages, RawSample
from qlip.data.sources.captions import draw_caption, load_templates, match_id
from qlip.data.sources.folder import FolderImages
from qlip.data.sources.tars import TarImages

__all__ = [
    "Batch",
    "SkippedSample",
    "CaptionedImages",
    "EvalBatch",
    "EvalSet",
    "EvalTransform",
    "FolderImages",
    "RawBatch",
    "RawSample",
    "Source",
    "TarImages",
    "TrainTransform",
    "TrainingStream",
    "batches",
    "draw_caption",
    "load_templates",
    "match_id",
    "raw_batches",
]
