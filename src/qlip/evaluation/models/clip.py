"""CLIP of transformers as a model under evaluation.

Shapes: B images of H x W pixels, T texts, E dimensions of the shared space, D of features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlip.errors import QLIPError, require
from qlip.evaluation.models.base import ENCODE_IMAGE, ENCODE_TEXT, FEATURES, EvalModel
from qlip.modeling import Preprocessing
from qlip.modeling.checkpoint import Files
from qlip.modeling.model import unit
from qlip.modeling.processor import read_preprocessing
from qlip.modeling.tokenizer import CLIPTokenizer
from qlip.runtime.pretrained import config_of, fingerprint_of, load


class CLIPEvalModel(EvalModel):
    """transformers' CLIPModel: embeddings of images and texts, and features for probes.

    Args:
        model: in eval mode.
        tokenizer: its vocabulary.
        preprocessing: as its checkpoint says.
        name: of the model in tables.
        as_shipped: ``preprocessing`` is the checkpoint's own.
    """

    kind = "CLIPSubject"  # names in result files stay those of version 0.1

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
        files = Files(where)
        model = load(require("transformers", extra="hf"), "CLIPModel", str(files.folder))
        config = config_of(model)
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
