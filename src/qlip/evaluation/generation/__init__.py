"""Measuring what generators make, for the parts that generate: images against sets, images and captions."""

from qlip.evaluation.generation.clip_score import clip_score
from qlip.evaluation.generation.images import generated_result, measure_generated, statistics_of

__all__ = [
    "clip_score",
    "generated_result",
    "measure_generated",
    "statistics_of",
]
