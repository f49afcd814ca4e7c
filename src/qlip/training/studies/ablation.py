"""Ablations: variants of one recipe, each with several seeds, trained one after the other, measured and tabulated.

All state is in files in the ablation's folder, so an interrupted ablation can be continued at any point:
``<variant>/seed-<n>/`` is a run as ``qlip train`` makes it, with its metrics in ``results.json``; ``table.json`` and
``table.md`` are computed from these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, model_validator
from rich.console import Console

from qlip import recipes
from qlip.errors import QLIPError, nearest, validate
from qlip.evaluation.report.result import EvalResult
from qlip.evaluation.run.evaluate import EvalSpec, make_evaluator
from qlip.evaluation.run.suites import specs_for
from qlip.registry import unknown_name
from qlip.training.recipe import load_recipe
from qlip.training.recipe_schema import Count, RunRecipe, Section
from qlip.training.run import Outcome, run
from qlip.training.run_folder import is_finished
from qlip.training.studies import ablation_metrics

Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Measure(Section):
    """One measurement of each model, as ``qlip eval`` makes it.

    Attributes:
        data: a public dataset and split such as ``cifar10:test``, or a path.
        evaluator: name of an evaluator such as ``reconstruction``, ``sets`` or ``zero_shot``.
        settings: evaluator settings that differ from those of ``qlip eval`` for this dataset.
        limit: number of images, drawn at random; None for all.
    """

    data: str
    evaluator: str
    settings: dict[str, Any] = Field(default_factory=dict)
    limit: Count | None = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        make_evaluator(self.item)  # raises now, not after days of training
        return self

    @property
    def item(self) -> EvalSpec:
        """Evaluation spec with all settings."""
        (found,) = specs_for([self.data], [self.evaluator], self.limit)
        return replace(found, settings=found.settings | self.settings)

    @property
    def name(self) -> str:
        """Name of the measurement in the keys of the table."""
        return f"{self.data}/{self.evaluator}"


class Variant(Section):
    """One row of the table.

    Attributes:
        title: title in the table; None uses the variant's name.
        recipe: recipe to use instead of the ablation's.
        overrides: dotted keys of the recipe to values.
        init_from: variant whose model, of the same seed, initialises this one: an earlier variant of this ablation, or
            ``<ablation>/<variant>`` of an ablation in a sibling folder.
    """

    title: str | None = None
    recipe: str | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)
    init_from: Annotated[str, Field(pattern=r"^([^/]+/)?[^/]+$")] | None = None


class Study(Section):
    """Definition of an ablation.

    Attributes:
        title: heading of the column of variants.
        recipe: base recipe of all variants.
        seeds: seeds to train each variant with.
        variants: folder name to variant, in training order.
        measure: measurements of each model.
    """

    title: str = "variant"
    recipe: str
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    variants: Annotated[dict[Slug, Variant], Field(min_length=1)]
    measure: Annotated[tuple[Measure, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        seen: list[str] = []
        for name, variant in self.variants.items():
            start = variant.init_from
            if start is not None and "/" not in start and start not in seen:
                raise ValueError(f"{name} starts from {start}, which is not an earlier variant")
            seen.append(name)
        names = [one.name for one in self.measure]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"measure has {twice} twice")
        return self


def load_study(name_or_path: str) -> Study:
    """Load and validate the definition of an ablation.

    Args:
        name_or_path: name of a packaged ablation such as ``both-objectives``, or path of a YAML file.

    Raises:
        QLIPError: no such ablation, invalid YAML, an unknown or missing key, or a wrong type.
    """
    path = recipes.study_path(name_or_path) or Path(name_or_path).expanduser()
    if not path.is_file():
        names = recipes.studies()
        raise QLIPError(
            f"{name_or_path}: no such ablation or file{nearest(name_or_path, names)};"
            f" packaged ablations: {', '.join(names)}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise QLIPError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    return validate(Study, values, str(name_or_path))


@dataclass(frozen=True)
class Run:
    """One training run: a variant and a seed."""

    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"


class Ablation:
    """An ablation with its folder: trains and measures the runs.

    Args:
        study: definition of the ablation.
        folder: folder of the ablation.
        say: called with each progress line.

    Raises:
        QLIPError: the recipe of a variant is invalid; all are loaded before training starts.
    """

    def __init__(self, study: Study, folder: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.study, self.folder, self.say = study, folder, say
        self._recipes = {one: self._recipe(one) for one in self.runs()}

    def runs(self, only: Sequence[str] = ()) -> list[Run]:
        """List the runs in training order: all variants with the first seed, then with the second, and so on.

        Args:
            only: variants to include; all if empty.

        Raises:
            QLIPError: no such variant.
        """
        for name in only:
            if name not in self.study.variants:
                raise unknown_name(name, "variant", self.study.variants)
        return [
            Run(name, seed) for seed in self.study.seeds for name in self.study.variants if not only or name in only
        ]

    def place(self, one: Run) -> Path:
        """Folder of a run."""
        return self.folder / one.variant / f"seed-{one.seed}"

    def _start(self, one: Run) -> Path | None:
        start = self.study.variants[one.variant].init_from
        if start is None:
            return None
        beside = self.folder.resolve() if "/" not in start else self.folder.resolve().parent
        return beside / start / f"seed-{one.seed}" / "model"

    def _recipe(self, one: Run) -> RunRecipe:
        variant = self.study.variants[one.variant]
        overrides = [f"{key}={_as_yaml(value)}" for key, value in variant.overrides.items()]
        overrides.append(f"seed={one.seed}")
        start = self._start(one)
        if start is not None:
            overrides += ["model.config=null", "vocabulary=null", f"model.init={_as_yaml(str(start))}"]
        return load_recipe(variant.recipe or self.study.recipe, overrides)

    # ---------------------------------------------------------------- one run

    def is_finished(self, one: Run) -> bool:
        """Return True if the run's final model exists.

        Raises:
            QLIPError: the folder holds the model of a different recipe.
        """
        free = ("model.init",) if self.study.variants[one.variant].init_from else ()
        return is_finished(self._recipes[one], self.place(one), free)

    def train(self, one: Run, console: Console | None = None) -> Outcome | None:
        """Train a run, resuming it if it was interrupted, like ``qlip train``.

        Returns:
            Outcome of the run, or None if it had already finished.

        Raises:
            QLIPError: the model that initialises the run does not exist, or an error of :func:`qlip.training.run`.
        """
        if self.is_finished(one):
            return None
        start = self._start(one)
        if start is not None and not start.is_dir():
            raise QLIPError(f"{one}: starts from {start}, which does not exist; train that variant first")
        self.say(f"training {one}, in {self.place(one)}")
        return run(self._recipes[one], self.place(one), console)

    @property
    def items(self) -> list[EvalSpec]:
        """Evaluation specs of each model, in the order of the definition."""
        return [measure.item for measure in self.study.measure]

    def measure(self, one: Run) -> None:
        """Run the measurements of a finished run that have not been made of this model with these settings.

        Raises:
            QLIPError: an error of :func:`qlip.evaluation.run.evaluate.run_specs`, or earlier results cannot be read.
        """
        ablation_metrics.measure(self.place(one), self.items, str(one), self.say)

    def measurements(self, one: Run) -> list[EvalResult]:
        """Results for the current model of a run, in the order of the definition; may be incomplete."""
        return ablation_metrics.known(self.place(one), self.items) if self.is_finished(one) else []

    def left_out(self) -> str | None:
        """Message about metrics that are left out because their weights are not in the cache, or None."""
        return ablation_metrics.lpips_is_missing() if any(map(ablation_metrics.needs_lpips, self.items)) else None


def _as_yaml(value: Any) -> str:
    """Format a value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1_000_000).strip().removesuffix("...").strip()
