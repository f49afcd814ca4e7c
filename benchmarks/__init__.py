"""Speed and memory compared with reference implementations; run them by ``python -m benchmarks.tokenizer``."""
