"""Models of other libraries: autoencoders of diffusers and transformers, CLIP, and any Python callable.

Shapes: B images of H x W pixels, N tokens of one index each, C x h x w numbers of a latent, E dimensions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from qlip.errors import QLIPError, nearest, require
from qlip.evaluation.models.base import (
    ENCODE_IMAGE,
    ENCODE_TEXT,
    FEATURES,
    RECONSTRUCT,
    TOKENIZE,
    EvalModel,
    Reconstructed,
)
from qlip.modeling import Preprocessing
from qlip.modeling.checkpoint import Files
from qlip.modeling.model import unit
from qlip.modeling.processor import read_preprocessing
from qlip.modeling.tokenizer import CLIPTokenizer

GROUP = "qlip.subjects"
"""Entry points; each is called without arguments, or with the one that was given, and makes an EvalModel."""
LIBRARIES = ("diffusers", "transformers")
_LATENT_BYTES = 2
"""Bytes of a number of a latent that is no code: it is rounded to float16 before it is decoded."""


def open_model(spec: str, *, size: tuple[int, int] | None = None, device: str | torch.device = "cpu") -> EvalModel:
    """Another model by what it is and where it lies.

    Args:
        spec: ``diffusers.AutoencoderKL:<folder or Hub id>``, with ``#<subfolder>`` behind it where it is part of a
            pipeline, and any other autoencoder of :data:`LIBRARIES` by its class; ``transformers.CLIPModel:<...>``;
            ``<module>:<callable>`` or a name registered under :data:`GROUP`, with ``:<argument>`` behind it if the
            callable takes one.
        size: pixels (height, width), where it should see others than its own; a Python callable is not asked.
        device: where it runs.

    Raises:
        QLIPError: no such package, class, checkpoint or callable, weights that are no safetensors, or something that
            is no model.
    """
    kind, _, where = spec.partition(":")
    library, _, name = kind.partition(".")
    if library in LIBRARIES and name and where:
        if name == "CLIPModel":
            return CLIPEvalModel.from_pretrained(where, size=size, device=device)
        return AutoencoderEvalModel.from_pretrained(library, name, where, size=size, device=device)
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
            f"{spec}: no model of that name{nearest(spec, points)}; give diffusers.<class>:<checkpoint>,"
            " transformers.<class>:<checkpoint> or <module>:<callable>"
        )
    if not callable(made):
        raise QLIPError(f"{spec}: is not callable; name something that makes a qlip.evaluation.models.base.EvalModel")
    found = made(argument) if argument else made()
    if not isinstance(found, EvalModel):
        raise QLIPError(f"{spec}: made a {type(found).__name__}, not a qlip.evaluation.models.base.EvalModel")
    return found


def _attribute(module: str, attribute: str) -> Callable[..., object]:
    try:
        found: Callable[..., object] = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise QLIPError(f"{module}:{attribute}: no module {error.name}; is it installed, or on PYTHONPATH?") from None
    except AttributeError:
        raise QLIPError(f"{module}:{attribute}: the module has no {attribute}") from None
    return found


def _library(name: str) -> ModuleType:
    if name == "transformers":
        return require("transformers", extra="adapters")
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise QLIPError(f"this needs the package {name!r}: pip install {name}") from None


def _class(library: str, name: str) -> Any:
    found = getattr(_library(library), name, None)
    if not hasattr(found, "from_pretrained"):
        raise QLIPError(f"{library}.{name}: {library} has no such model; class names are as in its documentation")
    return found


def _load(kind: Any, where: str, **options: Any) -> nn.Module:
    """Safetensors alone, all of the weights, in eval mode."""
    try:
        found, info = kind.from_pretrained(where, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # a checkpoint that is not as it should be
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise QLIPError(f"{where}: {kind.__name__} cannot be read as safetensors ({first[:200]})") from None
    if missing := sorted(info["missing_keys"]):
        raise QLIPError(
            f"{where}: has no weights for {len(missing)} tensors of a {kind.__name__}, such as {missing[0]}"
        )
    model: nn.Module = found
    return model.eval()


class AutoencoderEvalModel(EvalModel):
    """An autoencoder whose ``encode`` gives tokens, latents to be quantised, or latents that are no code.

    By what ``encode`` returns: ``image_tokens`` are decoded as they are (transformers' VQ models); ``latents`` of a
    model with ``quantize`` become the nearest codebook entries (diffusers' VQModel); ``latent_dist`` is its mode
    (AutoencoderKL and its like); ``latents`` or ``latent`` without a codebook are taken as they are. A code counts
    log2(codebook) bits per token; latents count as float16 numbers, to which they are rounded.

    Args:
        model: in eval mode.
        name: what tables call it.
        size: pixels (height, width); by default its config's ``sample_size``, ``image_size`` or ``resolution``.
        preprocessing: other than pixels in [-1, 1], bicubic, shorter side to the size and a centre crop.

    Raises:
        QLIPError: neither the config nor the caller says a size.
    """

    kind = "AutoencoderSubject"

    def __init__(
        self,
        model: nn.Module,
        name: str,
        size: tuple[int, int] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        self.model, self.name = model, name
        self._parts: Any = model  # what no type is known of
        own = _size(model) if preprocessing is None else preprocessing.size
        if (wanted := size or own) is None:
            raise QLIPError(f"{name}: its config says no size of images; give one")
        self.preprocessing = replace(
            preprocessing or Preprocessing(wanted, None), size=wanted, shortest_edge=min(wanted)
        )
        self.as_shipped = own is None or wanted == own
        self.codebook_size = _codebook_size(model)
        self.capabilities = frozenset({RECONSTRUCT, TOKENIZE} if self.codebook_size else {RECONSTRUCT})
        self.group_size = None if self.codebook_size is None else max(1, (self.codebook_size - 1).bit_length())
        self.device = next(model.parameters()).device
        self._fingerprint = ""

    @classmethod
    def from_pretrained(
        cls,
        library: str,
        kind: str,
        where: str,
        *,
        size: tuple[int, int] | None = None,
        device: str | torch.device = "cpu",
    ) -> AutoencoderEvalModel:
        """A checkpoint of one of :data:`LIBRARIES`, by its class; see :func:`open_model`."""
        where, _, subfolder = where.partition("#")
        model = _load(_class(library, kind), where, **({"subfolder": subfolder} if subfolder else {}))
        if missing := [one for one in ("encode", "decode") if not hasattr(model, one)]:
            raise QLIPError(f"{library}.{kind}: has no {' and no '.join(missing)}; an autoencoder is wanted")
        return cls(model.to(device), f"{kind} {Path(where).name}", size)

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """SHA-256 (hex) of class, config and weights; computed once."""
        self._fingerprint = self._fingerprint or fingerprint_of(self.model)
        return self._fingerprint

    @property
    def notes(self) -> Mapping[str, str]:  # type: ignore[override]
        """How bytes are counted."""
        if self.codebook_size is None:
            return {"bits_per_pixel": "of a latent of float16 numbers, which is no code; not to be held against codes"}
        if self.codebook_size & (self.codebook_size - 1) == 0:
            return MappingProxyType({})
        size = f"{self.codebook_size:,} values"
        return {
            "bits_per_pixel": f"log2 of {size} a token, as an entropy coder comes near to",
            "codebook": f"indices have {size}; usage is a share of {2 ** (self.group_size or 0):,}",
        }

    def tokenize(self, pixel_values: Tensor) -> Tensor:
        """Indices (B, N, 1) int64."""
        if self.codebook_size is None:
            raise QLIPError(f"{self.name} has no codebook, so no tokens")
        return self._indices(self._encoded(pixel_values), len(pixel_values))

    def reconstruct(self, pixel_values: Tensor) -> Reconstructed:
        """Encode, round as said above, decode."""
        encoded, count = self._encoded(pixel_values), len(pixel_values)
        indices: Tensor | None = None
        if self.codebook_size is not None:
            indices = self._indices(encoded, count)
            given = indices[..., 0] if hasattr(encoded, "image_tokens") else encoded.latents
            num_bytes = math.ceil(indices.shape[1] * math.log2(self.codebook_size) / 8)
        else:
            latents = _latents(encoded, self.name).half()
            given = latents.to(self._dtype)
            num_bytes = latents[0].numel() * _LATENT_BYTES
        decoded = self._parts.decode(given)
        pixels = decoded if isinstance(decoded, Tensor) else decoded.sample
        if pixels.shape != pixel_values.shape:
            raise QLIPError(
                f"{self.name}: rebuilds {tuple(pixels.shape[1:])} from {tuple(pixel_values.shape[1:])}; give a size"
                " whose sides are multiples of what it shrinks images by"
            )
        return Reconstructed(self.preprocessing.denormalize(pixels), torch.full((count,), num_bytes), indices)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _encoded(self, pixel_values: Tensor) -> Any:
        return self._parts.encode(pixel_values.to(self._dtype))

    def _indices(self, encoded: Any, count: int) -> Tensor:
        tokens = getattr(encoded, "image_tokens", None)
        if tokens is None:  # quantised, loss, (.., .., indices)
            tokens = self._parts.quantize(encoded.latents)[2][2]
        found: Tensor = tokens.reshape(count, -1, 1).long()  # both libraries give one long row of all images
        return found


def _latents(encoded: Any, name: str) -> Tensor:
    distribution = getattr(encoded, "latent_dist", None)
    found = distribution.mode() if distribution is not None else None
    for attribute in ("latents", "latent"):
        found = getattr(encoded, attribute, None) if found is None else found
    if not isinstance(found, Tensor):
        raise QLIPError(f"{name}: what it encodes to has no latent_dist, latents, latent or image_tokens")
    return found


def _config(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", {})
    found: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return found


def _size(model: nn.Module) -> tuple[int, int] | None:
    config = _config(model)
    side = next((config[key] for key in ("sample_size", "image_size", "resolution") if config.get(key)), None)
    if side is None and config.get("num_patches") and config.get("channel_multiplier"):  # transformers' VQ of Janus
        side = config["num_patches"] * 2 ** (len(config["channel_multiplier"]) - 1)
    if isinstance(side, int):
        return side, side
    return None if side is None else (int(side[0]), int(side[1]))


def _codebook_size(model: nn.Module) -> int | None:
    if not hasattr(model, "quantize"):
        return None
    config = _config(model)
    found = next((config[key] for key in ("num_vq_embeddings", "num_embeddings") if config.get(key)), None)
    if found is None:
        raise QLIPError(f"{type(model).__name__}: has a codebook, and its config does not say of how many entries")
    return int(found)


def fingerprint_of(model: nn.Module) -> str:
    """SHA-256 (hex) of a model's class, config and weights."""
    settings = {key: value for key, value in _config(model).items() if not key.startswith("_")}
    for version in ("transformers_version", "torch_dtype", "dtype"):
        settings.pop(version, None)
    digest = hashlib.sha256(f"{type(model).__name__} {json.dumps(settings, sort_keys=True, default=str)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class CLIPEvalModel(EvalModel):
    """transformers' CLIPModel: vectors of images and words, and features for probes.

    Args:
        model: in eval mode.
        tokenizer: its vocabulary.
        preprocessing: as its checkpoint says.
        name: what tables call it.
        as_shipped: ``preprocessing`` is the checkpoint's own.
    """

    kind = "CLIPSubject"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: CLIPTokenizer,
        preprocessing: Preprocessing,
        name: str,
        as_shipped: bool = True,
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.preprocessing, self.as_shipped = preprocessing, as_shipped
        self.capabilities = frozenset({ENCODE_IMAGE, ENCODE_TEXT, FEATURES})
        self.device = next(model.parameters()).device
        self._fingerprint = ""
        self._towers: Any = model

    @classmethod
    def from_pretrained(
        cls, where: str, *, size: tuple[int, int] | None = None, device: str | torch.device = "cpu"
    ) -> CLIPEvalModel:
        """A folder or Hub id with model, ``preprocessor_config.json`` and vocabulary."""
        kind = _class("transformers", "CLIPModel")
        files = Files(where)
        model = _load(kind, str(files.folder))
        config = _config(model)
        side, patch = config["vision_config"]["image_size"], config["vision_config"]["patch_size"]
        path = files.path("preprocessor_config.json")
        own = (
            Preprocessing((side, side), side, patch_size=patch)
            if path is None
            else read_preprocessing(path, side, patch)
        )
        if size not in (None, own.size):
            raise QLIPError(f"{where}: CLIP sees {own.size[1]}x{own.size[0]} pixels and no others")
        tokenizer = CLIPTokenizer.from_folder(files.folder, config["text_config"]["max_position_embeddings"])
        if tokenizer is None:
            raise QLIPError(f"{where}: has no vocabulary (vocab.json and merges.txt, or tokenizer.json)")
        return cls(model.to(device), tokenizer, own, f"CLIP {Path(where).name}")

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """SHA-256 (hex) of class, config, weights and vocabulary; computed once."""
        if not self._fingerprint:
            both = fingerprint_of(self.model) + self.tokenizer.identity()
            self._fingerprint = hashlib.sha256(both.encode()).hexdigest()
        return self._fingerprint

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """The projected class token."""
        return unit(self._towers.visual_projection(self._seen(pixel_values).pooler_output))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """The projected end token."""
        ids, mask = self.tokenizer(list(texts))
        found = self._towers.text_model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        return unit(self._towers.text_projection(found.pooler_output))

    def features(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """``cls`` after the last norm, ``mean`` of the second-last layer's patches, ``both``; as a QLIP's."""
        seen = self._seen(pixel_values, output_hidden_states=True)
        class_token, patches = seen.pooler_output.float(), seen.hidden_states[-2][:, 1:].float().mean(1)
        return {"cls": class_token, "mean": patches, "both": torch.cat([class_token, patches], 1)}

    def _seen(self, pixel_values: Tensor, **options: Any) -> Any:
        dtype = next(self.model.parameters()).dtype
        return self._towers.vision_model(pixel_values=pixel_values.to(dtype), **options)
