"""A kind of training and the job it builds: all that :func:`qlip.training.run.run` asks for.

A `Kind` has a recipe class and builds a `Job` from a recipe: a task, a feed, and what the log says of them. Kinds are
found by name among the entry points of the group ``qlip.tasks``, our own and those of other packages alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from qlip.errors import QLIPError, nearest
from qlip.training.batches import Batch, Feed
from qlip.training.log.eval_context import Applied
from qlip.training.log.mfu import device_peak
from qlip.training.log.runlog import RunLog, SilentLog
from qlip.training.parallel.distributed import Parallel
from qlip.training.recipe_schema import RunRecipe
from qlip.training.task import Task

GROUP = "qlip.tasks"
OURS = {
    "stage1": "qlip.training.tasks.kinds:Stage1Kind",
    "stage2": "qlip.training.tasks.kinds:Stage2Kind",
    "t2i": "qlip.t2i.task:T2IKind",
    "um3": "qlip.um3.training.task:UM3Kind",
    "vlm": "qlip.vlm.training.task:VLMKind",
}
"""Our kinds, as pyproject.toml has them; known here too, so that a source tree runs without being installed."""

B = TypeVar("B", bound=Batch)


class Hook(Protocol):
    """Work between steps that does not train, such as validation."""

    def __call__(self, step: int, log: RunLog, applied: Applied) -> None:
        """Called on all ranks after each step.

        Args:
            step: steps taken.
            log: of the run; silent on ranks other than the first.
            applied: context in which the model computes with its averaged weights, if it has any.
        """
        ...


@dataclass(frozen=True)
class Job(Generic[B]):
    """A training that is ready to run.

    Attributes:
        task: model, losses and optimizers, wrapped for the ranks.
        feed: of batches.
        hooks: called after each step.
        unit: plural noun of what the log counts per second.
        units_per_sample: mean number of units in a sample, e.g. tokens.
        flops_per_sample: counts floating-point operations of both passes, for the MFU; called only where the device's
            peak is known; None leaves it out.
        describe: a phrase for the line at the start, such as ``1,281,167 images of 2 sources``.
    """

    task: Task
    feed: Feed[B]
    hooks: Sequence[Hook] = ()
    unit: str = "samples"
    units_per_sample: float = 1.0
    flops_per_sample: Callable[[], float] | None = None
    describe: str = ""

    def open_log(self, recipe: RunRecipe, parallel: Parallel, folder: Path, step: int) -> RunLog:
        """Open the log of a run at a step; on ranks other than the first, one that writes nothing."""
        if not parallel.first:
            return SilentLog()
        peak = device_peak(parallel.device)
        return RunLog(
            folder,
            step,
            recipe.schedule.steps,
            recipe.log.tensorboard,
            parallel.console,
            wandb=recipe.log.wandb,
            name=recipe.name,
            config=recipe.model_dump(mode="json"),
            unit=self.unit,
            units_per_sample=self.units_per_sample,
            flops=None if peak is None or self.flops_per_sample is None else self.flops_per_sample(),
            peak=None if peak is None else peak * parallel.world,
        )


class Kind(Protocol):
    """A kind of training; one file with a task, a recipe class and this makes a new one."""

    @property
    def Recipe(self) -> type[RunRecipe]:
        """Schema of its recipes."""
        ...

    @property
    def folders(self) -> Sequence[str]:
        """Names of the folders that this kind makes in a run folder; a restart deletes them."""
        ...

    def build(self, recipe: Any, parallel: Parallel, folder: Path) -> Job[Any]:
        """Build a job; called once, on all ranks together, with torch seeded from the recipe.

        Args:
            recipe: an instance of `Recipe`.
            parallel: the ranks; networks go through its ``wrap``.
            folder: of the run.
        """
        ...


def find_kind(name: str, where: str) -> Kind:
    """Find a kind of training by name.

    Args:
        name: of its entry point.
        where: the recipe, named in errors.

    Raises:
        QLIPError: no such kind, or its package cannot be imported.
    """
    points = {point.name: point for point in entry_points(group=GROUP)}
    points |= {one: EntryPoint(one, value, GROUP) for one, value in OURS.items()}
    if name not in points:
        raise QLIPError(f"{where}: no task {name!r}{nearest(str(name), points)}; there are {', '.join(sorted(points))}")
    try:
        kind: type[Kind] = points[name].load()
    except (ImportError, AttributeError) as error:
        raise QLIPError(f"{where}: task {name!r} cannot be imported from {points[name].value} ({error})") from None
    return kind()
