"""Plan of a training for a dry run: its task without memory, a few samples, and facts about the data.

A `Kind` that can say more than its `Job` does, or works without data, has a method ``plan`` (`Planned`); any other kind
is built without memory, and the first samples of its feed are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, runtime_checkable

import torch
from rich.console import Console

from qlip.errors import QLIPError
from qlip.training.batches import Batch
from qlip.training.costs import without_memory
from qlip.training.job import find_kind
from qlip.training.parallel.distributed import Parallel
from qlip.training.recipe_schema import ParallelSection, RunRecipe
from qlip.training.task import Task

SAMPLES = 4
"""Samples of the step that is measured."""


@dataclass(frozen=True)
class SourceSummary:
    """A source of the stream.

    Attributes:
        name: or path.
        share: of the stream.
        samples: drawn from it in the whole run.
        images: how many it has; None if it cannot be known.
        streamed: read from front to back, so its images are not counted.
        missing: why it cannot be read.
    """

    name: str
    share: float
    samples: int
    images: int | None
    streamed: bool
    missing: str | None

    @property
    def epochs(self) -> float | None:
        """How often each image comes."""
        return None if not self.images else self.samples / self.images


@dataclass(frozen=True)
class RankReads:
    """Samples that a rank reads at the first step: positions in the stream, and the first keys (or shards)."""

    rank: int
    first: int
    last: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A training, built without memory.

    Attributes:
        task: its networks are fake tensors; all phases run.
        batch: at most `SAMPLES` samples.
        units: tokens or other units per sample, by name.
        part: name of a parameter of the model to the part it is counted under.
        config: the model's configuration as JSON values, if it has one.
        notes: what was assumed, or could not be found.
        flops: counts floating-point operations per sample, both passes; None counts those of the first phase.
        passing: number of ranks and recipe to bytes that come and go beside activations, by what they are for.
        saving: changes of the recipe that may save memory beside those that any training has.
        read: number of ranks to the sources, what each rank reads first, and notes.
    """

    task: Task
    batch: Batch
    units: Mapping[str, float]
    part: Callable[[str], str] = lambda name: "model"
    config: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()
    flops: Callable[[], float] | None = None
    passing: Callable[[int, Any], dict[str, int]] = lambda world, recipe: {}
    saving: Sequence[dict[str, Any]] = ()
    read: Callable[[int], tuple[list[SourceSummary], list[RankReads], list[str]]] = lambda world: ([], [], [])


@runtime_checkable
class Planned(Protocol):
    """A kind of training that makes its own plan."""

    def plan(self, recipe: Any) -> Plan:
        """Make the plan of a recipe, with nothing large in memory.

        Raises:
            QLIPError: the model's architecture cannot be known.
        """
        ...


@contextmanager
def one_line(recipe: RunRecipe, action: str, remedy: str = "give its kind a method plan") -> Iterator[None]:
    """Turn PyTorch's error about tensors without memory, such as a shape that depends on values, into one line.

    Args:
        recipe: names the run and its task.
        action: cannot be done, in the error.
        remedy: ends the error.

    Raises:
        QLIPError: PyTorch raised a RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise QLIPError(
            f"{recipe.name}: task {recipe.task} cannot {action} without memory ({reason}); {remedy}"
        ) from None


def make_plan(recipe: RunRecipe) -> Plan:
    """Make the plan of any recipe.

    Raises:
        QLIPError: no such kind, its data or its model cannot be read, or its first batch has no sample.
    """
    kind = find_kind(recipe.task, recipe.name)
    if isinstance(kind, Planned):
        return kind.plan(recipe)
    alone = Parallel(recipe.model_copy(update={"compile": False, "parallel": ParallelSection()}), Console(quiet=True))
    alone.rank, alone.world, alone.device = 0, 1, torch.device("cpu")
    remedy = "leave it to Parallel.wrap to move networks to their device, or give its kind a method plan"
    with TemporaryDirectory() as folder:  # the feed may read what the kind has written
        with one_line(recipe, "be built", remedy), without_memory():
            job = kind.build(recipe, alone, Path(folder))
        opened = iter(job.feed.open(None, rank=0, world=1))
        batch, _ = next(opened, (None, None))
        if (close := getattr(opened, "close", None)) is not None:
            close()  # ends its workers
    if batch is None or not len(batch):
        raise QLIPError(f"{recipe.name}: no sample of the first batch can be read, so no step can be measured")
    with one_line(recipe, "take a step"):
        job.task.before_step(0)
    few = batch.split(-(-len(batch) // SAMPLES))[0]
    return Plan(job.task, few, {job.unit: job.units_per_sample}, notes=[f"data: {job.describe}"] * bool(job.describe))
