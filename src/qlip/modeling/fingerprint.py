"""Two fingerprints of a model: what makes its codes, and what rebuilds images from them.

Tokens of two models with the same code fingerprint may be compared, merged and indexed; the decoder fingerprint says
whose decoder rebuilds them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from qlip.modeling.model import QLIPModel

Side = Literal["codes", "decoder"]

_CODE_PREFIXES = ("vision_model.embeddings.", "vision_model.encoder.", "vision_model.quant_embed.")
_DECODER_PREFIXES = ("vision_model.quant_embed_post.", "vision_decoder.")

# training's own settings (entropy weights, temperature, grouping) change no code and no pixel
_CODE_KEYS = (
    "hidden_size num_hidden_layers num_attention_heads hidden_act layer_norm_eps subln swiglu image_size patch_size"
    " rope quantizer quantizer_l2_norm quantizer_embed_type"
).split()
_DECODER_KEYS = (
    "hidden_size num_hidden_layers num_attention_heads hidden_act layer_norm_eps subln swiglu image_size patch_size"
    " rope"
).split()


class Cache:
    """Remembers fingerprints until a weight changes."""

    def __init__(self) -> None:
        self._known: dict[Side, str] = {}
        self._state: tuple[Any, ...] = ()

    def get(self, model: QLIPModel, side: Side) -> str:
        """The fingerprint, computed at most once for one state of the weights."""
        state = tuple((id(parameter), parameter._version) for parameter in model.parameters())
        if state != self._state:
            self._known, self._state = {}, state
        if side not in self._known:
            self._known[side] = compute(model, side)
        return self._known[side]

    def carry(self, model: QLIPModel, known: dict[Side, str]) -> None:
        """Keep the stored weights' fingerprints for a model whose weights were cast on loading."""
        self._known = dict(known)
        self._state = tuple((id(parameter), parameter._version) for parameter in model.parameters())


def of_the_rest(model: QLIPModel, vocabulary: str) -> str:
    """SHA-256 over what is on neither side: norm and projections, text tower, their config, and the vocabulary.

    With both sides' fingerprints it says what the model embeds images and words as.

    Args:
        vocabulary: all that turns text into ids, as one string.

    Returns:
        64 hexadecimal digits.
    """
    config = {"text": model.config.text_config.model_dump(mode="json"), "projection": model.config.projection_dim}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    digest.update(vocabulary.encode())
    _add_parameters(digest, model, lambda name: not name.startswith(_CODE_PREFIXES + _DECODER_PREFIXES))
    return digest.hexdigest()


def compute(model: QLIPModel, side: Side) -> str:
    """SHA-256 over the side's config and its float32 tensors, sorted by name.

    Returns:
        64 hexadecimal digits.
    """
    config, prefixes = _relevant_config(model, side), _CODE_PREFIXES if side == "codes" else _DECODER_PREFIXES
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    _add_parameters(digest, model, lambda name: name.startswith(prefixes))
    return digest.hexdigest()


def _add_parameters(digest: hashlib._Hash, model: QLIPModel, wanted: Callable[[str], bool]) -> None:
    for name, parameter in sorted(model.named_parameters()):
        if wanted(name):
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            tensor = parameter.detach().to("cpu", torch.float32).contiguous()
            digest.update(tensor.numpy().astype("<f4", copy=False).data)


def _relevant_config(model: QLIPModel, side: Side) -> dict[str, Any]:
    vision, decoder = model.config.vision_config, model.config.decoder_config
    quantizer = {"embed_dim": vision.quantizer_cfg.embed_dim, "l2_norm": vision.quantizer_cfg.l2_norm}
    if side == "codes":
        # the published name of the scale is kept out of the code side: a sign does not depend on it
        return {key: getattr(vision, key) for key in _CODE_KEYS} | {"embed_dim": quantizer["embed_dim"]}
    return {key: getattr(decoder, key) for key in _DECODER_KEYS} | quantizer
