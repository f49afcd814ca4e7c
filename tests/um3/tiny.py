"""Tiny UM3s with random weights, and random documents of text and images."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from qlip.lm.causal_config import CausalConfig
from qlip.um3.config import UM3Config
from qlip.um3.model import UM3
from qlip.um3.sequence import image_ids

BEGIN, END = 5, 6
DECODER = {"num_key_value_heads": 2, "qk_norm": True, "eos_token_id": 2, "max_position_embeddings": 128}


def text_config(**changes: Any) -> CausalConfig:
    """Sizes of a text decoder of 40 ids."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    return CausalConfig(**{**sizes, "intermediate_size": 24, **DECODER, **changes})  # type: ignore[arg-type]


def tiny_config(tied: bool = False, **changes: Any) -> UM3Config:
    """40 text rows and images of 2 x 3 tokens of 2 groups of 3 bits."""
    fields = {"begin_image": BEGIN, "end_image": END, "group_size": 3, "num_groups": 2, "grid": (2, 3)}
    return UM3Config.extend(text_config(tie_word_embeddings=tied), **{**fields, **changes})


def tiny_um3(tied: bool = False, **changes: Any) -> UM3:
    """A model whose outputs differ at every position."""
    torch.manual_seed(0)
    model = UM3.from_scratch(tiny_config(tied, **changes))
    for one in model.parameters():
        torch.nn.init.normal_(one, std=0.3)
    return model.eval()


def random_indices(config: UM3Config, seed: int = 0, count: tuple[int, ...] = ()) -> Tensor:
    """Indices (..., N, K) of images."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1 << config.group_size, (*count, config.num_tokens, config.num_groups), generator=generator)


def document(config: UM3Config, parts: list[int | list[int]]) -> list[int]:
    """Ids of a document: a list is text, a number the seed of an image."""
    ids = list[int]()
    for part in parts:
        image = [] if isinstance(part, list) else image_ids(config, random_indices(config, part)).tolist()
        ids += part if isinstance(part, list) else [BEGIN, *image, END]
    return ids


def interleavings(config: UM3Config) -> st.SearchStrategy[list[int | list[int]]]:
    """Parts of any interleaving of text and images."""
    word = st.integers(0, config.text_vocab_size - 1).filter(lambda id_: id_ not in (BEGIN, END))
    return st.lists(st.one_of(st.lists(word, max_size=5), st.integers(0, 1000)), max_size=6)
