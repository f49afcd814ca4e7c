"""Configuration of a decoder transformer over visual tokens: `DecoderConfig`, with LlamaGen's sizes by name.

N tokens of an image lie on a grid, row by row. A token is K groups of one vocabulary of V values; QLIP's groups have
V = 2^G, from G bits. The head says how the groups of a token are modelled (:mod:`qlip.lm.heads`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from qlip.errors import QLIPError
from qlip.modeling.config import Config, Positive, model_type_of
from qlip.registry import unknown_name

Dropout = Annotated[float, Field(ge=0, lt=1)]
HeadKind = Literal["flat", "parallel", "chain", "depth", "bits", "masked_bits"]
Rotary = Literal["axial", "1d", "raster", "frequencies"]

MODEL_TYPE = "qlip_decoder"
"""``model_type`` in config.json, by which a folder is recognised."""

SIZES: dict[str, tuple[int, int, int]] = {
    "LlamaGen-B": (12, 768, 12),
    "LlamaGen-L": (24, 1024, 16),
    "LlamaGen-XL": (36, 1280, 20),
    "LlamaGen-XXL": (48, 1536, 24),
    "LlamaGen-XXXL": (48, 2560, 40),
    "LlamaGen-1B": (22, 2048, 32),
    "LlamaGen-3B": (24, 3200, 32),
    "LlamaGen-7B": (32, 4096, 32),
}
"""Layers, width and heads of LlamaGen's sizes (arXiv 2406.06525, table 1, and its repository)."""


class HeadConfig(Config):
    """Modelling of the K groups of a token; see :mod:`qlip.lm.heads`.

    Attributes:
        kind: ``flat``, ``parallel``, ``chain``, ``depth``, ``bits`` or ``masked_bits``.
        hidden_size: width inside the head (chain, depth, masked bits); None is the decoder's.
        num_layers: transformer layers of the depth head.
        num_attention_heads: of the depth head, with as many key-value heads.
        rounds: unmasking rounds per token of the masked-bits head.
    """

    kind: HeadKind = "parallel"
    hidden_size: Positive | None = None
    num_layers: Positive = 4
    num_attention_heads: Positive = 4
    rounds: Positive = 4

    @model_validator(mode="after")
    def _read(self) -> Self:
        readers = {
            "hidden_size": ("chain", "depth", "masked_bits"),
            "num_layers": ("depth",),
            "num_attention_heads": ("depth",),
            "rounds": ("masked_bits",),
        }
        for name, kinds in readers.items():
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is used only with kind {' or '.join(kinds)}; remove it")
        return self


class DecoderConfig(Config):
    """A decoder transformer with RMSNorm, rotary positions, SwiGLU and grouped-query attention, without biases.

    Attributes:
        hidden_size: width D.
        num_hidden_layers, num_attention_heads: depth, and query heads per layer.
        num_key_value_heads: key-value heads; None is one per query head.
        head_dim: width of an attention head; None is ``hidden_size / num_attention_heads``.
        intermediate_size: width of the SwiGLU; None is LlamaGen's, 8/3 D rounded up to a multiple of 256.
        rms_norm_eps: added to the mean square.
        qk_norm: RMSNorm of queries and keys over the head width, before rotation, as in Qwen3.
        rotary: ``axial``, half the lanes turn with the row and half with the column (LlamaGen); ``1d``, with the
            position in the sequence; ``raster``, 1-D with frequencies of which half repeat from row to row; or
            ``frequencies``, 1-D with `rotary_frequencies`.
        rotary_base: base of the frequencies.
        rotary_frequencies: radians per position for each pair of lanes.
        prefix_rotary: rotation of the prefix: ``zero`` makes its queries and keys zero (LlamaGen), ``identity`` leaves
            them unrotated, ``positions`` rotates them as the first positions of the sequence (1-D only; what stock
            Llama does).
        grid: rows and columns of tokens.
        codebook_size: V, number of values of a group.
        num_groups: K, groups per token.
        head: modelling of the groups of a token.
        shared_embeddings: input embeddings have a row per value, for all groups, instead of a row per (group, value).
        condition: ``class``, a class number; ``features``, features of a text encoder; or ``tokens``, ids of text.
        condition_size: number of classes, width of the features, or number of ids.
        prefix_length: T, positions of the condition; 1 for a class.
        condition_dropout: probability that training replaces a condition by the null condition.
        embedding_dropout, attention_dropout, residual_dropout, ffn_dropout: of the input, the attention weights, and
            the outputs of attention and SwiGLU.
        target_positions: learned embeddings of the position to be predicted, for training in random order
            (arXiv 2411.00776).
        classes: names of the classes, in the order of their numbers; None if they have none.
        code_fingerprint: of the tokenizer whose tokens the model was trained on; None takes any tokens.
        text_encoder: name of the encoder of a ``features`` condition, see :mod:`qlip.lm.text_encoders`; None leaves it
            open.
        text_fingerprint: of that encoder; None takes any features.
    """

    folder: ClassVar[str] = "a decoder's folder"

    hidden_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive | None = None
    head_dim: Positive | None = None
    intermediate_size: Positive | None = None
    rms_norm_eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-5
    qk_norm: bool = False
    rotary: Rotary = "raster"
    rotary_base: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10000.0
    rotary_frequencies: tuple[float, ...] | None = None
    prefix_rotary: Literal["zero", "identity", "positions"] = "positions"
    grid: tuple[Positive, Positive]
    codebook_size: Annotated[int, Field(ge=2)]
    num_groups: Positive = 1
    head: HeadConfig = Field(default_factory=HeadConfig)
    shared_embeddings: bool = False
    condition: Literal["class", "features", "tokens"] = "class"
    condition_size: Positive
    prefix_length: Positive = 1
    condition_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    embedding_dropout: Dropout = 0.0
    attention_dropout: Dropout = 0.0
    residual_dropout: Dropout = 0.0
    ffn_dropout: Dropout = 0.0
    target_positions: bool = False
    classes: tuple[str, ...] | None = None
    code_fingerprint: str | None = None
    text_encoder: str | None = None
    text_fingerprint: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads {self.kv_heads} does not divide num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size};"
                " give head_dim"
            )
        multiple = 2 if self.rotary in ("1d", "frequencies") else 4
        if self.head_width % multiple:
            raise ValueError(f"rotary {self.rotary!r} needs a head_dim that is a multiple of {multiple}")
        if (self.rotary == "frequencies") != (self.rotary_frequencies is not None):
            raise ValueError('rotary_frequencies belong to rotary "frequencies", and to no other')
        if self.rotary_frequencies is not None and len(self.rotary_frequencies) != self.head_width // 2:
            raise ValueError(
                f"rotary_frequencies has {len(self.rotary_frequencies)} values; need one per pair of lanes,"
                f" {self.head_width // 2}"
            )
        if self.rotary == "axial" and self.prefix_rotary == "positions":
            raise ValueError('prefix_rotary "positions" needs 1-D positions; with rotary "axial" use zero or identity')
        if self.condition == "class" and self.prefix_length != 1:
            raise ValueError(f"prefix_length {self.prefix_length}: a class is one position; remove prefix_length")
        if self.classes is not None and (self.condition != "class" or len(self.classes) != self.condition_size):
            raise ValueError(f"{len(self.classes)} classes: need the {self.condition_size} names of a class condition")
        for name in ("text_encoder", "text_fingerprint"):
            if self.condition != "features" and getattr(self, name) is not None:
                raise ValueError(f"{name} is used only with condition features; remove it")
        if self.head.kind in ("bits", "masked_bits") and self.codebook_size & (self.codebook_size - 1):
            raise ValueError(f"head {self.head.kind!r} needs a codebook_size that is a power of two")
        if self.head.kind == "depth" and self.head_size % (2 * self.head.num_attention_heads):
            raise ValueError(
                f"the depth head's width {self.head_size} over {self.head.num_attention_heads} attention heads:"
                " need an even width per head"
            )
        if self.head.kind == "masked_bits" and self.head.rounds > self.num_groups * self.group_size:
            raise ValueError(f"rounds {self.head.rounds}: more than the bits of a token")
        if self.target_positions and self.head.kind == "flat" and self.num_groups > 1:
            raise ValueError("target_positions need a step per token; use another head than flat")
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
    def ffn_width(self) -> int:
        """Width of the SwiGLU."""
        return self.intermediate_size or llamagen_ffn_width(self.hidden_size)

    @property
    def head_size(self) -> int:
        """Width inside the head."""
        return self.head.hidden_size or self.hidden_size

    @property
    def group_size(self) -> int:
        """Number of bits of a group, G; of the values rounded up where they are no power of two."""
        return (self.codebook_size - 1).bit_length()

    @property
    def num_tokens(self) -> int:
        """Number of tokens of an image, N."""
        return self.grid[0] * self.grid[1]

    @property
    def groups_per_step(self) -> int:
        """Groups that one step of the transformer predicts: one with the flat head, else all."""
        return 1 if self.head.kind == "flat" else self.num_groups

    @property
    def num_steps(self) -> int:
        """Steps of the transformer per image, S."""
        return self.num_tokens * self.num_groups // self.groups_per_step

    @property
    def length(self) -> int:
        """Positions of a whole sequence: the prefix and all steps."""
        return self.prefix_length + self.num_steps

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config") -> Self:
        """See :meth:`Config.from_dict`."""
        if isinstance(values, dict) and values.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise QLIPError(f"{where}: model_type {values['model_type']!r} is no decoder of visual tokens")
        return super().from_dict(values, where)

    @classmethod
    def named(cls, name: str, **changes: Any) -> DecoderConfig:
        """LlamaGen's class-conditional decoder of a size, for 16 x 16 tokens of 16,384 values and 1,000 classes.

        Args:
            name: such as ``LlamaGen-B``.
            **changes: attributes with other values; with ``condition="features"`` the prefix has 120 positions of
                2,048 features, as LlamaGen's text-to-image models.

        Raises:
            QLIPError: no such size, or the changes do not fit.
        """
        if name not in SIZES:
            raise unknown_name(name, "decoder", sorted(SIZES))
        layers, width, heads = SIZES[name]
        values: dict[str, Any] = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "rotary": "axial",
            "prefix_rotary": "zero",
            "grid": (16, 16),
            "codebook_size": 16384,
            "head": {"kind": "flat"},
            "embedding_dropout": 0.1,
            "residual_dropout": 0.1,
            "ffn_dropout": 0.1,
        }
        if changes.get("condition", "class") == "class":
            values |= {"condition_size": 1000}
        elif changes["condition"] == "features":
            values |= {"condition_size": 2048, "prefix_length": 120}
        return cls.from_dict(values | changes, name)


def llamagen_ffn_width(hidden_size: int) -> int:
    """LlamaGen's width of the SwiGLU: 8/3 of the model's, rounded up to a multiple of 256."""
    return -(-(2 * 4 * hidden_size // 3) // 256) * 256


def is_decoder(folder: Path) -> bool:
    """Return whether a checkpoint folder's ``config.json`` is a decoder's, not another's, absent or broken."""
    return model_type_of(folder) == MODEL_TYPE
