"""Recipes of the tokenizer's two stages."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from qlip.data.config import DataConfig
from qlip.modeling.parts import Part
from qlip.training.recipe_schema import RunRecipe
from qlip.training.tasks.recipe_schema import (
    DiscriminatorSection,
    ModelSection,
    Stage1Losses,
    Stage2Losses,
    TokenizerLogSection,
    TokenizerOptimizerSection,
    ValidationSection,
    VocabularySection,
)


class TokenizerRecipe(RunRecipe):
    """Settings that both stages have in common."""

    FREE: ClassVar[tuple[str, ...]] = (
        *RunRecipe.FREE,
        "validation",
        "data.num_workers",
        "data.prefetch",
        "data.store",
    )

    model: ModelSection
    vocabulary: VocabularySection | None = None
    data: DataConfig
    optimizer: TokenizerOptimizerSection = TokenizerOptimizerSection()
    validation: ValidationSection | None = None
    log: TokenizerLogSection = TokenizerLogSection()

    @property
    def frozen_parts(self) -> frozenset[Part]:
        """Parts that do not train: locked, or of rate 0."""
        return frozenset(self.model.locked).union(part for part, rate in self.optimizer.parts.items() if not rate)

    def unread(self) -> dict[str, str]:
        """Those of every recipe, and a vocabulary beside a checkpoint, which has its own."""
        found = super().unread()
        return found if self.model.init is None else found | {"vocabulary": "model.config"}

    def _check_trains(self, part: Part, key: str, off: str) -> None:
        """Refuse to look at terms' gradients in a part that has none.

        Args:
            part: holds the layer that is looked at.
            key: of the recipe, which asks to look.
            off: its value that does not.
        """
        if part not in self.frozen_parts:
            return
        if part in self.model.locked:
            why, remedy = "model.locked keeps from training", f"remove {part} from model.locked"
        else:
            why, remedy = f"optimizer.parts.{part}=0 keeps from training", f"give optimizer.parts.{part} a rate"
        raise ValueError(f"{key} looks at gradients in the {part}, which {why}; set {key}={off}, or {remedy}")


class Stage1Recipe(TokenizerRecipe):
    """Everything trains: reconstruction, quantisation and alignment."""

    task: Literal["stage1"] = "stage1"
    losses: Stage1Losses = Stage1Losses()

    @property
    def aligned(self) -> bool:
        """True if captions are read."""
        return self.losses.alpha_a > 0

    @property
    def rebuilds(self) -> bool:
        """True if images are reconstructed."""
        return self.losses.alpha_r > 0

    @model_validator(mode="after")
    def _balance_sees_the_batch(self) -> Self:
        if self.losses.balance != "fixed" and self.micro_batch_size is not None:
            raise ValueError(
                f"losses.balance {self.losses.balance} needs a whole batch at once; set micro_batch_size=null"
            )
        return self

    def unweighted(self) -> dict[str, str]:
        """Settings of the text tower and of the decoder, each without the loss that trains it."""
        found = {} if self.rebuilds else {"optimizer.parts.decoder": "losses.alpha_r"}
        if not self.aligned:
            found |= dict.fromkeys(("optimizer.parts.text", "validation.templates"), "losses.alpha_a")
        return found

    @model_validator(mode="after")
    def _what_is_looked_at_trains(self) -> Self:
        if self.losses.balance == "gradient_norm":
            self._check_trains("encoder", "losses.balance", "fixed")
        if self.log.gradients_every:
            self._check_trains("encoder", "log.gradients_every", "0")
        return self


class Stage2Recipe(TokenizerRecipe):
    """Only the bottleneck and the decoder train: reconstruction, quantisation, LPIPS and a GAN."""

    task: Literal["stage2"] = "stage2"
    losses: Stage2Losses = Stage2Losses()
    discriminator: DiscriminatorSection | None = None

    @property
    def aligned(self) -> bool:
        """False: stage 2 reads no captions, the text tower is not loaded."""
        return False

    @property
    def rebuilds(self) -> bool:
        """True: stage 2 always reconstructs images."""
        return True

    @property
    def active_discriminator(self) -> DiscriminatorSection | None:
        """The discriminator, where its loss has a weight."""
        return self.discriminator if self.losses.alpha_g else None

    def unread(self) -> dict[str, str]:
        """Those of both stages, and rates of parts and prompts that only stage 1 has."""
        keys = ("optimizer.parts.encoder", "optimizer.parts.text", "validation.templates")
        return super().unread() | dict.fromkeys(keys, "task: stage1")

    def unweighted(self) -> dict[str, str]:
        """The discriminator, without its loss."""
        return {} if self.losses.alpha_g else {"discriminator": "losses.alpha_g"}

    @property
    def notes(self) -> list[str]:
        """Those of every recipe, and a discriminator that starts after the run."""
        notes = super().notes
        discriminator = self.active_discriminator
        if discriminator is not None and discriminator.start >= self.schedule.steps:
            start = discriminator.start
            notes.append(f"discriminator.start {start:,} is after the last step: the discriminator never trains")
        return notes

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.model.init is None:
            raise ValueError("stage 2 starts from stage 1's checkpoint; give model.init instead of model.config")
        if "text" in self.model.fresh:
            raise ValueError("model.fresh: stage 2 has no text tower; remove text")
        if self.losses.alpha_g and self.discriminator is None:
            raise ValueError("losses.alpha_g above 0 needs `discriminator`; add it, or set losses.alpha_g=0")
        return self

    @model_validator(mode="after")
    def _what_is_looked_at_trains(self) -> Self:
        if self.active_discriminator is not None and self.active_discriminator.adaptive:
            self._check_trains("decoder", "discriminator.adaptive", "false")
        if self.log.gradients_every:
            self._check_trains("decoder", "log.gradients_every", "0")
        return self


AnyRecipe = Stage1Recipe | Stage2Recipe
"""Recipe of either stage; its ``task`` says which."""
