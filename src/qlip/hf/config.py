"""Configurations for transformers: the published fields under model types of their own.

The values are those of `qlip.modeling.config`, which checks them when a model is built.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

from qlip.modeling.checkpoint import resolve
from qlip.modeling.config import REFUSAL, Config, QLIPConfig, QLIPTextConfig, QLIPVisionConfig

MODEL_TYPES = {"text_config": "qlip_text_model", "vision_config": "qlip_vision_model"}
"""Model type by part of the configuration; the published folders say CLIP's."""


def defaults_of(kind: type[Config]) -> dict[str, Any]:
    """Defaults of a checked configuration's fields by name, as in a ``config.json``; None where there is none."""
    found = {}
    for name, field in kind.model_fields.items():
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        found[name] = value.to_json_dict() if isinstance(value, Config) else value
    return found


class _Fields(PretrainedConfig):
    """Base: attributes are the fields of a checked configuration, with its defaults.

    Each subclass has an ``__init__`` of its own, because transformers 5 generates one for a class that has none.
    """

    checked_by: ClassVar[type[Config]]

    def __init__(self, **values: Any) -> None:
        defaults = defaults_of(self.checked_by)
        own = {name: values.pop(name) for name in defaults if name in values}
        super().__init__(**values)  # first: transformers 4 sets special tokens to None
        for name, default in defaults.items():
            setattr(self, name, own.get(name, default))

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **options: Any) -> tuple[dict[str, Any], Any]:
        """Read a ``config.json``; a published one, which says CLIP's model types, gets this package's."""
        values, rest = super().get_config_dict(resolve_known(pretrained_model_name_or_path), **options)
        return renamed(values), rest

    def checked_values(self) -> dict[str, Any]:
        """Values of the checked configuration's fields."""
        return {name: getattr(self, name) for name in defaults_of(self.checked_by)}


class QLIPHFVisionConfig(_Fields):
    """``vision_config``; fields and defaults are those of :class:`qlip.modeling.config.QLIPVisionConfig`."""

    model_type = "qlip_vision_model"
    base_config_key = "vision_config"
    checked_by = QLIPVisionConfig

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)

    def checked(self) -> QLIPVisionConfig:
        """Return the checked configuration. Raises QLIPError if values do not fit."""
        return QLIPVisionConfig.from_dict(self.checked_values(), "vision_config")


class QLIPHFTextConfig(_Fields):
    """``text_config``; fields and defaults are those of :class:`qlip.modeling.config.QLIPTextConfig`."""

    model_type = "qlip_text_model"
    base_config_key = "text_config"
    checked_by = QLIPTextConfig

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)

    def checked(self) -> QLIPTextConfig:
        """Return the checked configuration. Raises QLIPError if values do not fit."""
        return QLIPTextConfig.from_dict(self.checked_values(), "text_config")


class QLIPHFConfig(PretrainedConfig):
    """The whole model's configuration.

    Args:
        text_config, vision_config: dicts, or configurations of the towers.
        decoder_config: dict, of :class:`qlip.modeling.config.QLIPDecoderConfig`.
        vision_projection_bias, text_projection_bias: required to build a model, as in published files.
        projection_dim: E.
        logit_scale_init_value: initial logarithm of the temperature.
        **values: of transformers' base class.
    """

    model_type = "qlip"
    sub_configs: ClassVar = {"text_config": QLIPHFTextConfig, "vision_config": QLIPHFVisionConfig}

    def __init__(
        self,
        text_config: dict[str, Any] | QLIPHFTextConfig | None = None,
        vision_config: dict[str, Any] | QLIPHFVisionConfig | None = None,
        decoder_config: dict[str, Any] | None = None,
        vision_projection_bias: bool | None = None,
        text_projection_bias: bool | None = None,
        projection_dim: int = 512,
        logit_scale_init_value: float = 2.6592,
        **values: Any,
    ) -> None:
        given = text_config or {}
        self.text_config = given if isinstance(given, QLIPHFTextConfig) else QLIPHFTextConfig(**given)
        seen = vision_config or {}
        self.vision_config = seen if isinstance(seen, QLIPHFVisionConfig) else QLIPHFVisionConfig(**seen)
        self.decoder_config = dict(decoder_config or {})
        self.vision_projection_bias = vision_projection_bias
        self.text_projection_bias = text_projection_bias
        self.projection_dim = projection_dim
        self.logit_scale_init_value = logit_scale_init_value
        super().__init__(**values)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **options: Any) -> tuple[dict[str, Any], Any]:
        """Read a ``config.json``; a published one, which says CLIP's model types, gets this package's."""
        values, rest = super().get_config_dict(resolve_known(pretrained_model_name_or_path), **options)
        return renamed(values), rest

    def to_diff_dict(self) -> dict[str, Any]:
        """Content of ``config.json``: values that differ from the defaults, in the towers too, as published."""
        values = super().to_diff_dict()
        for name in MODEL_TYPES:
            values[name] = getattr(self, name).to_diff_dict()
            values[name].pop("transformers_version", None)
        return values

    def checked(self) -> QLIPConfig:
        """Return the checked configuration. Raises QLIPError if values do not fit."""
        values = {name: getattr(self, name) for name in defaults_of(QLIPConfig)}
        towers = {
            "text_config": self.text_config.checked_values(),
            "vision_config": self.vision_config.checked_values(),
        }
        return QLIPConfig.from_dict({k: v for k, v in (values | towers).items() if v is not None})


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Replace CLIP's model types of a QLIP's ``config.json`` by this package's; return other files as they are.

    The key by which `QLIPModel.save_pretrained` keeps stock CLIP classes away is left out.
    """
    if values.get("model_type") != "clip" or "decoder_config" not in values:
        return values
    parts = {name: values.get(name, {}) | {"model_type": kind} for name, kind in MODEL_TYPES.items()}
    whole = values | parts | {"model_type": "qlip"}
    for part in (whole, whole["vision_config"]):
        part.pop(REFUSAL, None)
    return whole


def resolve_known(name: Any) -> Any:
    """Folder of the bundled or a published model by name; other names are returned for transformers to resolve."""
    known = isinstance(name, str) and "/" not in name and "\\" not in name
    return str(resolve(name)) if known else name
