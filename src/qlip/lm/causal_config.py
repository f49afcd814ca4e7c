"""Configuration of a text decoder: `CausalConfig`, read from and written as a stock Llama's or Qwen3's config.json.

transformers 4 writes ``rope_theta`` and ``rope_scaling``, 5 both inside ``rope_parameters``; both are read, and the
older form is written, which both versions read. A field that would change the arithmetic is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from qlip.errors import QLIPError
from qlip.modeling.config import Config, Positive

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Class of transformers by ``model_type``."""

_ABSENT: Mapping[str, Mapping[str, Any]] = {"llama": {}, "qwen3": {"num_key_value_heads": 32, "head_dim": 128}}
"""Values of fields that a file leaves out, where they are not the same for both model types."""

_FIXED: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "hidden_act": ("silu",),
    "layer_types": (None,),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
}
"""Fields of stock files that are read only with one of these values."""

Real = Annotated[float, Field(gt=0, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0)]


class Llama3Scaling(Config):
    """Llama 3's stretching of the rotary wavelengths that are long against the original context.

    Attributes:
        factor: by which long wavelengths are stretched.
        low_freq_factor, high_freq_factor: wavelengths above context / low are stretched, those below context / high are
            not, and between the two the frequencies are interpolated.
        original_max_position_embeddings: the original context.
    """

    factor: Real
    low_freq_factor: Real
    high_freq_factor: Real
    original_max_position_embeddings: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor:g} is not below {self.high_freq_factor:g}, the high"
            )
        return self


class CausalConfig(Config):
    """A text decoder as Llama, or with `qk_norm` as Qwen3: RMSNorm, rotary positions, SwiGLU, no biases.

    Attributes:
        vocab_size: number of ids, V.
        hidden_size: width D.
        num_hidden_layers, num_attention_heads: depth, and query heads per layer.
        num_key_value_heads: key-value heads; None is one per query head.
        head_dim: width of an attention head; None is ``hidden_size / num_attention_heads``.
        intermediate_size: width of the SwiGLU.
        rms_norm_eps: added to the mean square.
        rope_theta: base of the rotary frequencies.
        rope_scaling: Llama 3's, or None.
        tie_word_embeddings: the output layer has the weights of the input embeddings.
        max_position_embeddings: longest sequence.
        qk_norm: RMSNorm of queries and keys over the head width before rotation: a Qwen3.
        bos_token_id, eos_token_id, pad_token_id: ids that a folder names; unused by the model itself.
    """

    folder: ClassVar[str] = "a language model's folder"
    without_effect: ClassVar[frozenset[str]] = frozenset(
        "is_llama_config max_window_layers transformers.js_config unsloth_fixed unsloth_version use_cache".split()
    )

    vocab_size: Positive
    hidden_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive | None = None
    head_dim: Positive | None = None
    intermediate_size: Positive
    rms_norm_eps: Real = 1e-6
    rope_theta: Real = 10000.0
    rope_scaling: Llama3Scaling | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: Positive = 2048
    qk_norm: bool = False
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | tuple[TokenId, ...] | None = None
    pad_token_id: int | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads {self.kv_heads} does not divide num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_size % self.num_attention_heads and not (self.qk_norm and self.head_dim):
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}"
            )
        if self.head_width % 2:
            raise ValueError(f"heads of width {self.head_width}: rotary positions need an even head_dim")
        return self

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Width of an attention head, d."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def length(self) -> int:
        """Longest sequence in positions."""
        return self.max_position_embeddings

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a text, as the folder names them."""
        ids = self.eos_token_id
        return ids if isinstance(ids, tuple) else () if ids is None else (ids,)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config") -> Self:
        """Check and build a configuration from a stock ``config.json``.

        Args:
            values: the parsed file.
            where: name of the source in errors, normally the file.

        Raises:
            QLIPError: another architecture, a field that would change the arithmetic, an unknown or missing one, or
                sizes that do not fit each other.
        """
        if not isinstance(values, dict) or "model_type" not in values:
            return super().from_dict(values, where)
        kind = values["model_type"]
        if kind not in CLASSES:
            raise QLIPError(f"{where}: model_type {kind!r}: need a language model of type {' or '.join(CLASSES)}")
        derived = ("model_type", "architectures")
        found = {**_ABSENT[kind], **{name: one for name, one in values.items() if name not in derived}}
        found |= _rotary(found, where)
        found.pop("rope_parameters", None)
        if found.get("use_sliding_window") in (False, None) and kind == "qwen3":
            found.pop("sliding_window", None)
        if set(found.get("layer_types") or ()) == {"full_attention"}:
            found.pop("layer_types")
        for name, allowed in _FIXED.items():
            if name in found and (value := found.pop(name)) not in allowed:
                raise QLIPError(f"{where}: {name} {value!r} is not supported; need {allowed[0]!r}")
        return super().from_dict(found | {"qk_norm": kind == "qwen3"}, where)

    def to_dict(self) -> dict[str, Any]:
        """Content of a stock ``config.json``, from which `from_dict` makes this configuration."""
        found = super().to_dict()
        kind = "qwen3" if found.pop("qk_norm") else "llama"
        if self.rope_scaling is not None:
            found["rope_scaling"] = {"rope_type": "llama3"} | found["rope_scaling"]
        sizes = {"num_key_value_heads": self.kv_heads, "head_dim": self.head_width}
        stock = {"architectures": [CLASSES[kind]], "model_type": kind, "hidden_act": "silu", "attention_bias": False}
        return stock | found | sizes


def _rotary(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` of a stock file of either form, without other kinds of scaling."""
    settings = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(settings, dict):
        raise QLIPError(f"{where}: rope_scaling {settings!r}: need an object, or null")
    settings = dict(settings)
    found: dict[str, Any] = {"rope_scaling": None}
    theta = settings.pop("rope_theta", values.get("rope_theta"))
    if theta is not None:
        found["rope_theta"] = theta
    kind = settings.pop("rope_type", settings.pop("type", "default"))
    if settings.pop("partial_rotary_factor", 1) not in (1, None):
        raise QLIPError(f"{where}: partial_rotary_factor is not supported; need 1.0")
    if kind == "llama3":
        found["rope_scaling"] = settings
    elif kind != "default":
        raise QLIPError(f"{where}: rope_scaling of type {kind!r} is not supported; need 'default' or 'llama3'")
    return found
