"""Registration with transformers' Auto classes."""

from __future__ import annotations

from typing import Any

from transformers import (  # type: ignore[attr-defined]
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPProcessor,
    CLIPTokenizerFast,
    PreTrainedModel,
)

from qlip.hf.config import QLIPHFConfig, QLIPHFTextConfig, QLIPHFVisionConfig
from qlip.hf.model import QLIPHFModel, QLIPHFTextModel, QLIPHFVisionModel


def register() -> None:
    """Make the Auto classes know the model types ``qlip``, ``qlip_vision_model`` and ``qlip_text_model``."""
    models: dict[Any, type[PreTrainedModel]] = {
        QLIPHFConfig: QLIPHFModel,
        QLIPHFVisionConfig: QLIPHFVisionModel,
        QLIPHFTextConfig: QLIPHFTextModel,
    }
    for config, model in models.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
    AutoModelForZeroShotImageClassification.register(QLIPHFConfig, QLIPHFModel, exist_ok=True)
    for config in (QLIPHFConfig, QLIPHFVisionConfig):
        AutoImageProcessor.register(config, slow_image_processor_class=CLIPImageProcessor, exist_ok=True)
    for config in (QLIPHFConfig, QLIPHFTextConfig):
        AutoTokenizer.register(config, fast_tokenizer_class=CLIPTokenizerFast, exist_ok=True)
    AutoProcessor.register(QLIPHFConfig, CLIPProcessor, exist_ok=True)
