"""Images by the million as tokens: bulk tokenising, token datasets, an index over them, search."""

from qlip.archive.dataset.dataset import Row, TokenDataset
from qlip.archive.dataset.schema import DatasetInfo
from qlip.archive.dataset.sequences import CaptionedSequence, text_to_image
from qlip.archive.dataset.stream import TokenBatch, TokenFeed, TokenStream

__all__ = [
    "CaptionedSequence",
    "DatasetInfo",
    "Row",
    "TokenBatch",
    "TokenDataset",
    "TokenFeed",
    "TokenStream",
    "text_to_image",
]
