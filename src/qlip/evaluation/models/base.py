"""The interface of models under evaluation (`EvalModel`), and its implementation for QLIP (`QLIPEvalModel`).

Shapes: B images of H x W pixels, N tokens of K groups, E dimensions of the shared space.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from qlip.data.sources.training_text import UNKNOWN, TrainingText
from qlip.errors import QLIPError
from qlip.modeling import Preprocessing, QLIPModel, QLIPProcessor
from qlip.modeling.fingerprint import text_fingerprint

RECONSTRUCT, ENCODE_IMAGE, ENCODE_TEXT, FEATURES, TOKENIZE = (
    "reconstruct",
    "encode_image",
    "encode_text",
    "features",
    "tokenize",
)
CAPABILITIES = (RECONSTRUCT, ENCODE_IMAGE, ENCODE_TEXT, FEATURES, TOKENIZE)
"""The methods of `EvalModel` that a model may or may not implement."""


@dataclass(frozen=True)
class Reconstructed:
    """Reconstructed images and the bytes they were coded in.

    Attributes:
        pixels: (B, 3, H, W) float32 in [0, 1], on the model's device.
        num_bytes: (B,) int64 bytes of each image's code; 0 if unknown.
        indices: (B, N, K) int64 where there are tokens.
    """

    pixels: Tensor
    num_bytes: Tensor
    indices: Tensor | None = None


class EvalModel(ABC):
    """A model under evaluation; ``capabilities`` names the methods that it implements.

    Attributes:
        kind: how result files name this class of model; the class name if empty.
        name: what tables call it.
        capabilities: names of the methods that it implements, out of `CAPABILITIES`.
        preprocessing: how its images are prepared; part of what is measured.
        device: where its images are wanted.
        fingerprint: SHA-256 (hex) of its weights, or of the settings that make it what it is.
        cacheable: False for a model whose weights change, so that nothing derived from them may be stored.
        as_shipped: ``preprocessing`` is the checkpoint's own; False is written into every result.
        group_size: bits an index of its tokens; None where there are none.
        notes: what to keep in mind about its metrics, by a metric's name; they go where that metric goes.
        training_text: record of the captions that it was trained with.
    """

    kind: ClassVar[str] = ""
    name: str
    capabilities: frozenset[str]
    preprocessing: Preprocessing
    device: torch.device
    fingerprint: str
    as_shipped: bool = True
    cacheable: bool = True
    group_size: int | None = None
    notes: Mapping[str, str] = MappingProxyType({})
    training_text: TrainingText = UNKNOWN

    def reconstruct(self, pixel_values: Tensor) -> Reconstructed:
        """(B, 3, H, W) float32, normalised, on the device."""
        raise NotImplementedError

    def reconstruct_keyed(self, pixel_values: Tensor, keys: Sequence[str]) -> Reconstructed:
        """Like :meth:`reconstruct`, for models whose reconstructions are files, known by the images' keys."""
        del keys
        return self.reconstruct(pixel_values)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) normalised to unit vectors (B, E) float32."""
        raise NotImplementedError

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """T strings to unit vectors (T, E) float32."""
        raise NotImplementedError

    def features(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) normalised to features by name, (B, D) float32 each, e.g. ``cls``, ``mean``, ``both``."""
        raise NotImplementedError

    def tokenize(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) normalised to indices (B, N, K) int64."""
        raise NotImplementedError


class QLIPEvalModel(EvalModel):
    """A QLIP checkpoint, ours, published, or in training.

    Args:
        model: in eval mode.
        processor: of the same checkpoint.
        name: what tables call it.
        size: pixels (height, width) other than the checkpoint's own; named in every result.
        fingerprint: instead of one over the weights, for a model whose weights move.
        training_text: record of the captions that it was trained with, `TrainingText.read` of the checkpoint.
    """

    kind = "QLIPSubject"  # names in result files stay those of version 0.1
    CAN: ClassVar = frozenset({RECONSTRUCT, ENCODE_IMAGE, FEATURES, TOKENIZE})

    def __init__(
        self,
        model: QLIPModel,
        processor: QLIPProcessor,
        name: str,
        size: tuple[int, int] | None = None,
        fingerprint: str | None = None,
        training_text: TrainingText = UNKNOWN,
    ) -> None:
        self.training_text = training_text
        self.model, self.processor, self.name, self._given = model, processor, name, fingerprint
        self.cacheable = fingerprint is None
        reads = processor.tokenizer is not None and getattr(model, "text_model", None) is not None
        self.capabilities = self.CAN | ({ENCODE_TEXT} if reads else set())
        self.preprocessing, self.device = processor.preprocessing, model.device
        self.group_size = model.group_size
        self._state: tuple[tuple[int, int], ...] | None = None
        self._known = ""
        if size is not None and size != processor.preprocessing.size:
            if any(side % model.patch_size for side in size):
                raise QLIPError(f"{size[1]}x{size[0]}: sides must be multiples of {model.patch_size}, the patch")
            self.preprocessing = replace(processor.preprocessing, size=size, shortest_edge=min(size))
            self.as_shipped = False

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """20 digits each of encoder and decoder, 24 of the rest (projections, text tower, vocabulary).

        Two models whose first 40 digits are equal rebuild alike.
        """
        if self._given is not None:
            return self._given
        return f"{self.model.code_fingerprint[:20]}{self.model.decoder_fingerprint[:20]}{self._words[:24]}"

    @property
    def _words(self) -> str:
        """SHA-256 (hex) of what neither makes codes nor rebuilds pixels; computed once for a state of the weights."""
        state = tuple((id(one), one._version) for one in self.model.parameters())
        if state != self._state:
            self._known = text_fingerprint(self.model, self.processor)
            self._state = state
        return self._known

    @property
    def bytes_per_image(self) -> int:
        """Bytes of the bits of all tokens, packed."""
        height, width = self.preprocessing.size
        tokens = (height // self.model.patch_size) * (width // self.model.patch_size)
        return -(-tokens * self.model.num_bits // 8)

    def reconstruct(self, pixel_values: Tensor) -> Reconstructed:
        """Encode, quantise, decode; bytes are the bits of all tokens, packed."""
        grid = self.model.grid_of(pixel_values)
        indices = self.tokenize(pixel_values)
        pixels = self.preprocessing.denormalize(self.model.decode(indices, grid))
        return Reconstructed(pixels, torch.full((len(indices),), self.bytes_per_image), indices)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """The projected class token."""
        return self.model.embed_images(pixel_values)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """The projected end token."""
        ids = self.processor(text=list(texts))["input_ids"]
        return self.model.embed_texts(ids)

    def features(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Features before any projection and before the quantizer, (B, D) or (B, 2 D) float32.

        ``cls`` is the class token after the tower's last norm, what the projection reads (z_cls of the paper);
        ``mean`` the mean over patches of the second-last layer, the layer whose patches are the model's features
        elsewhere (eq. 8; `QLIPModel.get_patch_features`); ``both`` one after the other.
        """
        layers: list[Tensor] = []
        last, _ = self.model.vision_model.run_encoder(pixel_values.to(self.model.dtype), layers)
        class_token = self.model.vision_model.post_layernorm(last[:, 0]).float()
        patches = layers[-2][:, 1:].float().mean(1)
        return {"cls": class_token, "mean": patches, "both": torch.cat([class_token, patches], 1)}

    def tokenize(self, pixel_values: Tensor) -> Tensor:
        """Indices as the model groups them."""
        return self.model.encode(pixel_values.to(self.model.dtype))
