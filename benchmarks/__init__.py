"""Speed and memory against the reference points, runnable: ``python -m benchmarks.tokenizer``."""
