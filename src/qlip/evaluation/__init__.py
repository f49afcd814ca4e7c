"""Evaluate a tokenizer: metrics of reconstruction, classification, retrieval and codes, in verifiable results.

- `models`: an `EvalModel` is the model under evaluation; a `ModelBatch` holds its outputs on one batch.
- `metrics` are functions of tensors, `networks` the feature networks that some of them need.
- `evaluators`: an `Evaluator` turns batches into rows and rows into a `MetricResult`; a `RunOnce` runs once.
- `run`: `run_specs` evaluates a list of `EvalSpec`s with one resumable pass per dataset.
- `report`: a `Result` as JSON, tables, plots and a page. `generation` measures generated images, `prompt_suites` are
  benchmarks of text to image.
"""

from qlip.evaluation.metrics.pixel import psnr, ssim
from qlip.evaluation.run.datasets import open_evaluation

__all__ = ["open_evaluation", "psnr", "ssim"]
