"""Recipe of the task ``vlm``: a text decoder that learns to see through a QLIP tower, in two stages as LLaVA's."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from qlip.lm.causal_config import CausalConfig
from qlip.training.recipe_schema import Count, OptimizerSection, Rate, RunRecipe, Section, Share, Steps
from qlip.vlm.templates import TEMPLATES

Part = Literal["tower", "projector", "llm"]


class ModelSection(Section):
    """Tower, projector and text decoder.

    Attributes:
        vision_tower: the QLIP that sees: a folder, a Hub id, a published model's name or "bundled".
        layer: hidden state of the tower, -2 for the second-last block's, or "quantized"; see
            :class:`qlip.vlm.config.VLMConfig`.
        pool: 2 puts 2 x 2 patches side by side into one image token; 1 takes each patch.
        template: chat template, see :mod:`qlip.vlm.templates`; None is that of `llm`, or of `init`.
        llm: folder or Hub id of the text decoder to start from.
        config: sizes of a text decoder of random weights instead: keys of :class:`qlip.lm.causal.CausalConfig` except
            ``vocab_size``.
        vocabulary: with `config`, the largest size of the vocabulary, which is trained on the data's texts.
        init: folder of a vision-language model to start from, such as stage 1's; it decides all the others, except
            that another template may be given.
    """

    vision_tower: str = "bundled"
    layer: int | Literal["quantized"] = -2
    pool: Literal[1, 2] = 1
    template: str | None = None
    llm: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    vocabulary: Annotated[int, Field(ge=300)] = 2048
    init: str | None = None

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        given = [name for name in ("llm", "config", "init") if getattr(self, name)]
        if len(given) != 1:
            found = f", not {' and '.join(given)}" if given else ""
            raise ValueError(f"give one of llm (a text decoder's folder), config (sizes) and init (a model){found}")
        if self.template is not None and self.template not in TEMPLATES:
            raise ValueError(f"template {self.template!r}: there are {', '.join(TEMPLATES)}")
        if self.template is None and self.config:
            raise ValueError(f"template is missing, as config makes a new text decoder: {', '.join(TEMPLATES)}")
        if self.config:
            self.build(300)  # refuses sizes that do not fit
        return self

    def build(self, vocab_size: int) -> CausalConfig:
        """Sizes of the text decoder of random weights.

        Raises:
            QLIPError: unknown keys, or sizes that do not fit.
        """
        return CausalConfig.from_dict(self.config | {"vocab_size": vocab_size}, "model.config")

    def unread(self) -> dict[str, str]:
        """Settings that ``init`` decides, and the vocabulary of a decoder that has one."""
        found = {} if self.config else {"vocabulary": "config"}
        if self.init is not None:
            found |= dict.fromkeys(("vision_tower", "layer", "pool"), "llm or config")
        return found


class DataSection(Section):
    """Conversations about images: a LLaVA JSON, or questions about made scenes.

    Attributes:
        conversations: file of conversations in LLaVA's layout, JSON or JSON Lines.
        images: folder that the paths of its images start from.
        questions: a split of the questions about made scenes, such as ``train``, instead of a file.
        captions: with `questions`, share of the samples that are captioned scenes to be described.
        max_length: largest number of positions of a sample, image tokens included.
        pad_images: make images square by margins of the mean colour instead of a crop.
        packing: put several samples into one row of `max_length` positions; they do not see each other. The batch, the
            loss and the steps stay the same; micro-batches, and the samples that the log counts, are rows then.
        group_by_length: batches of samples of similar length, with or without images.
        num_workers: reading processes.
    """

    conversations: str | None = None
    images: str | None = None
    questions: str | None = None
    captions: Share = 0.0
    max_length: Annotated[int, Field(ge=8)] = 2048
    pad_images: bool = False
    packing: bool = False
    group_by_length: bool = False
    num_workers: Steps = 0

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.conversations is None) == (self.questions is None):
            raise ValueError(
                "give either conversations (a file in LLaVA's layout) or questions (a split of made scenes)"
            )
        if self.packing and self.group_by_length:
            raise ValueError("packing has no rows of unequal length; remove group_by_length")
        return self

    def unread(self) -> dict[str, str]:
        """Settings of the other kind of data."""
        if self.questions is None:
            return {"captions": "questions"}
        return dict.fromkeys(("images", "pad_images", "packing", "group_by_length"), "conversations")


class LoRASection(Section):
    """Low-rank adapters of the text decoder (arXiv 2106.09685), by peft; the decoder itself stays as it is.

    Attributes:
        rank, alpha, dropout: of the adapters.
        targets: regular expression of the adapted modules' names in the text decoder, matched as a whole; the default
            is every linear layer of its blocks.
    """

    rank: Count = 128
    alpha: Rate = 256.0
    dropout: Share = 0.05
    targets: str = r"layers\.\d+\.(attention\.(wqkv|wo)|feed_forward\.(w1|w2|w3))"

    @model_validator(mode="after")
    def _expression(self) -> Self:
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"targets {self.targets!r}: not a regular expression ({error})") from None
        return self


class VLMOptimizerSection(OptimizerSection):
    """Optimizer with learning rates of their own for parts of the model.

    Attributes:
        parts: peak learning rates of parts that have one of their own.
    """

    parts: dict[Part, Rate] = Field(default_factory=dict)


class ValidationSection(Section):
    """Exact answers to questions about made scenes, beside those to the same questions with other scenes' images.

    Attributes:
        every: steps between two measurements.
        questions: split of the questions.
        per_kind: questions of each kind.
    """

    every: Count
    questions: str = "seen"
    per_kind: Count = 20


class VLMRecipe(RunRecipe):
    """Recipe of the task ``vlm``.

    Attributes:
        train: parts that train: the projector alone in stage 1, the projector and the text decoder in stage 2, and the
            tower too if it is named.
        lora: train adapters of the text decoder instead of itself.
        validation: None measures nothing.
    """

    FREE: ClassVar[tuple[str, ...]] = (*RunRecipe.FREE, "data.num_workers", "validation")

    task: Literal["vlm"] = "vlm"
    model: ModelSection
    data: DataSection
    train: Annotated[tuple[Part, ...], Field(min_length=1)] = ("projector", "llm")
    lora: LoRASection | None = None
    optimizer: VLMOptimizerSection = VLMOptimizerSection()
    validation: ValidationSection | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.lora is not None and "llm" not in self.train:
            raise ValueError("lora trains adapters of the text decoder; add llm to train, or remove lora")
        if self.model.config and (self.lora is not None or "llm" not in self.train):
            raise ValueError("model.config makes a text decoder of random weights, which must train; add llm to train")
        return self

    def unread(self) -> dict[str, str]:
        """Those of every recipe, and rates of parts that do not train."""
        idle = [part for part in ("tower", "projector", "llm") if part not in self.train]
        return super().unread() | {f"optimizer.parts.{part}": f"train: [{part}]" for part in idle}
