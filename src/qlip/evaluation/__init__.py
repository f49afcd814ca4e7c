"""Measuring a tokenizer: metrics over pairs that one pass makes, and results that say what they are of."""

from qlip.evaluation.metrics.pixel import psnr, ssim
from qlip.evaluation.run.datasets import open_evaluation

__all__ = ["open_evaluation", "psnr", "ssim"]
