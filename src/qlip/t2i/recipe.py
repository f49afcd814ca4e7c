"""Recipe of the task ``t2i``: a decoder transformer over the tokens of a dataset."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from qlip.lm.config import DecoderConfig
from qlip.t2i.settings import DrawSettings
from qlip.training.recipe_schema import Count, RunRecipe, Section, Share, Steps

FROM_DATA = (
    "grid",
    "codebook_size",
    "num_groups",
    "condition",
    "condition_size",
    "prefix_length",
    "code_fingerprint",
    "text_encoder",
    "text_fingerprint",
    "classes",
    "target_positions",
)
"""Keys of a decoder's configuration that the data and the other sections decide."""


class ModelSection(Section):
    """Decoder to train: sizes for random weights, or a folder to start from.

    Attributes:
        size: one of LlamaGen's sizes, such as ``LlamaGen-B``; its FFN, rotary positions and dropouts.
        config: keys of :class:`qlip.lm.DecoderConfig`, over those of `size`, except those that the data decide.
        init: a decoder's folder, or a Hub id.
    """

    size: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    init: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.init is None) == (self.size is None and not self.config):
            raise ValueError("give either init (a decoder's folder), or size, config or both")
        if decided := [name for name in FROM_DATA if name in self.config]:
            raise ValueError(f"config.{decided[0]} follows from the data and the other sections; remove it")
        if self.init is None:
            # as many bits as any token has: `rounds` is checked against the data's later
            self.build(grid=(2, 2), codebook_size=1 << 30, num_groups=2, condition_size=1)
        return self

    def build(self, **decided: Any) -> DecoderConfig:
        """The configuration of a random model.

        Args:
            **decided: keys that the data decide.

        Raises:
            QLIPError: no such size, unknown keys, or sizes that do not fit.
        """
        if self.size is not None:
            return DecoderConfig.named(self.size, **self.config, **decided)
        return DecoderConfig.from_dict(self.config | decided, "model.config")


class TokenDataSection(Section):
    """Tokens, and what their images are drawn from: a token dataset, LlamaGen's folders of codes, or made scenes.

    Attributes:
        tokens: folder or address of a token dataset; either this, or `codes`, or `scenes`.
        codes: a folder ``*_codes`` beside its ``*_labels`` as LlamaGen's scripts write them, or one that holds such a
            pair, or several that are drawn equally often, such as those of two crop ranges; the condition is the class.
        codebook_size, num_classes: of `codes`.
        scenes: a split of the made scenes, such as ``captioned``: new ones are drawn, and encoded by the recipe's
            `tokenizer`, at every step; the condition is their caption.
        group_size: bits per group; None takes the dataset's.
        condition: ``caption``, one of an image's captions; ``class``, its label; ``none``, nothing; None takes captions
            where the first images have them, else labels where they have those, else nothing.
        vocabulary: a checkpoint whose tokenizer reads captions; not read with ``model.init``, which has its own.
        templates: a packaged list, such as ``cifar`` or ``imagenet``, or a text file: makes captions of the labels of
            images without captions.
        short_caption: probability that a caption ends at its first full stop (LlamaGen's second stage has 0.3).
        text_encoder: name of an encoder (:mod:`qlip.lm.text_encoders`) whose features of captions are the condition,
            instead of ids; None takes that of ``model.init``, if it has one.
        one_view: of the views of an image, such as crops, draw one per epoch.
        num_workers: reading processes.
    """

    tokens: str | None = None
    codes: str | tuple[str, ...] | None = None
    codebook_size: Annotated[int, Field(ge=2)] = 16384
    num_classes: Count = 1000
    scenes: str | None = None
    group_size: Count | None = None
    condition: Literal["caption", "class", "none"] | None = None
    vocabulary: str = "bundled"
    templates: str | None = None
    short_caption: Share = 0.0
    text_encoder: str | None = None
    one_view: bool = False
    num_workers: Steps = 0

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [name for name in ("tokens", "codes", "scenes") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError("give one of tokens, codes and scenes" + (f", not {' and '.join(given)}" if given else ""))
        return self

    def unread(self) -> dict[str, str]:
        """Settings of other kinds of data."""
        found = {} if self.codes else dict.fromkeys(("codebook_size", "num_classes"), "codes")
        if not self.tokens:
            found |= dict.fromkeys(("condition", "templates", "one_view"), "tokens")
        if self.codes:
            keys = ("group_size", "vocabulary", "short_caption", "text_encoder")
            found |= dict.fromkeys(keys, "tokens or scenes")
        return found


class InputNoiseSection(Section):
    """Noise on the tokens that the decoder reads; the targets stay clean (arXiv 2412.04431 flips bits).

    Attributes:
        share: share of the groups, or bits, that are replaced by random ones.
        unit: ``group`` or ``bit``.
    """

    share: Annotated[float, Field(gt=0, le=1)]
    unit: Literal["group", "bit"] = "group"


class RandomOrderSection(Section):
    """Random order of the tokens, annealed to raster order (RAR, arXiv 2411.00776).

    Attributes:
        start, end: steps between which the share of images in random order falls from 1 to 0.
    """

    start: Steps
    end: Count

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.end <= self.start:
            raise ValueError(f"end {self.end} must be after start {self.start}")
        return self

    def share(self, step: int) -> float:
        """Share of images in random order at a step."""
        return min(1.0, max(0.0, (self.end - step) / (self.end - self.start)))


class ValidationSection(Section):
    """Bits per image of a held-out token dataset.

    Attributes:
        tokens: folder or address of the dataset.
        every: steps between two measurements.
        limit: images measured.
    """

    tokens: str
    every: Count
    limit: Count = 256


class DrawingSection(Section):
    """Settings that the trained decoder draws with unless told otherwise, see :class:`qlip.t2i.settings.DrawSettings`.

    What is left out is that of ``model.init``, else the default of `DrawSettings`.

    Attributes:
        guidance: scale, or a schedule such as ``power:4:2.5``.
        temperature, top_k, top_p, min_p: see :class:`qlip.lm.Sampling`.
    """

    guidance: str | float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    @model_validator(mode="after")
    def _valid(self) -> Self:
        self.over(DrawSettings())
        return self

    def over(self, settings: DrawSettings) -> DrawSettings:
        """Other settings with the values that are given here."""
        return DrawSettings(**settings.to_dict() | self.model_dump(exclude_none=True))


class T2IRecipe(RunRecipe):
    """Recipe of the task ``t2i``.

    Attributes:
        condition_dropout: share of the images whose condition is replaced by the null condition, for guidance; None
            takes the model's.
        input_noise: None reads the tokens as they are.
        random_order: None predicts in raster order.
        tokenizer: checkpoint that turns the first batch into an image file; left out if it made other tokens. With
            ``data.scenes`` it also encodes the scenes. The trained decoder's folder names it.
        drawing: settings to draw with, in the folder of the trained decoder, over those of ``model.init``.
    """

    FREE: ClassVar[tuple[str, ...]] = (*RunRecipe.FREE, "data.num_workers", "validation", "tokenizer", "drawing")

    task: Literal["t2i"] = "t2i"
    model: ModelSection
    data: TokenDataSection
    condition_dropout: Share | None = None
    input_noise: InputNoiseSection | None = None
    random_order: RandomOrderSection | None = None
    validation: ValidationSection | None = None
    tokenizer: str = "bundled"
    drawing: DrawingSection | None = None

    def unread(self) -> dict[str, str]:
        """Those of every recipe, and settings of captions and conditions without them."""
        found = super().unread()
        if self.data.condition in ("class", "none"):
            keys = ("data.vocabulary", "data.text_encoder", "data.templates", "data.short_caption")
            found |= dict.fromkeys(keys, "data.condition: caption")
        elif self.data.text_encoder is not None:
            found["data.vocabulary"] = "ids of captions, without data.text_encoder"
        if self.data.condition == "none":
            found["condition_dropout"] = "a condition"
        if self.data.codes:
            found["validation"] = "data.tokens or data.scenes"
        return found
