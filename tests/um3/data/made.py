"""A tokenizer, a configuration, token datasets and files of documents, all small."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from qlip.lm.causal_config import CausalConfig
from qlip.lm.tokenizer import LLMTokenizer
from qlip.lm.vocabulary import train_tokenizer
from qlip.um3.config import UM3Config
from qlip.um3.data.documents import DocumentBuilder
from tests.archive import made as tokens

DECODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 512}
TEXTS = ["The cat sat on the mat.", "A dog ran; the cat did not.", "Rain fell on the hill all day.", "Yes."]


@cache
def tokenizer() -> LLMTokenizer:
    """A byte-level vocabulary of 300 ids."""
    return train_tokenizer(TEXTS, 300, ("<boi>", "<eoi>"))


def config(**changes: Any) -> UM3Config:
    """Images of 2 x 2 tokens of 4 groups of 7 bits, 16 ids each, as `dataset` has them."""
    own = tokenizer()
    text = CausalConfig.from_dict(DECODER | {"intermediate_size": 16, "vocab_size": own.size, "eos_token_id": own.eos})
    values = {
        "begin_image": own.token("<boi>"),
        "end_image": own.token("<eoi>"),
        "group_size": 7,
        "num_groups": 4,
        "grid": (2, 2),
        "vision_fingerprint": tokens.CODES,
    }
    return UM3Config.extend(text, **(values | changes))


def builder(**changes: Any) -> DocumentBuilder:
    """Makes documents of that configuration."""
    return DocumentBuilder(config(**changes), tokenizer())


def dataset(folder: Path, **changes: Any) -> str:
    """A token dataset of 15 images with captions; see `tests.archive.made.made`."""
    return tokens.made(folder, **({"group_size": 7, "embedding_dim": None} | changes)).address


def jsonl(path: Path, items: list[Any]) -> str:
    """Write values as lines; strings that begin with ! as they are, without it."""
    lines = [one[1:] if isinstance(one, str) and one.startswith("!") else json.dumps(one) for one in items]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)
