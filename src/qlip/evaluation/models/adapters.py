"""Models of other libraries: a Python callable by name, and the autoencoders of diffusers.

A callable, registered under the entry point group `GROUP` or named as ``module:callable``, makes an `EvalModel`: the
way for every model that is not built in. Built in are diffusers' autoencoders, here, and transformers' CLIP, in `clip`.

Shapes: B images of H x W pixels, N tokens of one index each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlip.errors import QLIPError, nearest, require
from qlip.evaluation.models.base import RECONSTRUCT, TOKENIZE, EvalModel, Reconstructed
from qlip.evaluation.models.clip import CLIPEvalModel
from qlip.modeling import Preprocessing
from qlip.runtime.pretrained import config_of, fingerprint_of, load

GROUP = "qlip.subjects"
"""Entry points; each is called without arguments, or with the one that was given, and makes an `EvalModel`."""
_LATENT_BYTES = 2
"""Bytes per number of a latent that is no code: it is rounded to float16 before it is decoded."""


def open_model(spec: str, *, size: tuple[int, int] | None = None, device: str | torch.device = "cpu") -> EvalModel:
    """Open another model by its kind and its place.

    Args:
        spec: ``diffusers.AutoencoderKL:<folder or Hub id>`` or ``diffusers.VQModel:<...>``, with ``#<subfolder>``
            behind it for a part of a pipeline; ``transformers.CLIPModel:<...>``; ``<module>:<callable>`` or a name
            registered under `GROUP`, with ``:<argument>`` behind it if the callable takes one.
        size: pixels (height, width) other than the model's own; a Python callable is not asked.
        device: where it runs.

    Raises:
        QLIPError: no such package, class, checkpoint or callable, weights that are no safetensors, or something that
            is no model.
    """
    kind, _, where = spec.partition(":")
    library, _, name = kind.partition(".")
    if library == "diffusers" and name and where:
        return AutoencoderEvalModel.from_pretrained(name, where, size=size, device=device)
    if kind == "transformers.CLIPModel" and where:
        return CLIPEvalModel.from_pretrained(where, size=size, device=device)
    return _called(spec)


def _called(spec: str) -> EvalModel:
    points = {point.name: point for point in entry_points(group=GROUP)}
    name, _, rest = spec.partition(":")
    if name in points:
        made, argument = points[name].load(), rest
    elif rest:
        attribute, _, argument = rest.partition(":")
        made = _attribute(name, attribute)
    else:
        raise QLIPError(
            f"{spec}: no model of that name{nearest(spec, points)}; give diffusers.AutoencoderKL:<checkpoint>,"
            " diffusers.VQModel:<checkpoint>, transformers.CLIPModel:<checkpoint> or <module>:<callable>"
        )
    if not callable(made):
        raise QLIPError(f"{spec}: is not callable; name something that makes a qlip.evaluation.models.base.EvalModel")
    found = made(argument) if argument else made()
    if not isinstance(found, EvalModel):
        raise QLIPError(f"{spec}: made a {type(found).__name__}, not a qlip.evaluation.models.base.EvalModel")
    return found


def _attribute(module: str, attribute: str) -> Any:
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise QLIPError(f"{module}:{attribute}: no module {error.name}; is it installed, or on PYTHONPATH?") from None
    except AttributeError:
        raise QLIPError(f"{module}:{attribute}: the module has no {attribute}") from None


class AutoencoderEvalModel(EvalModel):
    """An autoencoder of diffusers, with a codebook (VQModel) or without (AutoencoderKL and its like).

    With ``quantize``, latents become the nearest codebook entries, and an image counts log2(codebook) bits per token.
    Without, the latent is the mode of ``latent_dist``, rounded to float16 numbers, which are counted.

    Args:
        model: in eval mode.
        name: of the model in tables.
        size: pixels (height, width); by default its config's ``sample_size``. Images are scaled to [-1, 1], resized
            bicubically by their shorter side, and cropped at the centre.

    Raises:
        QLIPError: neither the config nor the caller gives a size, or the config no size of the codebook.
    """

    kind = "AutoencoderSubject"  # names in result files stay those of version 0.1

    def __init__(self, model: nn.Module, name: str, size: tuple[int, int] | None = None) -> None:
        self.model, self.name = model, name
        self._diffuser: Any = model  # its methods have no types
        config = config_of(model)
        own = config.get("sample_size")
        own = (own, own) if isinstance(own, int) else own and (int(own[0]), int(own[1]))
        if (wanted := size or own) is None:
            raise QLIPError(f"{name}: its config says no size of images; give one")
        self.preprocessing = replace(Preprocessing(wanted, None), shortest_edge=min(wanted))
        self.as_shipped = own is None or wanted == own
        self.codebook_size: int | None = None
        if hasattr(model, "quantize"):
            self.codebook_size = config.get("num_vq_embeddings")
            if not self.codebook_size:
                raise QLIPError(f"{name}: has a codebook, and its config does not say of how many entries")
        self.capabilities = frozenset({RECONSTRUCT, TOKENIZE} if self.codebook_size else {RECONSTRUCT})
        self.group_size = None if self.codebook_size is None else max(1, (self.codebook_size - 1).bit_length())
        self.device = next(model.parameters()).device
        self._fingerprint = ""

    @classmethod
    def from_pretrained(
        cls, kind: str, where: str, *, size: tuple[int, int] | None = None, device: str | torch.device = "cpu"
    ) -> AutoencoderEvalModel:
        """Load a checkpoint by diffusers' name of its class; see :func:`open_model`."""
        where, _, subfolder = where.partition("#")
        model = load(require("diffusers", extra="hf"), kind, where, **({"subfolder": subfolder} if subfolder else {}))
        if missing := [one for one in ("encode", "decode") if not hasattr(model, one)]:
            raise QLIPError(f"diffusers.{kind}: has no {' and no '.join(missing)}; an autoencoder is wanted")
        return cls(model.to(device), f"{kind} {Path(where).name}", size)

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """SHA-256 (hex) of class, config and weights; computed once."""
        self._fingerprint = self._fingerprint or fingerprint_of(self.model)
        return self._fingerprint

    @property
    def notes(self) -> Mapping[str, str]:  # type: ignore[override]
        """Description of how bytes are counted."""
        if self.codebook_size is None:
            return {"bits_per_pixel": "of a latent of float16 numbers, which is no code; not to be held against codes"}
        if self.codebook_size & (self.codebook_size - 1) == 0:
            return {}
        size = f"{self.codebook_size:,} values"
        return {
            "bits_per_pixel": f"log2 of {size} a token, as an entropy coder comes near to",
            "codebook": f"indices have {size}; usage is a share of {2 ** (self.group_size or 0):,}",
        }

    def tokenize(self, pixel_values: Tensor) -> Tensor:
        """Indices (B, N, 1) int64."""
        if self.codebook_size is None:
            raise QLIPError(f"{self.name} has no codebook, so no tokens")
        return self._indices(self._encoded(pixel_values).latents)

    def reconstruct(self, pixel_values: Tensor) -> Reconstructed:
        """Encode, quantise or round, decode."""
        encoded, indices = self._encoded(pixel_values), None
        if self.codebook_size is not None:
            latents = encoded.latents  # decode quantises them
            indices = self._indices(latents)
            num_bytes = math.ceil(indices.shape[1] * math.log2(self.codebook_size) / 8)
        else:
            if not hasattr(encoded, "latent_dist"):
                raise QLIPError(f"{self.name}: has neither a codebook nor latent_dist; write a callable for it")
            rounded = encoded.latent_dist.mode().half()
            latents, num_bytes = rounded.to(self._dtype), rounded[0].numel() * _LATENT_BYTES
        pixels = self._diffuser.decode(latents).sample
        if pixels.shape != pixel_values.shape:
            raise QLIPError(
                f"{self.name}: rebuilds {tuple(pixels.shape[1:])} from {tuple(pixel_values.shape[1:])}; give a size"
                " whose sides are multiples of what it shrinks images by"
            )
        bytes_of_all = torch.full((len(pixels),), num_bytes)
        return Reconstructed(self.preprocessing.denormalize(pixels), bytes_of_all, indices)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _encoded(self, pixel_values: Tensor) -> Any:
        return self._diffuser.encode(pixel_values.to(self._dtype))

    def _indices(self, latents: Tensor) -> Tensor:
        tokens: Tensor = self._diffuser.quantize(latents)[2][2]  # quantised, loss, (.., .., indices of all images)
        return tokens.reshape(len(latents), -1, 1).long()
