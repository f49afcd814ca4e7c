"""Text to image: a decoder over the tokenizer's tokens, as LlamaGen (arXiv 2406.06525).

`task` trains one on token datasets, with `recipe` and `data`; `sequences` pairs captions with ids for other trainers.
"""

from qlip.t2i.sequences import CaptionedSequence, text_to_image

__all__ = ["CaptionedSequence", "text_to_image"]
