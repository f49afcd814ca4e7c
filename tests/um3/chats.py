"""A tiny UM3 of the bundled QLIP's images that can chat."""

from __future__ import annotations

from pathlib import Path

import torch

from qlip.lm.causal_config import CausalConfig
from qlip.lm.vocabulary import train_tokenizer
from qlip.modeling.processor import QLIPProcessor
from qlip.tokens.image_codec import ImageCodec
from qlip.um3.config import Rows, UM3Config
from qlip.um3.model import UM3

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def save_um3(folder: Path, length: int = 1200, rows: Rows = "shared", qk_norm: bool = True) -> Path:
    """Save a model with random weights that begins images often, its tokenizer and preprocessing."""
    codec = ImageCodec.from_pretrained("bundled", device="cpu")
    tokenizer = train_tokenizer(["a red circle above a blue square", "what colour is it?"] * 3, 300, ["<boi>", "<eoi>"])
    begin, end = tokenizer.token("<boi>"), tokenizer.token("<eoi>")
    text = CausalConfig(
        vocab_size=tokenizer.size, qk_norm=qk_norm, eos_token_id=tokenizer.eos, max_position_embeddings=length, **SIZES
    )
    model = codec.model
    config = UM3Config.extend(
        text,
        begin_image=begin,
        end_image=end,
        group_size=model.group_size,
        num_groups=model.num_bits // model.group_size,
        grid=model.grid,
        rows=rows,
        vision_tower="bundled",
        vision_fingerprint=model.code_fingerprint,
    )
    torch.manual_seed(0)
    um3 = UM3.from_scratch(config)
    for one in um3.parameters():
        torch.nn.init.normal_(one, std=0.3)
    with torch.no_grad():
        um3.decoder.output_weight[begin] *= 4
        um3.decoder.output_weight[tokenizer.eos] = -um3.decoder.output_weight[begin]
    um3.save_pretrained(folder)
    tokenizer.save(folder)
    QLIPProcessor(codec.processor.preprocessing).save_pretrained(folder)
    return folder
