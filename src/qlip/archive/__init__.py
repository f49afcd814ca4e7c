"""Pictures by the million as tokens: bulk tokenising, token datasets, an index over them, search."""

from qlip.archive.dataset import Row, TokenDataset
from qlip.archive.schema import DatasetInfo
from qlip.archive.sequences import SequenceLayout, layout_for, text_to_image
from qlip.archive.stream import TokenBatch, TokenStream

__all__ = [
    "DatasetInfo",
    "Row",
    "SequenceLayout",
    "TokenBatch",
    "TokenDataset",
    "TokenStream",
    "layout_for",
    "text_to_image",
]
