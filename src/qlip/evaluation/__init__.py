"""Measuring a tokenizer: metrics over pairs that one pass makes, and results that say what they are of."""

from qlip.evaluation.metrics import psnr, ssim
from qlip.evaluation.protocol import open_evaluation

__all__ = ["open_evaluation", "psnr", "ssim"]
