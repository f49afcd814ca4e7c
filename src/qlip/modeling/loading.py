"""Load a model by name onto the machine there is.

`resolve` turns a name ("bundled", a published model's name, a Hub id, a folder) into a place, `pick_device` a device's
name into a device, and `LoadedModel.from_pretrained` does both and reads the model with its processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from qlip.assets import BUNDLED, name_of
from qlip.errors import QLIPError
from qlip.modeling.checkpoint import resolve
from qlip.modeling.model import QLIPModel
from qlip.modeling.processor import QLIPProcessor
from qlip.runtime.machine import DTYPES, pick_device, pick_dtype

__all__ = ["DTYPES", "LoadedModel", "pick_device", "pick_dtype", "resolve"]


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with its processor.

    Attributes:
        model: on its device.
        processor: of the same checkpoint.
        name: for messages and reports.
    """

    model: QLIPModel
    processor: QLIPProcessor
    name: str

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "bundled",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        **hub: Any,
    ) -> Self:
        """Load a checkpoint.

        Args:
            name_or_path: a folder, a Hub id, a published model's name, or "bundled".
            device: such as cpu, cuda, cuda:1 or mps; "auto" takes a GPU where there is one.
            dtype: of the weights; "auto" is the one they are stored in.
            **hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

        Raises:
            QLIPError: no such checkpoint, device or dtype, or a broken file.
        """
        name = name_of(name_or_path, BUNDLED)
        model = QLIPModel.from_pretrained(name_or_path, device=pick_device(device), dtype=dtype, **hub)
        return cls(model.eval(), QLIPProcessor.from_pretrained(name_or_path, **hub), name)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None, **options: Any) -> str:
        """Upload model, preprocessing and vocabulary; see :meth:`QLIPModel.push_to_hub`."""
        return self.model.push_to_hub(repo_id, processor=self.processor, private=private, token=token, **options)

    def described(self) -> dict[str, Any]:
        """Name, fingerprints, device and dtype, for reports in JSON."""
        return {
            "name": self.name,
            "code_fingerprint": self.model.code_fingerprint,
            "decoder_fingerprint": self.model.decoder_fingerprint,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> NDArray[np.float32]:
        """Embed texts as unit vectors, (T, E) float32.

        Raises:
            QLIPError: the checkpoint has no vocabulary, or not a list of strings.
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise QLIPError("embed_texts takes a list of texts; write [text] for one")
        parts = []
        for start in range(0, len(texts), batch_size):
            inputs = self.processor(text=list(texts[start : start + batch_size]))
            parts.append(self.model.embed_texts(inputs["input_ids"], inputs["attention_mask"]).cpu().numpy())
        return np.concatenate(parts) if parts else np.empty((0, self.model.config.projection_dim), np.float32)
