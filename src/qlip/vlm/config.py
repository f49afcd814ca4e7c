"""Configuration of a vision-language model: `VLMConfig`, the ``config.json`` of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from qlip.errors import QLIPError
from qlip.lm.causal_config import CausalConfig
from qlip.modeling.config import Config, QLIPVisionConfig, model_type_of
from qlip.modeling.vision import Grid
from qlip.vlm.lora import Adapters

MODEL_TYPE = "qlip_vlm"
"""``model_type`` in config.json, by which a folder is recognised."""
IMAGE_ID = -200
"""Id at the positions of an image's tokens, as in LLaVA; no tokenizer has it."""
IGNORED = -100
"""Label of a position without a loss."""


class VLMConfig(Config):
    """A QLIP tower, a projector and a text decoder.

    Attributes:
        vision_tower: the QLIP whose encoder sees: a folder, a Hub id, a published model's name or "bundled".
        vision_fingerprint: code fingerprint of that QLIP; None takes any.
        vision_config: sizes of the tower.
        own_tower: the folder holds the tower's weights, because they were trained; else they are `vision_tower`'s.
        layer: hidden state that is read: -2 is the second-last block's output (eq. 8), -1 the last one's, and
            "quantized" the codes, mapped to the width of QLIP's decoder.
        pool: 1 gives the decoder each patch; 2 gives it 2 x 2 patches side by side as one token.
        pad_images: images were made square by margins of the mean colour, not by a crop.
        projector: kind of the projector: linear, GELU, linear.
        template: name of the chat template that the model was trained with.
        language_model: folder or Hub id of the text decoder, if its weights are not in this folder.
        language_fingerprint: of that text decoder, see :attr:`qlip.lm.causal.CausalModel.fingerprint`; None takes any.
        text_config: sizes of the text decoder.
        lora: adapters in this folder, which are added to the text decoder's weights when it is loaded.
    """

    folder: ClassVar[str] = "the folder of a vision-language model"

    vision_tower: str = "bundled"
    vision_fingerprint: str | None = None
    vision_config: QLIPVisionConfig
    own_tower: bool = False
    layer: int | Literal["quantized"] = -2
    pool: Literal[1, 2] = 1
    pad_images: bool = False
    projector: Literal["mlp2x_gelu"] = "mlp2x_gelu"
    template: str = "v1"
    language_model: str | None = None
    language_fingerprint: str | None = None
    text_config: CausalConfig
    lora: Adapters | None = None

    @model_validator(mode="after")
    def _layer_exists(self) -> Self:
        depth = self.vision_config.num_hidden_layers
        if self.layer != "quantized" and not -depth - 1 <= self.layer <= depth:
            raise ValueError(f"layer {self.layer}: the tower has {depth}; choose -{depth + 1} to {depth}, or quantized")
        return self

    @property
    def feature_size(self) -> int:
        """Width of an image token before the projector, C."""
        vision = self.vision_config
        width = vision.post_size if self.layer == "quantized" else vision.hidden_size
        return width * self.pool**2

    @property
    def stored(self) -> tuple[str, ...]:
        """Prefixes of the tensors in the folder, adapters aside."""
        return ("projector.", *["tower."] * self.own_tower, *["llm."] * (self.language_model is None))

    def token_grid(self, size: Grid) -> Grid:
        """Rows and columns of an image's tokens.

        Args:
            size: height and width in pixels.

        Raises:
            QLIPError: the sides are not multiples of the patch, or of pooled patches.
        """
        step = self.vision_config.patch_size * self.pool
        if any(side % step or not side for side in size):
            raise QLIPError(
                f"image size {size[0]} x {size[1]} is not a multiple of {step}, {self.pool} patches of"
                f" {self.vision_config.patch_size}; resize it, or take pool 1"
            )
        return size[0] // step, size[1] // step

    def num_image_tokens(self, size: Grid) -> int:
        """Tokens of an image of (height, width) pixels, N. Raises QLIPError as :meth:`token_grid` does."""
        rows, columns = self.token_grid(size)
        return rows * columns

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config") -> Self:
        """See :meth:`Config.from_dict`."""
        kind = values.get("model_type") if isinstance(values, dict) else None
        if kind != MODEL_TYPE:
            hint = "; a UM3 answers with `qlip um3 chat`" if (Path(where).parent / "um3.json").is_file() else ""
            raise QLIPError(
                f"{where}: model_type {kind!r} is no vision-language model of this package ({MODEL_TYPE}){hint}"
            )
        if isinstance(text := values.get("text_config"), dict):
            values = values | {"text_config": CausalConfig.from_dict(text, f"{where}: text_config")}
        return super().from_dict(values, where)

    def to_dict(self) -> dict[str, Any]:
        """Content of ``config.json``; the text decoder's sizes are a stock model's."""
        return super().to_dict() | {"text_config": self.text_config.to_dict()}


def is_vlm(folder: Path) -> bool:
    """Return True if a folder's ``config.json`` is that of a vision-language model."""
    return model_type_of(folder) == MODEL_TYPE
