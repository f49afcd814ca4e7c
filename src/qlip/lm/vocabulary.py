"""Vocabulary of a small text decoder: byte-level BPE, trained on the texts of its data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qlip.lm.tokenizer import LLMTokenizer

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>"}
"""Names of the special tokens, as ``tokenizer_config.json`` has them."""


def train_tokenizer(texts: Iterable[str], size: int, special: Sequence[str] = ()) -> LLMTokenizer:
    """Train a tokenizer that encodes any text and decodes to it again.

    Args:
        texts: to learn from.
        size: most ids, with 256 bytes, two special ones and `special`.
        special: names of further special tokens, whose ids follow; no text has them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*SPECIAL.values(), *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return LLMTokenizer(tokenizer.to_str(), SPECIAL, "the vocabulary of the data")
