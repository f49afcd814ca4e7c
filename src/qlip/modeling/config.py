"""The model's configuration: names and defaults of the published ``config.json``.

A published file holds only values that differ from the class defaults, so the defaults below are part of the format.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from qlip import assets
from qlip.errors import QLIPError, validate
from qlip.registry import unknown_name

Positive = Annotated[int, Field(gt=0)]

BOOKKEEPING = frozenset(
    "_name_or_path _attn_implementation_autoset architectures auto_map dtype initializer_factor initializer_range"
    " model_type torch_dtype transformers_version".split()
)
"""Keys that Hugging Face writes into every config; ignored here, and written back."""
REFUSAL = "transformers_weights"
"""Key by which a saved folder makes stock CLIP classes refuse it; not kept, since saving writes it."""


class Config(BaseModel):
    """Strict base: an unknown key is an error; known keys without an effect are kept and written back."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    without_effect: ClassVar[frozenset[str]] = frozenset()
    always_written: ClassVar[frozenset[str]] = frozenset()
    folder: ClassVar[str] = "a checkpoint folder"
    """Name of the place that holds the file, for the error of an absent one."""
    _kept: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep_keys_without_effect(cls, values: Any, handler: Any) -> Self:
        if not isinstance(values, dict):
            return handler(values)  # type: ignore[no-any-return]
        allowed = cls.without_effect | BOOKKEEPING
        config: Self = handler({key: value for key, value in values.items() if key not in {*allowed, REFUSAL}})
        config._kept = {key: value for key, value in values.items() if key in allowed}
        return config

    def to_dict(self) -> dict[str, Any]:
        """Every value, defaults included."""
        return self._written(full=True)

    def to_json_dict(self) -> dict[str, Any]:
        """Content of ``config.json``: values that differ from the class defaults, and the kept keys."""
        return self._written(full=False)

    def _written(self, full: bool) -> dict[str, Any]:
        written = dict(self._kept)
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Config):
                written[name] = value._written(full)
            elif full or name in self.always_written or value != field.get_default(call_default_factory=True):
                written[name] = value
        return written

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config") -> Self:
        """Check and build a configuration.

        Args:
            values: the parsed ``config.json``.
            where: name of the source in errors, normally the file.

        Raises:
            QLIPError: an unknown or missing key, a wrong type, sizes that do not fit each other, or another kind of
                model.
        """
        return validate(cls, values, where)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a ``config.json``. Raises QLIPError if it is absent, not JSON, or of another kind of model."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            run = path.parent / "model"
            hint = f"{cls.folder} holds config.json and model.safetensors"
            hint = f"this is a run, give its model, {run}" if (run / "config.json").is_file() else hint
            raise QLIPError(f"{path}: no such file; {hint}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise QLIPError(f"{path}: not JSON ({error}); fetch the file again") from None
        return cls.from_dict(values, str(path))


class QuantizerConfig(Config):
    """``quantizer_cfg``: Binary Spherical Quantization and its loss (eq. 1)."""

    always_written = frozenset({"embed_dim", "group_size", "input_format", "l2_norm"})

    embed_dim: Positive = 18
    group_size: Annotated[int, Field(ge=1, le=63)] = 9
    soft_entropy: Literal[True] = True
    beta: float = 0.0
    gamma_0: float = 1.0
    gamma_1: float = 1.0
    input_format: Literal["bchw", "blc"] = "bchw"
    persample_entropy_compute: Literal["group", "analytical"] = "group"
    l2_norm: bool = True
    inv_temperature: Annotated[float, Field(gt=0)] = 100.0

    @model_validator(mode="after")
    def _groups_divide(self) -> Self:
        if self.embed_dim % self.group_size:
            raise ValueError(
                f"group_size {self.group_size} does not divide embed_dim {self.embed_dim}; choose a divisor"
            )
        return self


class TowerConfig(Config):
    """Fields that the three transformers have in common."""

    hidden_size: Positive = 768
    intermediate_size: Positive = 3072
    num_hidden_layers: Positive = 12
    num_attention_heads: Positive = 12
    hidden_act: Literal["gelu", "quick_gelu"] = "gelu"
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    q_bias: bool = True
    k_bias: bool = True
    v_bias: bool = True
    subln: bool = False
    swiglu: bool = False

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}"
            )
        return self


class QLIPTextConfig(TowerConfig):
    """``text_config``: CLIP's causal text tower."""

    without_effect = frozenset({"rope", "projection_dim", "dropout"})

    vocab_size: Positive = 49408
    hidden_size: Positive = 512
    intermediate_size: Positive = 2048
    num_attention_heads: Positive = 8
    max_position_embeddings: Positive = 77
    pad_token_id: int = 1
    bos_token_id: int = 49406
    eos_token_id: int = 49407


class _GridConfig(TowerConfig):
    """Config of a tower that works on a grid of patches."""

    image_size: Positive = 224
    patch_size: Positive = 32
    rope: bool = False

    @property
    def grid_size(self) -> int:
        """Patches per side at the trained size."""
        return self.image_size // self.patch_size

    @model_validator(mode="after")
    def _patches_fit(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide image_size {self.image_size}")
        if self.rope and self.head_dim % 4:
            raise ValueError(f"rope needs a head width that is a multiple of 4, got {self.head_dim}")
        return self


class QLIPVisionConfig(_GridConfig):
    """``vision_config``: the encoder and the bottleneck after it."""

    without_effect = frozenset({"post_layernorm", "projection_dim", "dropout"})

    num_channels: Positive = 3
    quantizer: Literal["none", "bsq"] = "none"
    quantizer_cfg: QuantizerConfig = Field(default_factory=QuantizerConfig)
    quantizer_l2_norm: bool = False
    quantizer_embed_type: Literal["identity", "mlp"] = "identity"
    hidden_size_post_q: Positive | None = None

    @property
    def post_size(self) -> int:
        """Width after the bottleneck, equal to the decoder's (P)."""
        return self.hidden_size_post_q or self.hidden_size

    @model_validator(mode="after")
    def _bottleneck_fits(self) -> Self:
        if self.quantizer != "bsq":
            raise ValueError('quantizer must be "bsq": a tokenizer without a quantizer has no tokens')
        if self.quantizer_cfg.input_format != "blc":
            raise ValueError('quantizer_cfg.input_format must be "blc": tokens are a sequence (B, N, L)')
        if self.quantizer_embed_type == "identity":
            widths = {
                "quantizer_cfg.embed_dim": self.quantizer_cfg.embed_dim,
                "hidden_size_post_q": self.post_size,
            }
            for name, width in widths.items():
                if width != self.hidden_size:
                    raise ValueError(
                        f'quantizer_embed_type "identity" has no projections, so {name} {width} must equal'
                        f' hidden_size {self.hidden_size}; use "mlp" for other widths'
                    )
        return self


class QLIPDecoderConfig(_GridConfig):
    """``decoder_config``: the tower that decodes pixels."""

    without_effect = frozenset(
        "post_layernorm projection_dim dropout num_channels quantizer quantizer_cfg quantizer_l2_norm"
        " quantizer_embed_type hidden_size_post_q".split()
    )


class QLIPConfig(Config):
    """The whole model. ``vision_projection_bias`` and ``text_projection_bias`` have no default, as published."""

    always_written = frozenset({"projection_dim", "logit_scale_init_value"})

    text_config: QLIPTextConfig = Field(default_factory=QLIPTextConfig)
    vision_config: QLIPVisionConfig
    decoder_config: QLIPDecoderConfig
    vision_projection_bias: bool
    text_projection_bias: bool
    projection_dim: Positive = 512
    logit_scale_init_value: float = 2.6592

    @model_validator(mode="after")
    def _towers_fit(self) -> Self:
        vision, decoder = self.vision_config, self.decoder_config
        if vision.post_size != decoder.hidden_size:
            raise ValueError(
                f"vision_config's width after the bottleneck, {vision.post_size},"
                f" must equal decoder_config.hidden_size {decoder.hidden_size}"
            )
        if (vision.grid_size, vision.patch_size) != (decoder.grid_size, decoder.patch_size):
            raise ValueError(
                f"vision_config (image {vision.image_size}, patch {vision.patch_size}) and decoder_config"
                f" (image {decoder.image_size}, patch {decoder.patch_size}) must describe the same grid"
            )
        return self

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config") -> Self:
        """See :meth:`Config.from_dict`."""
        kind = values.get("model_type") if isinstance(values, dict) else None
        if kind is not None and (
            "vision_config" not in values or str(kind).startswith("qlip_")
        ):  # a model of another kind
            raise QLIPError(f"{where}: model_type {kind!r} is no tokenizer of images")
        return super().from_dict(values, where)

    @classmethod
    def named(cls, name: str) -> QLIPConfig:
        """Configuration of a published model, e.g. ``"QLIP-B-16-256"``, or of this project's, by name.

        The published models' ``group_size`` is not public: a checkpoint's own config decides.

        Raises:
            QLIPError: no configuration of that name.
        """
        path = assets.path("configs", f"{name}.json")
        if not path.is_file():
            names = sorted(file.stem for file in assets.path("configs").glob("*.json"))
            raise unknown_name(name, "configuration", names)
        return cls.from_file(path)


def model_type_of(folder: Path) -> object:
    """Return ``model_type`` in the ``config.json`` of a checkpoint folder; None if it is absent or broken."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values.get("model_type") if isinstance(values, dict) else None
