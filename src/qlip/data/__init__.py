"""Captioned images: where they lie, in which order they come, and what is made of them."""

from qlip.data.captions import draw_caption, load_templates, match_id
from qlip.data.evalset import EvalBatch, EvalSet
from qlip.data.folder import FolderImages
from qlip.data.sources import CaptionedImages, RawSample
from qlip.data.stream import Batch, BrokenSample, RawBatch, Source, TrainingStream, batches, raw_batches
from qlip.data.tars import TarImages
from qlip.data.transforms import EvalTransform, TrainTransform

__all__ = [
    "Batch",
    "BrokenSample",
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
