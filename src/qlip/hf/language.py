"""A folder of a text decoder, read to become the language model of a stock LLaVA."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from qlip.errors import QLIPError
from qlip.lm.tokenizer import chat_template_of, name_of
from qlip.modeling.checkpoint import Files, tensors_of
from qlip.vlm.conversations import IMAGE

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class Decoder:
    """A folder of a text decoder.

    Attributes:
        folder: its place.
        values: content of config.json.
        config: the same, read by transformers.
        tokenizer: with the image token.
        settings: content of tokenizer_config.json, and the special tokens.
        image_id: id of the image token.
        rows: ids that need a row of the embeddings.
    """

    folder: Path
    values: dict[str, Any]
    config: PretrainedConfig
    tokenizer: Tokenizer
    settings: dict[str, Any]
    image_id: int
    rows: int

    @classmethod
    def read(cls, folder: Path) -> Decoder:
        """Read config and tokenizer. Raises QLIPError if a file is absent, or the model is no text decoder."""
        values = json_of(folder / "config.json")
        if "model_type" not in values:  # transformers would guess it from the folder's name
            raise QLIPError(f"{folder}: has no config.json with a model_type; take the folder of a text decoder")
        try:
            config = AutoConfig.from_pretrained(folder)
        except (ValueError, KeyError, OSError) as error:
            said = str(error).splitlines()[0]
            raise QLIPError(f"{folder}: transformers cannot read its config.json: {said}") from None
        known = type(config) in AutoModelForCausalLM._model_mapping and hasattr(config, "vocab_size")
        if not known or config.is_encoder_decoder:
            raise QLIPError(
                f"{folder}: model type {values['model_type']!r} is no decoder of text; take the folder of a causal"
                " language model, such as Llama's or Qwen's"
            )
        if not (folder / "tokenizer.json").is_file():
            raise QLIPError(
                f"{folder}: has no tokenizer.json; save its tokenizer there with transformers' AutoTokenizer"
            )
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # noqa: BLE001  (tokenizers raises Exception itself)
            raise QLIPError(f"{folder}/tokenizer.json: not a tokenizer ({error}); save it again") from None
        tokenizer.no_truncation()  # an image is many tokens, which its limit would cut
        tokenizer.no_padding()
        tokenizer.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
        settings = json_of(folder / "special_tokens_map.json") | json_of(folder / "tokenizer_config.json")
        image_id = int(tokenizer.token_to_id(IMAGE) or 0)
        return cls(folder, values, config, tokenizer, settings, image_id, max(config.vocab_size, image_id + 1))

    def special_tokens(self) -> dict[str, str]:
        """Special tokens by role; padding is the end token if there is none: masks do not come from ids."""
        found: dict[str, str] = {}
        for role in SPECIAL:
            if (token := name_of(self.settings.get(role))) is not None:
                found[role] = token
        if "eos_token" in found:
            found.setdefault("pad_token", found["eos_token"])
        return found

    def chat_template(self) -> str | None:
        """Its template of turns, or None."""
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        return chat_template_of(self.settings)

    def text_config(self) -> dict[str, Any]:
        """``text_config``: its config.json with a row for the image token, in a form that both versions read."""
        values = {name: value for name, value in self.values.items() if name != "transformers_version"}
        values["vocab_size"] = self.rows
        rotary = values.get("rope_parameters")
        if isinstance(rotary, dict) and "rope_theta" in rotary:  # written by transformers 5; 4.57 reads other keys
            values.setdefault("rope_theta", rotary["rope_theta"])
            if rotary.get("rope_type", "default") != "default":
                scaling = {name: value for name, value in rotary.items() if name != "rope_theta"}
                values.setdefault("rope_scaling", scaling)
        return values

    @property
    def tied(self) -> bool:
        """True if the output layer is the table of embeddings."""
        return bool(self.config.tie_word_embeddings)

    def tensors(self) -> Iterator[dict[str, Tensor]]:
        """Yield the weights, file by file, under the names of LLaVA's parameters.

        Older names, which transformers' own folders keep, lose the output layer in version 5 with remote code. A new
        row for the image token is the mean of all rows, whose logit is never the largest.

        Raises:
            QLIPError: no safetensors, a broken file, or other tensors than transformers' class has.
        """
        with torch.device("meta"):
            stock = AutoModelForCausalLM.from_config(self.config)
        prefix, absent = stock.base_model_prefix + ".", {name: one.shape for name, one in stock.state_dict().items()}
        if self.tied:
            absent.pop("lm_head.weight", None)
        table = stock.get_input_embeddings().weight
        tables = {name for name, one in stock.named_parameters() if one is table} | {"lm_head.weight"}
        for path in self.files():
            found: dict[str, Tensor] = {}
            for name, stored, read_one in tensors_of(path):
                shape = absent.pop(name, None)
                if shape is None:
                    continue  # tables that older software stored, and a tied output layer
                if stored != shape:
                    raise QLIPError(
                        f"{path}: tensor {name!r} has shape {tuple(stored)}, config.json makes it {tuple(shape)}"
                    )
                tensor = read_one()
                if name in tables and self.rows > len(tensor):
                    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
                    tensor = torch.cat((tensor, mean.expand(self.rows - len(tensor), -1)))
                inner = name.removeprefix(prefix)
                found[name if inner == name else f"model.language_model.{inner}"] = tensor
            yield found
        if absent:
            raise QLIPError(f"{self.folder}: tensor {min(absent)!r} is missing, and {len(absent) - 1} more")

    def files(self) -> list[Path]:
        """Files of weights. Raises QLIPError if there are none, or an index names others."""
        files = Files(self.folder)
        if not any(map(files.path, ("model.safetensors", "model.safetensors.index.json"))):
            raise QLIPError(
                f"{self.folder}: has no model.safetensors; only safetensors are read, and transformers' save_pretrained"
                " writes them"
            )
        return files.weights()


def json_of(path: Path) -> dict[str, Any]:
    """Content of a file, empty if there is none. Raises QLIPError if it is not JSON of a dictionary."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise QLIPError(f"{path}: cannot be read ({error}); fetch it again") from None
    if not isinstance(values, dict):
        raise QLIPError(f"{path}: holds no settings by name; fetch it again")
    return values


def json_text(values: dict[str, Any]) -> str:
    """Text of a file of settings, in the order that transformers writes."""
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
