"""Small tokenizers built like those of known language models, with the control tokens of all templates."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qlip.lm.tokenizer import CONTROL_TOKENS, LLMTokenizer
from qlip.vlm.templates import VICUNA_SYSTEM

TEXTS = [
    VICUNA_SYSTEM,
    "USER: What colour is the circle? ASSISTANT: It is red. USER: and the square\n ASSISTANT: dark blue",
    "user\nassistant\nmodel\nsystem\nHow many shapes are there?\n\nTwo.",
]
_SPLIT = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
FAMILIES = ("smollm2", "llama2", "vicuna", "llama3", "gemma")


@cache
def made(family: str) -> LLMTokenizer:
    """The tokenizer of a family.

    Args:
        family: smollm2 (bytes, adds no BOS, pad = end = <|im_end|>), llama2 (a space before text behind every control
            token), vicuna (a space before the first word), llama3 (bytes, BOS), gemma (spaces as words, BOS).
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=family in ("llama2", "vicuna", "gemma"), unk_token=None))
    bos, eos, pad = {
        "smollm2": ("<|im_start|>", "<|im_end|>", "<|im_end|>"),
        "llama3": ("<|begin_of_text|>", "<|eot_id|>", None),
        "gemma": ("<bos>", "<eos>", "<pad>"),
    }.get(family, ("<s>", "</s>", None))
    special = [bos, eos, *([pad] if pad else []), *sorted(CONTROL_TOKENS)]
    special = list(dict.fromkeys(special))
    alphabet = []
    if family in ("smollm2", "llama3"):
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family == "smollm2")
        tokenizer.pre_tokenizer = byte_level  # type: ignore[assignment]
        if family == "llama3":
            split = pre_tokenizers.Split(_SPLIT, "isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # type: ignore[assignment]
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")  # type: ignore[assignment]
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # type: ignore[assignment]
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    values = json.loads(tokenizer.to_str())
    names = set(special[: -256 or None] if family not in ("smollm2", "llama3") else special)
    values["added_tokens"] = [one for one in values["added_tokens"] if one["content"] in names]
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if family in ("llama2", "gemma"):
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        steps = [{"type": "Prepend", "prepend": "▁"}, spaces] if family == "llama2" else [spaces]
        values["normalizer"] = {"type": "Sequence", "normalizers": steps}
        values["pre_tokenizer"] = None
    elif family == "vicuna":
        values["normalizer"] = None
        values["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    if family in ("llama2", "vicuna", "gemma"):
        steps = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, *([] if family == "gemma" else [strip])]
        values["decoder"] = {"type": "Sequence", "decoders": steps}
    whole = Tokenizer.from_str(json.dumps(values))
    if family != "smollm2":
        whole.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{bos} $A", special_tokens=[(bos, whole.token_to_id(bos))]
        )
    whole.enable_truncation(24)  # as some folders have
    config: dict[str, Any] = {"bos_token": bos, "eos_token": AddedTokenJSON(eos), "pad_token": pad}
    return LLMTokenizer(whole.to_str(), config, family)


def AddedTokenJSON(content: str) -> dict[str, Any]:
    """A token as some ``tokenizer_config.json`` write it."""
    return {"__type": "AddedToken", "content": content, "special": AddedToken(content, special=True).special}
