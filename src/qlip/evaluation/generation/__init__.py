"""Metrics of generated images.

`measure_generated` compares them with stored statistics of real ones (gFID), which `statistics_of` makes; `clip_score`
scores images against their captions.
"""

from qlip.evaluation.generation.clip_score import clip_score
from qlip.evaluation.generation.images import (
    cached_statistics,
    check_images,
    generated_result,
    measure_generated,
    statistics_of,
)

__all__ = [
    "cached_statistics",
    "check_images",
    "clip_score",
    "generated_result",
    "measure_generated",
    "statistics_of",
]
