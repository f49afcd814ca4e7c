"""Two fingerprints of a model: of the encoder that makes codes, and of the decoder that turns them into images.

Tokens of models with equal code fingerprints may be compared, merged and indexed together; the decoder fingerprint
identifies the decoder that reconstructs them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch

from qlip.modeling.parts import CODE_PREFIXES, DECODER_PREFIXES

if TYPE_CHECKING:
    from qlip.modeling.model import QLIPModel
    from qlip.modeling.processor import QLIPProcessor

Side = Literal["codes", "decoder"]

# settings of the loss (entropy weights, temperature) and the grouping change neither codes nor pixels
_CODE_KEYS = (
    "hidden_size num_hidden_layers num_attention_heads hidden_act layer_norm_eps subln swiglu image_size patch_size"
    " rope quantizer quantizer_l2_norm quantizer_embed_type"
).split()
_DECODER_KEYS = (
    "hidden_size num_hidden_layers num_attention_heads hidden_act layer_norm_eps subln swiglu image_size patch_size"
    " rope"
).split()


class Cache:
    """Cache of fingerprints, valid until a weight changes."""

    def __init__(self) -> None:
        self._known: dict[Side, str] = {}
        self._state: tuple[Any, ...] = ()

    def get(self, model: QLIPModel, side: Side) -> str:
        """The fingerprint of one side, computed at most once per state of the weights."""
        state = tuple((id(parameter), parameter._version) for parameter in model.parameters())
        if state != self._state:
            self._known, self._state = {}, state
        if side not in self._known:
            self._known[side] = compute(model, side)
        return self._known[side]

    def carry(self, model: QLIPModel, known: dict[Side, str]) -> None:
        """Set the fingerprints of the stored weights, for a model whose weights were cast on loading."""
        self._known = dict(known)
        self._state = tuple((id(parameter), parameter._version) for parameter in model.parameters())


def rest_fingerprint(model: QLIPModel, vocabulary: str) -> str:
    """SHA-256 over the weights on neither side (norm, projections, text tower), their config, and the vocabulary.

    Together with both sides' fingerprints it identifies the model's embeddings of images and texts.

    Args:
        model: of any dtype and device.
        vocabulary: the tokenizer, as one string.

    Returns:
        64 hexadecimal digits.
    """
    config = {"text": model.config.text_config.model_dump(mode="json"), "projection": model.config.projection_dim}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    digest.update(vocabulary.encode())
    _add_parameters(digest, model, lambda name: not name.startswith(CODE_PREFIXES + DECODER_PREFIXES))
    return digest.hexdigest()


def text_fingerprint(model: QLIPModel, processor: QLIPProcessor) -> str:
    """SHA-256 (hex) of the weights and vocabulary that make embeddings, see :func:`rest_fingerprint`."""
    vocabulary = processor.tokenizer
    return rest_fingerprint(model, "" if vocabulary is None else vocabulary.identity())


def compute(model: QLIPModel, side: Side) -> str:
    """SHA-256 over the side's config and its float32 tensors, sorted by name.

    Returns:
        64 hexadecimal digits.
    """
    config, prefixes = _relevant_config(model, side), CODE_PREFIXES if side == "codes" else DECODER_PREFIXES
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
        # l2_norm, the scale of codes, is not in the code side: a sign does not depend on it
        return {key: getattr(vision, key) for key in _CODE_KEYS} | {"embed_dim": quantizer["embed_dim"]}
    return {key: getattr(decoder, key) for key in _DECODER_KEYS} | quantizer
