"""Recipe of the task ``um3``: one decoder learns to read, to describe and to draw."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from qlip.lm.causal_config import CausalConfig
from qlip.training.recipe_schema import Count, RunRecipe, Section, Weight
from qlip.um3.data.config import DataSection, TextSource

FROM_DATA = ("vocab_size", "qk_norm", "bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of a decoder's configuration that the tokenizer and other settings decide."""


class ModelSection(Section):
    """Decoder, its rows for images, and the QLIP whose tokens these are.

    Attributes:
        vision_tower: the QLIP: a folder, a Hub id, a published model's name or "bundled".
        group_size: bits per visual id; None takes the QLIP's.
        llm: folder or Hub id of a text decoder to grow: its text rows stay, visual ones are added.
        config: sizes of a decoder of random weights instead: keys of :class:`qlip.lm.causal_config.CausalConfig`
            except those in `FROM_DATA`.
        tokenizer: with `config`, folder or Hub id of a tokenizer of text, such as Llama 3's; None trains one.
        vocabulary: largest number of text rows of a vocabulary that is trained on the data's texts.
        image_tokens: with `llm` or `tokenizer`, names of two tokens that it has, such as reserved ones, to stand before
            and behind an image; None adds ``<boi>`` and ``<eoi>``, as a new vocabulary has them.
        qk_norm: with `config`, norms queries and keys, as Qwen3 does; a grown decoder keeps what it has.
        rows: visual rows are shared by the groups of a token, or each group has its own.
        softmax: over text rows or visual rows (eq. 6), or over all rows together.
        row_start: visual rows start at the mean of the text rows, at random, or each as the sum of its bits' vectors.
        init: folder of a UM3 to start from; it decides all the others.
    """

    vision_tower: str = "bundled"
    group_size: Count | None = None
    llm: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    tokenizer: str | None = None
    vocabulary: Annotated[int, Field(ge=300)] = 4096
    image_tokens: tuple[str, str] | None = None
    qk_norm: bool = True
    rows: Literal["shared", "per_group"] = "shared"
    softmax: Literal["separate", "joint"] = "separate"
    row_start: Literal["mean", "random", "bits"] = "mean"
    init: str | None = None

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        given = [name for name in ("llm", "config", "init") if getattr(self, name)]
        if len(given) != 1:
            found = f", not {' and '.join(given)}" if given else ""
            raise ValueError(f"give one of llm (a text decoder's folder), config (sizes) and init (a UM3){found}")
        if decided := [name for name in FROM_DATA if name in self.config]:
            raise ValueError(f"config.{decided[0]} follows from the vocabulary and model.qk_norm; remove it")
        if self.config:
            self.build(300)  # refuses sizes that do not fit
        return self

    def build(self, text_rows: int) -> CausalConfig:
        """Sizes of a decoder of random weights, before it has visual rows.

        Raises:
            QLIPError: unknown keys, or sizes that do not fit.
        """
        return CausalConfig.from_dict(self.config | {"vocab_size": text_rows, "qk_norm": self.qk_norm}, "model.config")

    def unread(self) -> dict[str, str]:
        """Settings that another start decides."""
        found = {} if self.config else dict.fromkeys(("tokenizer", "vocabulary", "qk_norm"), "config")
        if self.tokenizer is not None:
            found["vocabulary"] = "config, and without tokenizer"
        if self.llm is None and self.tokenizer is None:
            found["image_tokens"] = "llm or tokenizer"
        if self.init is not None:
            names = ("vision_tower", "group_size", "rows", "softmax", "row_start")
            found |= dict.fromkeys(names, "llm or config")
        return found


class LossSection(Section):
    """Weights of the loss, a mean over all targets; few targets beside many need one, such as captions beside images.

    Attributes:
        visual_weight: of a visual target; one of text has 1.
        caption_weight: of a text target behind its image.
        z_loss: of the squared logarithm of the softmax's denominator (arXiv 2204.02311, section 5).
    """

    visual_weight: Weight = 1.0
    caption_weight: Weight = 1.0
    z_loss: Weight = 0.0


class ValidationSection(Section):
    """Held-out documents whose likelihoods are measured between the steps.

    Attributes:
        every: steps between two measurements.
        scenes: split of the captioned made scenes, such as ``seen``: captions of images, and images of captions; None
            measures none.
        num_scenes: number of scenes.
        text: held-out texts; each source has figures of its own.
        num_rows: rows of ``data.length`` positions of each source of text, from its first document on.
    """

    every: Count
    scenes: str | None = None
    num_scenes: Annotated[int, Field(ge=2)] = 64
    text: tuple[TextSource, ...] = ()
    num_rows: Count = 16

    @model_validator(mode="after")
    def _measures(self) -> Self:
        if self.scenes is None and not self.text:
            raise ValueError("nothing to measure; give scenes (a split), text (sources) or both")
        return self

    def unread(self) -> dict[str, str]:
        """Sizes of sets that are not measured."""
        found = {} if self.scenes is not None else {"num_scenes": "scenes"}
        return found | ({} if self.text else {"num_rows": "text"})


class UM3Recipe(RunRecipe):
    """Recipe of the task ``um3``; a sample is a row of ``data.length`` positions.

    Attributes:
        validation: None measures nothing.
    """

    FREE: ClassVar[tuple[str, ...]] = (*RunRecipe.FREE, "data.num_workers", "data.prefetch", "validation")

    task: Literal["um3"] = "um3"
    model: ModelSection
    data: DataSection
    losses: LossSection = LossSection()
    validation: ValidationSection | None = None
