"""Captioned images, from files to training batches.

`sources` reads samples (`CaptionedImages`) from folders, tars and tables through `storage` (disks and remote stores);
`shards` indexes tars, or streams them without an index; `public` fetches public datasets. `loader` puts samples in
order and makes batches of them (`TrainingStream`, `EvalSet`), behind `Feed`, which a trainer reads. `config` is the
data section of a recipe, and `image_feed` opens it.
"""

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
    "CaptionedImages",
    "EvalBatch",
    "EvalSet",
    "EvalTransform",
    "FolderImages",
    "RawBatch",
    "RawSample",
    "SkippedSample",
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
