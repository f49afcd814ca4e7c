"""A recipe: one YAML file that says everything about a run. Strict: what nothing reads is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from qlip import recipes
from qlip.data.config import DataConfig
from qlip.errors import QLIPError, nearest, validate

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Strict base of every part of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """What is trained: a packaged config by name, or a checkpoint folder to start from."""

    config: str | None = None
    init: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.config is None) == (self.init is None):
            raise ValueError("give either config (a packaged configuration's name) or init (a checkpoint)")
        return self


class VocabularySection(Section):
    """The text side's vocabulary, trained on the recipe's own captions before the first step."""

    size: Annotated[int, Field(ge=514)] = 2048


class LossSection(Section):
    """Weights of stage 1's total: alpha_r L_mse + alpha_q L_bsq + alpha_a L_align (SPEC section 2)."""

    alpha_r: Weight = 1000.0
    alpha_q: Weight = 1.0
    alpha_a: Weight = 1.0
    commitment: Weight = 0.0
    max_logit_scale: Rate = 100.0


class OptimizerSection(Section):
    """AdamW throughout; with ``muon`` the matrices of the transformer blocks take orthogonalised momentum instead."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: Rate = 1e-3
    muon_lr: Rate = 2e-3
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Weight = 0.05
    clip: Rate = 1.0


class ScheduleSection(Section):
    """Linear warm-up, then a cosine to ``floor`` times the peak."""

    steps: Count
    warmup: Annotated[int, Field(ge=0)] = 0
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0


class CheckpointSection(Section):
    """When to save, and how many to keep."""

    every: Count = 500
    keep: Count = 2


class LogSection(Section):
    """When to write a line, and a picture of originals above reconstructions."""

    every: Count = 50
    pictures_every: Annotated[int, Field(ge=0)] = 500
    pictures: Count = 8
    tensorboard: bool = True


class Recipe(Section):
    """A whole run of stage 1."""

    name: str
    stage: Literal[1] = 1
    seed: int = 0
    model: ModelSection
    vocabulary: VocabularySection | None = None
    data: DataConfig
    batch_size: Count
    losses: LossSection = LossSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection
    activation_checkpointing: bool = False
    threads: Count | None = None
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    def to_yaml(self) -> str:
        """The resolved recipe, every default spelled out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
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
    return validate(Recipe, values, str(name_or_path))


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
