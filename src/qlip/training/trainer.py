"""The Trainer owns time: steps, schedule, checkpoints, signals, the log. It knows nothing of images or text."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.training.checkpoints import Checkpoints
from qlip.training.recipe import Recipe
from qlip.training.runlog import RunLog, Window
from qlip.training.schedule import warmup_cosine
from qlip.training.task import Phase, Report, Task


class Countable(Protocol):
    """A batch, as far as a trainer needs to know one: how many samples it has, and which were broken."""

    broken: list[Any]

    def __len__(self) -> int: ...


@dataclass
class Progress:
    """How far a run is; with the weights and the optimizers, all there is to it."""

    step: int = 0
    position: int = 0
    samples: int = 0
    broken: int = 0


class Trainer:
    """Runs a task over batches, from wherever the last checkpoint stopped.

    Args:
        task: what is trained.
        recipe: schedule, batch size, checkpoints, log.
        checkpoints: of the run.
        open_batches: a position of the stream to the batches from there on.
        open_log: a step to the log that goes on from there.
        hooks: called with the step after each one (pictures, validation).
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        checkpoints: Checkpoints,
        open_batches: Callable[[int], Iterator[Countable]],
        open_log: Callable[[int], RunLog],
        hooks: Sequence[Callable[[int, RunLog], None]] = (),
    ) -> None:
        self.task, self.recipe, self.checkpoints, self.hooks = task, recipe, checkpoints, hooks
        self.progress, self.window = Progress(), Window()
        self._resume()
        self._open_batches, self.log = open_batches, open_log(self.progress.step)
        self._saved_at = self.progress.step
        self.stopped_by: signal.Signals | None = None

    # ---------------------------------------------------------------- time

    def run(self) -> None:
        """Train until the last step, or until a signal asks to stop; either way the last state is saved."""
        steps = self.recipe.schedule.steps
        previous = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        batches = self._open_batches(self.progress.position)
        try:
            while self.progress.step < steps and self.stopped_by is None:
                self._one(batches)
            if self.progress.step != self._saved_at or self.checkpoints.latest() is None:
                self._save()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            close = getattr(batches, "close", None)
            if close is not None:
                close()
            self.log.close()

    def _one(self, batches: Iterator[Countable]) -> None:
        asked = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - asked
        self._count(batch)
        factor = self._set_rates()
        if len(batch):
            self.window.add(self._step(batch))
        self.progress.step += 1
        self.log.clock.step(waited, len(batch))
        step, recipe = self.progress.step, self.recipe
        if step % recipe.log.every == 0 or step == recipe.schedule.steps:
            self.log.write(step, self.window.means() | {"rate": factor}, self.progress.samples)
            self.window = Window()
        for hook in self.hooks:
            hook(step, self.log)
        if step % recipe.checkpoint.every == 0:
            self._save()

    def _step(self, batch: Countable) -> dict[str, Tensor | float]:
        values: dict[str, Tensor | float] = {}
        for phase in self.task.phases:
            losses, report = phase.losses(batch)
            total = torch.stack(list(losses.values())).sum()
            self._refuse_non_finite(phase, total, report, "loss")
            total.backward()
            norm = torch.nn.utils.clip_grad_norm_(phase.parameters, phase.clip)
            self._refuse_non_finite(phase, norm, report, "gradient")
            for optimizer in phase.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            values |= {"loss": total.detach(), **report, "gradient_norm": norm}
        self.task.after_step()
        return values

    def _refuse_non_finite(self, phase: Phase, value: Tensor, report: Report, what: str) -> None:
        if bool(torch.isfinite(value)):
            return
        terms = ", ".join(f"{name} {float(term):.4g}" for name, term in report.items())
        last = self.checkpoints.latest()
        raise QLIPError(
            f"step {self.progress.step + 1}: the {phase.name}'s {what} is {float(value)} ({terms});"
            f" nothing was updated; lower the learning rate and go on from {last or 'the start'}"
        )

    def _set_rates(self) -> float:
        schedule = self.recipe.schedule
        factor = warmup_cosine(self.progress.step, steps=schedule.steps, warmup=schedule.warmup, floor=schedule.floor)
        for phase in self.task.phases:
            for optimizer in phase.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = optimizer.defaults["lr"] * factor
        return factor

    def _count(self, batch: Countable) -> None:
        self.progress.position += self.recipe.batch_size
        self.progress.samples += len(batch)
        for sample in batch.broken:
            self.progress.broken += 1
            self.log.console.print(
                f"broken sample {self.progress.broken}: {sample.source}: {sample.reason}", markup=False
            )
        limit = self.recipe.data.broken_limit
        if self.progress.broken > limit:
            last = batch.broken[-1]
            raise QLIPError(
                f"{self.progress.broken} broken samples, the limit is {limit} (data.broken_limit);"
                f" the last was {last.key} of {last.source}: {last.reason}"
            )

    # ---------------------------------------------------------------- state

    def _save(self) -> None:
        state = {
            "step": self.progress.step,
            "position": self.progress.position,
            "samples": self.progress.samples,
            "broken": self.progress.broken,
            "window": self.window.state(),
            "rng": torch.get_rng_state().numpy().tobytes().hex(),
        }
        self.checkpoints.save(self.progress.step, self.task, state)
        self._saved_at = self.progress.step

    def _resume(self) -> None:
        latest = self.checkpoints.latest()
        if latest is None:
            return
        state = self.checkpoints.load(latest, self.task)
        self.progress = Progress(state["step"], state["position"], state["samples"], state["broken"])
        self.window = Window(**state["window"])
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["rng"]), dtype=torch.uint8))

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.stopped_by is not None:
            raise KeyboardInterrupt  # asked twice: at once
        self.stopped_by = signal.Signals(number)
        self.log.console.print(f"{self.stopped_by.name}: saving after this step; once more stops at once", markup=False)
