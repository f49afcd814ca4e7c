"""Token datasets: images by the million as tokens in Parquet files.

`tokenize/` makes a dataset from images, part by part, on one machine or on Ray. `dataset/` is its format and its
readers: `TokenDataset` by row, `TokenFeed` and `TokenStream` in batches for training. `manage/` verifies, merges,
splits, decodes and shares datasets, `search/` finds images by the embeddings stored beside the tokens.
"""

from qlip.archive.dataset.dataset import Row, TokenDataset
from qlip.archive.dataset.labelled import LabelledTokens
from qlip.archive.dataset.schema import DatasetInfo
from qlip.archive.dataset.stream import TokenBatch, TokenFeed, TokenStream

__all__ = [
    "DatasetInfo",
    "LabelledTokens",
    "Row",
    "TokenBatch",
    "TokenDataset",
    "TokenFeed",
    "TokenStream",
]
