"""A text decoder that sees: `VisionLanguageModel`.

A QLIP tower turns an image into N features of width C; the projector maps them to the width of the text decoder; they
stand in its sequence at the positions whose id is `IMAGE_ID`, image by image in order of occurrence. Shapes: B
sequences of T positions, M images of N tokens, D the decoder's width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.errors import QLIPError
from qlip.files import write_text
from qlip.lm.causal import CausalModel
from qlip.modeling import checkpoint
from qlip.modeling.model import QLIPModel
from qlip.modeling.parts import BlockGroups
from qlip.modeling.vision import VisionTower, compute_rope_tables
from qlip.runtime.machine import pick_device, pick_dtype
from qlip.vlm.config import IGNORED, IMAGE_ID, MODEL_TYPE, VLMConfig
from qlip.vlm.lora import merge

PARTS = ("tower", "projector", "llm")
"""Modules of the model, which training names."""


class Sequences(Protocol):
    """Inputs of :meth:`VisionLanguageModel.forward`; :class:`qlip.vlm.data.VLMBatch` has them.

    Attributes:
        ids: (B, T) int64, `IMAGE_ID` at image tokens.
        labels: (B, T) int64, not shifted; `IGNORED` where there is no loss.
        positions: (B, T) int64, from 0 in every document.
        documents: (B, T) int64, number of the document in its row; -1 at padding.
        images: (M, 3, H, W) float32 pixels, in order of occurrence.
        features: (M, N, C) float32 instead of `images`, or None.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor
    images: Tensor
    features: Tensor | None


@dataclass(frozen=True)
class Eye:
    """A tower and the layer that is read of it; blocks behind that layer do not run.

    Attributes:
        tower: QLIP's encoder.
        config: says the layer, and how patches are pooled.
    """

    tower: VisionTower
    config: VLMConfig

    def features(self, pixels: Tensor) -> Tensor:
        """Features (M, N, C) of (M, 3, H, W) normalised pixels; see :meth:`VisionLanguageModel.image_features`."""
        rows, columns = self.config.token_grid((pixels.shape[-2], pixels.shape[-1]))
        tower, layer, side = self.tower, self.config.layer, self.config.pool
        num_layers = tower.num_layers_of(-1 if layer == "quantized" else layer)
        hidden, _ = tower.run_encoder(pixels.to(tower.embeddings.class_embedding), num_layers=num_layers)
        patches: Tensor = hidden[:, 1:]
        if layer == "quantized":
            patches = tower.embed_codes(tower.quantizer(tower.latents(patches)).codes)
        if side == 1:
            return patches
        blocks: Tensor = patches.unflatten(1, (rows, side, columns, side))  # (M, h, side, w, side, C)
        return blocks.transpose(2, 3).flatten(3).flatten(1, 2)


class VisionLanguageModel(nn.Module):
    """Tower, projector and text decoder. Build one with `from_parts` or `from_pretrained`.

    Attributes:
        config: sizes and names.
        tower: QLIP's encoder.
        projector: (..., C) to (..., D).
        llm: text decoder.
    """

    def __init__(self, config: VLMConfig, tower: VisionTower, projector: nn.Sequential, llm: CausalModel) -> None:
        super().__init__()
        self.config = config
        self.tower, self.projector, self.llm = tower, projector, llm

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._first.weight.device

    @property
    def _first(self) -> nn.Linear:
        layer = self.projector[0]
        assert isinstance(layer, nn.Linear)
        return layer

    # ---------------------------------------------------------------- images

    def image_features(self, pixels: Tensor) -> Tensor:
        """Features of images, before the projector; without a graph unless the tower trains.

        Args:
            pixels: (M, 3, H, W) normalised pixels.

        Returns:
            (M, N, C).

        Raises:
            QLIPError: pixels of another shape or type.
        """
        trains = torch.is_grad_enabled() and any(one.requires_grad for one in self.tower.parameters())
        with torch.set_grad_enabled(trains):
            return Eye(self.tower, self.config).features(pixels)

    def embed(self, ids: Tensor, images: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """Embed ids, with the tokens of images at their positions.

        Args:
            ids: (B, T) int64, `IMAGE_ID` at image tokens.
            images: (M, 3, H, W) pixels, in order of occurrence; M may be 0.
            features: (M, N, C) instead of `images`, from `image_features`.

        Returns:
            (B, T, D).

        Raises:
            QLIPError: the ids have other image positions than the images have tokens, or features of another width.
        """
        places = ids == IMAGE_ID
        x = self.llm.embed(ids.masked_fill(places, 0))
        if features is None and images is not None and len(images):
            features = self.image_features(images)
        count = 0 if features is None else features.shape[0] * features.shape[1]
        wanted = int(places.sum())
        if wanted != count:
            per_image = 0 if features is None or not len(features) else features.shape[1]
            raise QLIPError(
                f"the ids have {wanted:,} image positions, but the {0 if features is None else len(features):,} images"
                f" have {count:,} tokens, {per_image} each; give every image its positions"
            )
        if features is None or not count:
            return x + self._unused() if self.training and torch.is_grad_enabled() else x
        if features.shape[-1] != self.config.feature_size:
            raise QLIPError(
                f"features of width {features.shape[-1]}: this model's projector reads {self.config.feature_size}"
            )
        tokens = self.projector(features.to(self._first.weight.dtype)).to(x.dtype)
        return x.masked_scatter(places[..., None], tokens.flatten(0, 1))

    def _unused(self) -> Tensor:
        """A zero that depends on the projector, and on a tower that trains: ranks must agree on what has gradients."""
        size = self.config.vision_config.image_size
        weight = self._first.weight
        if any(one.requires_grad for one in self.tower.parameters()):
            features = self.image_features(weight.new_zeros(1, 3, size, size))
        else:
            features = weight.new_zeros(1, 1, self.config.feature_size)
        zero: Tensor = 0 * self.projector(features).sum()
        return zero

    # ---------------------------------------------------------------- training

    def forward(self, batch: Sequences) -> Tensor:
        """Negative log-likelihood of each label, given what stands before it in its document.

        Args:
            batch: see :class:`Sequences`.

        Returns:
            (B, T) float32 nats, at the places of the labels; 0 where `trained_labels` is False.

        Raises:
            QLIPError: images that do not fit the ids.
        """
        x = self.embed(batch.ids, batch.images, batch.features)
        hidden = self.llm.hidden(x, batch.positions, batch.documents)
        wanted = trained_labels(batch.labels, batch.documents)
        places = wanted.flatten().nonzero()[:, 0]  # (L,); each label is predicted by the position before it
        nats = self.llm.nats(hidden.flatten(0, 1).index_select(0, places - 1), batch.labels.flatten()[places])
        every = torch.zeros(wanted.numel(), dtype=nats.dtype, device=nats.device)
        return every.index_copy(0, places, nats).view(wanted.shape)

    # ---------------------------------------------------------------- files

    @classmethod
    def from_parts(cls, config: VLMConfig, tower: VisionTower, llm: CausalModel) -> Self:
        """Build a model with a random projector, to train it."""
        width = llm.config.hidden_size
        projector = nn.Sequential(nn.Linear(config.feature_size, width), nn.GELU(), nn.Linear(width, width))
        return cls(config, tower, projector, llm)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
    ) -> Self:
        """Load a model's folder, or a Hub repository, with the tower and the text decoder that it names.

        Args:
            name_or_path: folder with ``config.json`` and ``model.safetensors``, or a Hub id.
            dtype: of the weights in memory.
            device: of the weights; "auto" is a GPU where there is one.

        Returns:
            The model in eval mode.

        Raises:
            QLIPError: no such folder, another kind of model, a tensor missing (such as the projector), unexpected or of
                another shape, or a tower of other weights than the model was trained with.
        """
        kind, place = pick_dtype(dtype), pick_device(device)
        files = checkpoint.Files(name_or_path)
        config = VLMConfig.from_file(files.folder / "config.json")
        with torch.device("meta"):
            llm = CausalModel(config.text_config)
            model = cls.from_parts(config, VisionTower(config.vision_config), llm)
        shapes = {name: one.shape for name, one in model.state_dict().items() if name.startswith(config.stored)}
        adapters = {} if config.lora is None else {f"llm.{name}": one for name, one in config.lora.shapes(llm).items()}
        _check_projector(files, shapes)
        state = checkpoint.read(files, shapes | adapters)
        matrices = {name.removeprefix("llm."): state.pop(name) for name in adapters}
        model.load_state_dict(state, assign=True, strict=False)
        if config.own_tower:
            compute_rope_tables(model.tower)
        else:
            model.tower = load_tower(config.vision_tower, config.vision_fingerprint, files.name)
        if config.language_model is not None:
            model.llm = _load_language_model(config, files.name)
        if config.lora is not None:
            merge(model.llm, config.lora, matrices)
            model.config = config.model_copy(
                update={"lora": None, "language_model": None, "language_fingerprint": None}
            )
        return model.requires_grad_(True).to(place, kind).eval()

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``, each whole or not at all.

        Args:
            folder: created if absent.
            dtype: of the stored tensors; the weights' own by default.
            state: tensors by name, to store instead of the model's own, e.g. EMA weights.
        """
        own, stored = self.state_dict() | dict(state or {}), self.config.stored
        tensors = {
            name.replace(".base_layer.", "."): one
            for name, one in own.items()
            if name.startswith(stored) or ".lora_" in name
        }
        checkpoint.save_weights(tensors, Path(folder), dtype)
        values = {"architectures": [type(self).__name__], "model_type": MODEL_TYPE} | self.config.to_dict()
        write_text(Path(folder) / "config.json", json.dumps(values, indent=2) + "\n")


def load_tower(name: str, fingerprint: str | None = None, where: str = "") -> VisionTower:
    """Load the encoder of a QLIP, in eval mode.

    Args:
        name: a folder, a Hub id, a published model's name or "bundled".
        fingerprint: code fingerprint that it must have; None takes any.
        where: model that asks for it, for the error.

    Raises:
        QLIPError: no such QLIP, or another fingerprint.
    """
    qlip = QLIPModel.from_pretrained(name)
    if fingerprint is not None and qlip.code_fingerprint != fingerprint:
        raise QLIPError(
            f"{where}: was trained with the tower {fingerprint[:12]}, but {name} is {qlip.code_fingerprint[:12]};"
            " restore that QLIP"
        )
    return qlip.vision_model.eval()


def _load_language_model(config: VLMConfig, where: str) -> CausalModel:
    """Load the text decoder that a configuration names, and check that it is the one of the training."""
    name, wanted = str(config.language_model), config.text_config
    try:
        model = CausalModel.from_pretrained(name)
    except QLIPError as error:
        raise QLIPError(f"{where}: its text decoder: {error}") from None
    if (found := model.config.hidden_size) != wanted.hidden_size:
        raise QLIPError(
            f"{name}: its width is {found}, but {where} was trained with a text decoder of width"
            f" {wanted.hidden_size}; restore that decoder"
        )
    if model.config.vocab_size != wanted.vocab_size or config.language_fingerprint not in (None, model.fingerprint):
        raise QLIPError(f"{name}: is not the text decoder that {where} was trained with; restore that decoder")
    return model


def load_eye(config: VLMConfig, where: str, dtype: torch.dtype | None) -> Eye:
    """Load the tower that a model reads.

    Args:
        config: names the tower and its fingerprint.
        where: model that asks for it, for the error.
        dtype: of its weights; None is that of the file.

    Raises:
        QLIPError: see `load_tower`.
    """
    return Eye(load_tower(config.vision_tower, config.vision_fingerprint, where).to(dtype=dtype), config)


def trained_labels(labels: Tensor, documents: Tensor) -> Tensor:
    """Bool (B, T), True at labels with a loss: those that are not ignored, and not the first of their document.

    Args:
        labels: (B, T) int64.
        documents: (B, T) int64, -1 at padding.
    """
    inside = F.pad(documents[:, 1:] == documents[:, :-1], (1, 0))
    return (labels != IGNORED) & (documents >= 0) & inside


def param_groups(model: nn.Module) -> BlockGroups:
    """How a `VisionLanguageModel` is trained: its parts are `PARTS`; embeddings and norms without weight decay."""
    return BlockGroups(model, lambda name: name.partition(".")[0], lambda name: "embedding" in name)


def _check_projector(files: checkpoint.Files, shapes: Mapping[str, torch.Size]) -> None:
    """Refuse a projector that is missing or of another width, with both widths in the error."""
    stored = checkpoint.stored_shapes(files)
    found = {name: shape for name, shape in stored.items() if name.startswith("projector.")}
    if not found:
        raise QLIPError(f"{files.name}: has no projector; train one, or take the folder that a training wrote")
    for name, width in (("projector.0.weight", 1), ("projector.2.weight", 0)):
        if name in found and len(found[name]) == 2 and found[name][width] != shapes[name][width]:
            side = "reads features" if width else "writes to a text decoder"
            raise QLIPError(
                f"{files.name}: the projector {side} of width {found[name][width]}, but config.json makes it"
                f" {shapes[name][width]}; is config.json this model's?"
            )
