"""Studies: one recipe in several variants and seeds, trained one after the other over days, measured, put in a table.

Everything is a file below the study's folder, so that a study that was stopped anywhere goes on there:
``<variant>/seed-<n>/`` is a run as ``qlip train`` makes it, with its figures in ``results.json``; ``table.json`` and
``table.md`` are made of these.
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
from qlip.training.studies import ablation_metrics as figures
from qlip.training.studies.finished_runs import is_finished

Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Measure(Section):
    """One measurement of each model, as ``qlip eval`` makes it.

    Attributes:
        data: a public set and split such as ``cifar10:test``, or a path.
        evaluator: such as ``reconstruction``, ``sets``, ``zero_shot``.
        settings: of it, other than what ``qlip eval`` takes for that set.
        limit: only the first so many images.
    """

    data: str
    evaluator: str
    settings: dict[str, Any] = Field(default_factory=dict)
    limit: Count | None = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        make_evaluator(self.item)  # what it would refuse after days of training, it refuses now
        return self

    @property
    def item(self) -> EvalSpec:
        """What is measured, with all settings."""
        (found,) = specs_for([self.data], [self.evaluator], self.limit)
        return replace(found, settings=found.settings | self.settings)

    @property
    def name(self) -> str:
        """In the keys of the table."""
        return f"{self.data}/{self.evaluator}"


class Variant(Section):
    """One row of the table.

    Attributes:
        title: in the table; the variant's name where None.
        recipe: instead of the study's.
        overrides: dotted keys of the recipe to values.
        init_from: starts from the model of another variant, of the same seed: one further up in this study, or
            ``<study>/<variant>`` of a study whose folder is beside this one's.
    """

    title: str | None = None
    recipe: str | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)
    init_from: Annotated[str, Field(pattern=r"^([^/]+/)?[^/]+$")] | None = None


class Study(Section):
    """What is compared.

    Attributes:
        title: above the variants' titles.
        recipe: that all variants change.
        seeds: of each variant.
        variants: by the names of their folders, in the order in which they are trained.
        measure: of each model.
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
                raise ValueError(f"{name} starts from {start}, which is no variant further up")
            seen.append(name)
        names = [one.name for one in self.measure]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"measure has {twice} twice")
        return self


def load_study(name_or_path: str) -> Study:
    """Read and check a study.

    Args:
        name_or_path: a packaged study's name such as ``both-objectives``, or a YAML file.

    Raises:
        QLIPError: no such study, not YAML, an unknown or missing key, a wrong type.
    """
    path = recipes.study_path(name_or_path) or Path(name_or_path).expanduser()
    if not path.is_file():
        names = recipes.studies()
        raise QLIPError(
            f"{name_or_path}: no such study or file{nearest(name_or_path, names)}; packaged studies: {', '.join(names)}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise QLIPError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    return validate(Study, values, str(name_or_path))


@dataclass(frozen=True)
class Run:
    """A variant with a seed."""

    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"


class Ablation:
    """A study in its folder.

    Args:
        study: what is compared.
        folder: of the study.
        say: takes lines about what is going on.

    Raises:
        QLIPError: a variant's recipe is wrong; all are read before anything is trained.
    """

    def __init__(self, study: Study, folder: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.study, self.folder, self.say = study, folder, say
        self._recipes = {one: self._recipe(one) for one in self.runs()}

    def runs(self, only: Sequence[str] = ()) -> list[Run]:
        """In order: the first seed of all variants comes first.

        Args:
            only: variants; all where empty.

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
        """The run's folder."""
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
            overrides += ["model.config=null", f"model.init={_as_yaml(str(start))}"]
        return load_recipe(variant.recipe or self.study.recipe, overrides)

    # ---------------------------------------------------------------- a run

    def is_finished(self, one: Run) -> bool:
        """Whether its model is there.

        Raises:
            QLIPError: another recipe's model is there.
        """
        free = ("model.init",) if self.study.variants[one.variant].init_from else ()
        return is_finished(self._recipes[one], self.place(one), free)

    def train(self, one: Run, console: Console | None = None) -> Outcome | None:
        """Train a run, going on where it stopped, as ``qlip train`` would.

        Returns:
            How it ended, or None where it had been finished before.

        Raises:
            QLIPError: the model that it starts from is not there; and what :func:`qlip.training.run` raises.
        """
        if self.is_finished(one):
            return None
        start = self._start(one)
        if start is not None and not start.is_dir():
            raise QLIPError(f"{one}: starts from {start}, which is not there; train that variant first")
        self.say(f"training {one}, in {self.place(one)}")
        return run(self._recipes[one], self.place(one), console)

    @property
    def items(self) -> list[EvalSpec]:
        """What is measured of each model, in the order of the study."""
        return [measure.item for measure in self.study.measure]

    def measure(self, one: Run) -> None:
        """Measure a finished run, but for what was measured of the same model in the same way before.

        Raises:
            QLIPError: what :func:`qlip.evaluation.run.evaluate.run_specs` raises; or earlier results that cannot be
            read.
        """
        figures.measure(self.place(one), self.items, str(one), self.say)

    def measurements(self, one: Run) -> list[EvalResult]:
        """What was measured of a run's model as it is, in the order of the study; may be incomplete."""
        return figures.known(self.place(one), self.items) if self.is_finished(one) else []

    def left_out(self) -> str | None:
        """A line about figures that wait for weights which are not in the cache."""
        return figures.lpips_is_missing() if any(map(figures.needs_lpips, self.items)) else None


def _as_yaml(value: Any) -> str:
    """On one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1_000_000).strip().removesuffix("...").strip()
