"""QLIP: a visual tokenizer aligned with text."""

__version__ = "0.1.0"
