"""A recipe: one YAML file that says everything about a run. Strict: what nothing reads is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import model_validator

from qlip import recipes
from qlip.data.config import DataConfig
from qlip.errors import QLIPError, nearest, validate
from qlip.modeling.parts import Part
from qlip.training.recipe_schema import (
    CheckpointSection,
    Count,
    DiscriminatorSection,
    EMASection,
    LogSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    ScheduleSection,
    Section,
    SpikeSection,
    Stage1Losses,
    Stage2Losses,
    ValidationSection,
    VocabularySection,
)


class Recipe(Section):
    """What both stages have in common.

    Attributes:
        batch_size: images a step, over all ranks.
        micro_batch_size: images that a rank holds at a time; None takes its whole share of the batch at once.
        accumulation: of micro-batches: ``exact`` gives the gradients of the whole batch, negatives and entropies
            included, in two passes (GradCache, arXiv 2101.06983); ``mean`` averages micro-batches that know nothing of
            each other, in one.
        precision: ``bfloat16`` is autocast, with float32 where digits count.
        compile: torch.compile of the model.
        activation_checkpointing: keep only each block's input.
        threads: of the CPU, a process; None leaves it to PyTorch.
    """

    name: str
    stage: int
    seed: int = 0
    model: ModelSection
    vocabulary: VocabularySection | None = None
    data: DataConfig
    batch_size: Count
    micro_batch_size: Count | None = None
    accumulation: Literal["exact", "mean"] = "exact"
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection
    ema: EMASection | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    activation_checkpointing: bool = False
    parallel: ParallelSection = ParallelSection()
    spikes: SpikeSection | None = None
    threads: Count | None = None
    checkpoint: CheckpointSection = CheckpointSection()
    validation: ValidationSection | None = None
    log: LogSection = LogSection()

    @property
    def frozen_parts(self) -> frozenset[Part]:
        """LossInputs that do not train: locked, or of rate 0."""
        return frozenset(self.model.locked).union(part for part, rate in self.optimizer.parts.items() if not rate)

    def to_yaml(self) -> str:
        """The resolved recipe, every default spelled out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

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


class Stage1Recipe(Recipe):
    """Everything trains: reconstruction, quantisation and alignment."""

    stage: Literal[1] = 1
    losses: Stage1Losses = Stage1Losses()

    @property
    def aligned(self) -> bool:
        """Whether words are read."""
        return self.losses.alpha_a > 0

    @property
    def rebuilds(self) -> bool:
        """Whether images are rebuilt."""
        return self.losses.alpha_r > 0

    @model_validator(mode="after")
    def _balance_sees_the_batch(self) -> Self:
        if self.losses.balance != "fixed" and self.micro_batch_size is not None:
            raise ValueError(
                f"losses.balance {self.losses.balance} needs a whole batch at once; set micro_batch_size=null"
            )
        return self

    @model_validator(mode="after")
    def _what_is_looked_at_trains(self) -> Self:
        if self.losses.balance == "gradient_norm":
            self._check_trains("encoder", "losses.balance", "fixed")
        if self.log.gradients_every:
            self._check_trains("encoder", "log.gradients_every", "0")
        return self


class Stage2Recipe(Recipe):
    """Only the bottleneck and the decoder train: reconstruction, quantisation, LPIPS and a GAN."""

    stage: Literal[2] = 2
    losses: Stage2Losses = Stage2Losses()
    discriminator: DiscriminatorSection | None = None

    @property
    def aligned(self) -> bool:
        """Whether words are read: never, the text side is not even there."""
        return False

    @property
    def rebuilds(self) -> bool:
        """Whether images are rebuilt: always, whichever judges have a say."""
        return True

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.model.init is None:
            raise ValueError("stage 2 starts from stage 1's checkpoint; give model.init instead of model.config")
        if self.vocabulary is not None:
            raise ValueError("stage 2 trains no text tower; remove vocabulary")
        if (self.losses.alpha_g == 0) != (self.discriminator is None):
            raise ValueError("a discriminator goes with losses.alpha_g above 0, and the other way round")
        return self

    @model_validator(mode="after")
    def _what_is_looked_at_trains(self) -> Self:
        if self.discriminator is not None and self.discriminator.adaptive:
            self._check_trains("decoder", "discriminator.adaptive", "false")
        if self.log.gradients_every:
            self._check_trains("decoder", "log.gradients_every", "0")
        return self


AnyRecipe = Stage1Recipe | Stage2Recipe
"""Of either stage; its own ``stage`` says which."""


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> AnyRecipe:
    """Read, override and check a recipe.

    Args:
        name_or_path: a packaged recipe's name such as ``nano/stage1``, or a YAML file.
        overrides: ``key=value`` with dotted keys and YAML values, e.g. ``schedule.steps=100``.

    Raises:
        QLIPError: no such recipe, not YAML, an unknown or missing key, a wrong type.
    """
    path = _find(name_or_path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise QLIPError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    except OSError as error:
        raise QLIPError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(values, dict):
        raise QLIPError(f"{path}: a recipe is a table of keys, got {type(values).__name__}")
    for override in overrides or []:
        _override(values, override)
    return check_recipe(values, str(name_or_path))


def check_recipe(values: dict[str, Any], where: str) -> AnyRecipe:
    """Check the table of a recipe; its ``stage`` says which kind it is (1 where it is not given).

    Raises:
        QLIPError: an unknown or missing key, a wrong type, or keys that do not go together.
    """
    kinds: dict[Any, type[Stage1Recipe] | type[Stage2Recipe]] = {1: Stage1Recipe, 2: Stage2Recipe}
    stage = values.get("stage", 1)
    if stage not in kinds:
        raise QLIPError(f"{where}: stage is 1 or 2, got {stage!r}")
    return validate(kinds[stage], values, where)


def _find(name_or_path: str) -> Path:
    packaged = recipes.path(name_or_path)
    if packaged is not None:
        return packaged
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    names = recipes.names()
    raise QLIPError(
        f"{name_or_path}: no such recipe or file{nearest(name_or_path, names)}; packaged recipes: {', '.join(names)}"
    )


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise QLIPError(f"{override!r}: an override looks like schedule.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise QLIPError(f"{override!r}: {text!r} is not a YAML value; quote it") from None
    *parents, last = key.split(".")
    current: Any = values
    for parent in parents:
        current = _child(current, parent, override)
    if isinstance(current, list):
        current[_position(current, last, override)] = value
    elif isinstance(current, dict):
        current[last] = value
    else:
        raise QLIPError(f"{override!r}: {'.'.join(parents)} holds no keys")


def _child(current: Any, key: str, override: str) -> Any:
    if isinstance(current, list):
        return current[_position(current, key, override)]
    if isinstance(current, dict):
        if current.get(key) is None:
            current[key] = {}
        return current[key]
    raise QLIPError(f"{override!r}: {key!r} is inside something that holds no keys")


def _position(values: list[Any], key: str, override: str) -> int:
    if not key.isdecimal() or int(key) >= len(values):
        raise QLIPError(f"{override!r}: {key!r} is not a position in a list of {len(values)}: 0 to {len(values) - 1}")
    return int(key)
