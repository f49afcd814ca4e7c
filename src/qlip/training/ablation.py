"""Studies: one recipe in several variants and seeds, trained one after the other over days, measured, put in a table.

Everything is a file below the study's folder, so that a study that was stopped anywhere goes on there:
``<variant>/seed-<n>/`` is a run as ``qlip train`` makes it, with its figures in ``measurements.json``; ``table.json``
and ``table.md`` are made of these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import yaml
from pydantic import Field, model_validator
from rich.console import Console

from qlip import recipes
from qlip.data.captions import load_templates
from qlip.data.datasets.store import read_manifest
from qlip.errors import QLIPError, nearest, validate
from qlip.evaluation.lpips import LPIPS
from qlip.evaluation.protocol import Measurement, open_evaluation
from qlip.evaluation.reconstruction import measure_reconstruction
from qlip.evaluation.zero_shot import measure_classification
from qlip.files import write_text
from qlip.modeling import QLIPModel, QLIPProcessor
from qlip.training.earlier import is_finished
from qlip.training.recipe import AnyRecipe, load_recipe
from qlip.training.run import Outcome, run
from qlip.training.sections import Count, Section
from qlip.training.usage import DEAD_BITS

Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Measure(Section):
    """One measurement of each model.

    Attributes:
        data: a public set and split such as ``cifar10:test``, or a path.
        kind: ``reconstruction``, or ``classification`` of the set's own labels.
        limit: only the first so many pictures.
        templates: prompts of a classification.
    """

    data: str
    kind: Literal["reconstruction", "classification"]
    limit: Count | None = None
    templates: str | None = None

    @model_validator(mode="after")
    def _read(self) -> Self:
        if (self.templates is not None) != (self.kind == "classification"):
            raise ValueError("templates go with kind: classification, and only with it")
        return self

    @property
    def name(self) -> str:
        """In the keys of the table."""
        return f"{self.data}/{self.kind}"


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
                known = list(self.study.variants)
                raise QLIPError(f"{name}: no such variant{nearest(name, known)}; there are {', '.join(known)}")
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

    def _recipe(self, one: Run) -> AnyRecipe:
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

    def measure(self, one: Run) -> None:
        """Measure a finished run, unless the same weights were measured in the same way before."""
        place = self.place(one)
        path, fingerprint = place / "measurements.json", _fingerprint(place / "model")
        known = {_key(old["measure"]): old for old in _known(path, fingerprint)}
        judge = _judge()
        for measure in self.study.measure:
            asked = measure.model_dump(mode="json")
            wanted = measure.kind == "reconstruction" and judge is not None
            old = known.get(_key(asked))
            if old is not None and (old["lpips"] or not wanted):
                continue
            self.say(f"measuring {one}: {measure.kind} of {measure.data}")
            result = _measured(place / "model", measure, judge)
            known[_key(asked)] = {"measure": asked, "lpips": wanted} | asdict(result)
            write_text(path, json.dumps({"weights": fingerprint, "results": list(known.values())}, indent=2) + "\n")

    def measurements(self, one: Run) -> list[dict[str, Any]]:
        """What was measured of a run's weights as they are, in the order of the study; may be incomplete."""
        place = self.place(one)
        if not self.is_finished(one):
            return []
        known = {
            _key(old["measure"]): old for old in _known(place / "measurements.json", _fingerprint(place / "model"))
        }
        wanted = [_key(measure.model_dump(mode="json")) for measure in self.study.measure]
        return [known[key] for key in wanted if key in known]


def lpips_is_missing() -> str | None:
    """A line that says how to get LPIPS' weights, where they are not in the cache."""
    if read_manifest("lpips") is not None:
        return None
    return "lpips and fd_vgg16 are left out: their weights are not in the cache; get them with qlip data get lpips"


@cache
def _loaded() -> LPIPS:
    return LPIPS.from_cache("vgg")


def _judge() -> LPIPS | None:
    return None if lpips_is_missing() else _loaded()


def _measured(folder: Path, measure: Measure, judge: LPIPS | None) -> Measurement:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = QLIPModel.from_pretrained(folder).to(device), QLIPProcessor.from_pretrained(folder)
    data = open_evaluation(measure.data, processor, measure.limit)
    if measure.kind == "classification":
        assert measure.templates is not None
        templates = load_templates(measure.templates)
        return measure_classification(model, processor, data, templates, protocol="classification")
    judge = None if judge is None else judge.to(device)
    return measure_reconstruction(
        model, processor, data, perceptual=judge, frechet=judge is not None, dead_below=DEAD_BITS
    )


def _fingerprint(folder: Path) -> str:
    """Of all that a model's figures depend on: weights, configuration, preprocessing, vocabulary."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _key(measure: dict[str, Any]) -> str:
    return json.dumps(measure, sort_keys=True)


def _known(path: Path, fingerprint: str) -> list[dict[str, Any]]:
    """Earlier results of these weights."""
    if not path.is_file():
        return []
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        results: list[dict[str, Any]] = stored["results"]
        return results if fingerprint == stored["weights"] else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QLIPError(f"{path}: cannot be read ({error!r}); delete it to measure again") from None


def _as_yaml(value: Any) -> str:
    """On one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1_000_000).strip().removesuffix("...").strip()
