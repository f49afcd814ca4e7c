"""Measuring a tokenizer: metrics over pairs that one pass makes, and results that say what they are of."""

from qlip.evaluation.metrics import psnr, ssim
from qlip.evaluation.protocol import Measurement, open_evaluation
from qlip.evaluation.reconstruction import measure_reconstruction
from qlip.evaluation.zero_shot import measure_classification

__all__ = [
    "Measurement",
    "measure_classification",
    "measure_reconstruction",
    "open_evaluation",
    "psnr",
    "ssim",
]
