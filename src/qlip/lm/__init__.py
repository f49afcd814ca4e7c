"""Language models over visual tokens.

`sequences.SequenceLayout` says how an image's indices (B, N, K) become the ids (B, S) that a decoder transformer reads
and writes, and how ids become indices again. The decoder itself, its cache and its heads belong here too. The package
knows `modeling` and `tokens`, but no files, datasets or training.
"""

from qlip.lm.sequences import GroupOrder, SequenceLayout

__all__ = ["GroupOrder", "SequenceLayout"]
