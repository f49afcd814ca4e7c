"""LLaVA around QLIP's encoder in the remote-code file: stock classes, after the tower's model type is known."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qlip.hf.config import QLIPHFVisionConfig
from qlip.hf.model import QLIPHFVisionModel


class QLIPHFLlavaConfig(LlavaConfig):
    """Stock LLaVA's configuration; importing its module makes the tower known."""


class QLIPHFLlava(LlavaForConditionalGeneration):
    """Stock LLaVA."""

    config_class = QLIPHFLlavaConfig
    _checkpoint_conversion_mapping: dict[
        str, str
    ] = {}  # 4.57 would save older names, of which 5 loses the output layer here


def register_tower() -> None:
    """Make the Auto classes build the tower, unless `qlip.hf` did so in this process."""
    if QLIPHFVisionConfig.model_type not in CONFIG_MAPPING:
        AutoConfig.register(QLIPHFVisionConfig.model_type, QLIPHFVisionConfig)
        AutoModel.register(QLIPHFVisionConfig, QLIPHFVisionModel)
