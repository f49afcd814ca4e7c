"""Trainer for any task: steps, learning-rate schedule, checkpoints, signals and the log, on one or more ranks.

It is independent of images and text. Decisions that affect all ranks are collective: skipping an empty micro-batch,
taking a step, and stopping.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from signal import Signals as Signal
from typing import Any

import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.runtime.progress import print_line
from qlip.runtime.rng import restore_rng_state, rng_state, rng_state_from_json, rng_state_to_json
from qlip.training.accumulate import Inspect, backward
from qlip.training.batches import Batch, Feed, State, number_of_micro_batches
from qlip.training.job import Hook
from qlip.training.log.runlog import RunLog, Window
from qlip.training.losses.balance import term_gradients
from qlip.training.optim.clipping import clip_gradients
from qlip.training.optim.ema import EMA
from qlip.training.optim.schedule import warmup_cosine
from qlip.training.parallel.distributed import Parallel
from qlip.training.parallel.faults import CollectiveError, Spikes, is_about_the_device
from qlip.training.recipe_schema import RunRecipe
from qlip.training.signals import Signals
from qlip.training.skipped import TOLERATED, SkippedSamples
from qlip.training.state.checkpoints import Checkpoints
from qlip.training.task import Losses, LossInputs, Phase, Report, SharedLayer, Task


@dataclass
class Progress:
    """Steps and samples of a run so far, over all ranks."""

    step: int = 0
    samples: int = 0


class Trainer:
    """Trains a task on the batches of a feed, resuming from the last checkpoint. All ranks construct and run one.

    Args:
        task: the task, wrapped for the ranks.
        recipe: provides schedule, batch size, accumulation, checkpoint and log settings.
        parallel: the ranks.
        checkpoints: checkpoints of the run.
        feed: source of batches.
        open_log: opens the log at a step; on non-zero ranks, one that writes nothing.
        ema: average of the task's model, if any; updated after each step.
        hooks: called on all ranks after each step (images, validation).

    Raises:
        QLIPError: a checkpoint cannot be read, or ``log.gradients_every`` is set for a task without a shared layer.
    """

    def __init__(
        self,
        task: Task,
        recipe: RunRecipe,
        parallel: Parallel,
        checkpoints: Checkpoints,
        feed: Feed[Batch],
        open_log: Callable[[int], RunLog],
        ema: EMA | None = None,
        hooks: Sequence[Hook] = (),
    ) -> None:
        self.task, self.recipe, self.parallel, self.checkpoints = task, recipe, parallel, checkpoints
        self.ema, self.hooks = ema, hooks
        self.progress, self.window, self.spikes = Progress(), Window(), Spikes(recipe.spikes)
        self.skipped = SkippedSamples(recipe.skip_limit)
        self._number = number_of_micro_batches(recipe.batch_size, parallel.world, recipe.micro_batch_size)
        self._whole_state: State | None = None
        self._own_state: State | None = None
        if recipe.log.gradients_every and not isinstance(task, SharedLayer):
            raise QLIPError(f"log.gradients_every: task {recipe.task} has no shared layer to probe; set it to 0")
        parallel.seed(recipe.seed)
        self._resume()
        self.feed = feed
        self._learned = self.progress.samples > 0
        self.log = open_log(self.progress.step)
        self._saved_at: int | None = self.progress.step if self.progress.step else None
        self.stopped_by: Signal | None = None

    # ---------------------------------------------------------------- loop

    def run(self, on_first_batch: Callable[[], None] = lambda: None) -> None:
        """Train until the last step, or until any rank receives a signal to stop; save a checkpoint at the end.

        Args:
            on_first_batch: called on rank 0 once all ranks have read their first batch.
        """
        steps = self.recipe.schedule.steps
        opened = self.feed.open(self._whole_state, rank=self.parallel.rank, world=self.parallel.world)
        batches = self._after_first(opened, on_first_batch)
        try:
            with Signals(self._say, ignore_after_error=self.parallel.world > 1) as signals:
                while self.progress.step < steps and self.stopped_by is None:
                    self._one(batches)
                    self._agree_to_stop(signals)
                if self.progress.step >= steps:
                    self._finish()
                if self.progress.step != self._saved_at:
                    self._save()
                self.checkpoints.wait()
        except CollectiveError:
            with suppress(QLIPError):
                self.checkpoints.wait()  # finish a save that is still being written
            raise
        finally:
            close = getattr(opened, "close", None)
            if close is not None:
                close()
            self.log.close()

    def _after_first(
        self, batches: Iterator[tuple[Batch, State]], on_first_batch: Callable[[], None]
    ) -> Iterator[tuple[Batch, State]]:
        for number, one in enumerate(batches):
            if not number:
                self.parallel.on_rank0(on_first_batch)
            yield one

    def _one(self, batches: Iterator[tuple[Batch, State]]) -> None:
        started = time.perf_counter()
        batch, self._own_state = next(batches)
        waited = time.perf_counter() - started
        micro_batches = self._count(batch)
        factor = self._set_rates()
        self.task.before_step(self.progress.step)
        if micro_batches:
            self.window.add(self._step(micro_batches))
        self.progress.step += 1
        self.log.clock.step(waited, self._samples_of_step)
        step, recipe = self.progress.step, self.recipe
        if step % recipe.log.every == 0 or step == recipe.schedule.steps:
            values = self.window.means() | _numbers(self.task.summary()) | {"rate": factor}
            self.log.write(step, values, self.progress.samples)
            self.window = Window()
        applied = nullcontext if self.ema is None else self.ema.applied
        for hook in self.hooks:
            hook(step, self.log, applied)
        if step % recipe.checkpoint.every == 0:
            self._save()

    def _agree_to_stop(self, signals: Signals) -> None:
        """Stop all ranks after the same step if any rank received a signal; raise if a save has failed."""
        number, failed = self.parallel.largest([int(signals.received or 0), int(self.checkpoints.failed)])
        if failed:
            self.checkpoints.wait()
        if number and signals.received is None:
            self._say(f"{Signal(number).name} on another rank: saving after this step")
        self.stopped_by = Signal(number) if number else None

    def _count(self, batch: Batch) -> list[Batch]:
        """Count the samples of a global batch; return this rank's micro-batches without those empty on all ranks."""
        pieces = batch.split(self._number)
        *sizes, skipped = self.parallel.total([*(len(piece) for piece in pieces), len(batch.skipped)])
        self._samples_of_step = sum(sizes)
        self.progress.samples += self._samples_of_step
        if skipped:
            self._count_skipped(batch)
        return [piece for piece, size in zip(pieces, sizes, strict=True) if size]

    def _count_skipped(self, batch: Batch) -> None:
        of_ranks = self.parallel.gather([[one.key, one.source, one.reason] for one in batch.skipped])
        for line in self.skipped.add(one for of_rank in of_ranks for one in of_rank):
            self._say(line)
        self.skipped.check(self.progress.samples)
        if self.skipped.events > TOLERATED:
            self.skipped.check_any(self.progress.samples)

    def _finish(self) -> None:
        """Say what was skipped; raise CollectiveError if the run cannot have learned anything."""
        for line in self.skipped.summary():
            self._say(line)
        self.skipped.check_any(self.progress.samples)
        if not self._learned:
            raise CollectiveError(
                f"no gradient in {self.progress.step} steps, so nothing was trained: the samples have nothing that a"
                " loss of weight above 0 uses (captions, for alignment), or the part that it trains is locked"
            )

    def _say(self, line: str) -> None:
        if self.parallel.first:
            print_line(self.log.console, line)

    # ---------------------------------------------------------------- step

    def _step(self, micro_batches: list[Batch]) -> dict[str, float]:
        pieces = [piece.to(self.parallel.device) for piece in micro_batches]
        values: dict[str, float] = {}
        moved: list[str] = []
        for phase in self.task.phases:
            if not phase.active(self.progress.step):
                continue
            gradients = backward(
                self._in_precision(phase),
                pieces,
                self.recipe.accumulation == "exact",
                self.parallel.sync(phase.modules),
                self._inspect(phase),
            )
            self.parallel.average(phase.loss_parameters)
            norm = clip_gradients(phase.parameters, phase.clip)
            numbers = _numbers({"loss": gradients.total, **gradients.report, "gradient_norm": norm})
            if self._accept(phase, numbers, moved):
                for optimizer in phase.optimizers:
                    optimizer.step()
                moved.append(phase.name)
            for optimizer in phase.optimizers:
                optimizer.zero_grad()
            for name in numbers.keys() & values.keys():  # values that an earlier phase also has, such as the loss
                numbers[f"{phase.name}/{name}"] = numbers.pop(name)
            values |= numbers
        self.task.after_step()
        if self.ema is not None and moved:
            self.ema.update()
        return values

    def _inspect(self, phase: Phase) -> Inspect | None:
        """Probe of each term's gradient at the shared layer; None except in the first phase of a probed step."""
        every = self.recipe.log.gradients_every
        if not every or (self.progress.step + 1) % every or phase is not self.task.phases[0]:
            return None

        def probe(losses: Losses) -> Report:
            assert isinstance(self.task, SharedLayer)
            found = term_gradients(losses, self.task.shared_layer)
            return {name: torch.tensor(value, device=self.parallel.device) for name, value in found.items()}

        return probe

    def _in_precision(self, phase: Phase) -> Phase:
        """Copy of the phase whose networks run in the recipe's precision; losses are still computed in float32."""

        def forward(batch: Any, cached_only: bool) -> LossInputs:
            with self.parallel.autocast():
                return phase.forward(batch, cached_only)

        return replace(phase, forward=forward)

    def _accept(self, phase: Phase, numbers: dict[str, float], moved: Sequence[str]) -> bool:
        """Decide collectively, before the optimizers step, if the phase's step is taken; spikes are skipped.

        Args:
            phase: a phase whose gradients have been computed.
            numbers: loss, gradient norm and the logged values of the phase.
            moved: names of the phases that have already stepped on this batch.

        Raises:
            CollectiveError: the loss or the gradient is not finite on some rank, or too many consecutive spikes.
        """
        loss, norm = numbers["loss"], numbers["gradient_norm"]
        self._learned |= norm != 0  # also a NaN, which is refused below
        ratio = self.spikes.ratio(phase.name, norm)
        bad_loss, bad_norm, spike = self.parallel.any(
            not math.isfinite(loss), not math.isfinite(norm), ratio is not None
        )
        step = self.progress.step + 1
        if bad_loss or bad_norm:
            what, value = ("loss", loss) if bad_loss else ("gradient", norm)
            terms = ", ".join(f"{name} {number:.4g}" for name, number in numbers.items())
            still = "nothing was updated"
            if moved:
                still = f"the {' and the '.join(moved)} had already been updated, the {phase.name} was not"
            raise CollectiveError(
                f"step {step}: the {phase.name}'s {what} is {value} ({terms});"
                f" {still}; lower the learning rate and resume from {self._last_saved()}"
            )
        skipped = self.spikes.record(phase.name, norm, spike)
        if self.recipe.spikes is not None:
            numbers["skipped"] = float(spike)
        if spike:
            times = "" if ratio is None else f", {ratio:.1f} times its mean"
            self._say(f"step {step}: the {phase.name}'s gradient norm is {norm:.4g}{times}; update skipped")
            if skipped >= self.recipe.spikes.limit:  # type: ignore[union-attr]
                raise CollectiveError(
                    f"step {step}: {skipped} consecutive updates skipped (spikes.limit), the last norm was {norm:.4g};"
                    f" lower the learning rate and resume from {self._last_saved()}"
                )
        return not spike

    def _last_saved(self) -> str:
        """Checkpoint to resume from, once pending saves are on disk, and the error if a save failed; for messages."""
        failed = ""
        try:
            self.checkpoints.wait()
        except QLIPError as error:
            failed = f" ({error})"
        return f"{self.checkpoints.latest() or 'the start'}{failed}"

    def _set_rates(self) -> float:
        schedule = self.recipe.schedule
        factor = warmup_cosine(self.progress.step, steps=schedule.steps, warmup=schedule.warmup, floor=schedule.floor)
        for phase in self.task.phases:
            for optimizer in phase.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
        return factor

    # ---------------------------------------------------------------- state

    def _save(self) -> None:
        states = self.parallel.gather(self._own_state)
        data = self._whole_state
        if read := [state for state in states if state is not None]:
            data = self.feed.merge(read)
        state = {
            "step": self.progress.step,
            "samples": self.progress.samples,
            "broken": self.skipped.events,
            "skipped": self.skipped.state(),
            "world": self.parallel.world,
            "data": data,
            "window": self.window.state(),
            "spikes": self.spikes.state(),
            "rng": self.parallel.gather(rng_state_to_json(rng_state())),
        }
        self.checkpoints.save(self.progress.step, self.task, self.ema, state)
        self._saved_at = self.progress.step

    def _resume(self) -> None:
        latest = self.checkpoints.latest()
        if latest is None:
            return
        state = self.checkpoints.load(latest, self.task, self.ema)
        self.parallel.all_or_none(lambda: self._restore(state, latest))

    def _restore(self, state: dict[str, Any], latest: Path) -> None:
        """Restore the state that :meth:`_save` stored; each rank restores its own RNG state, so ranks may fail alone.

        Raises:
            QLIPError: the state is damaged.
            RuntimeError: an error of the device; the stored state may be intact.
        """
        try:
            self.progress = Progress(state["step"], state["samples"])
            self.skipped.load(state.get("skipped"), state["broken"])  # version 0.1 stored the number alone
            self._whole_state, self.window = state["data"], Window(**state["window"])
            self.spikes.load(state["spikes"])
            if state["world"] == self.parallel.world:
                restore_rng_state(rng_state_from_json(state["rng"][self.parallel.rank]))
            else:
                # with another world size no stored RNG state fits: reseed (for dropout); the data resume exactly
                self.parallel.seed(self.recipe.seed + self.progress.step)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if is_about_the_device(error):
                raise
            raise QLIPError(
                f"{latest}: its state is damaged ({error!r}); delete it to resume from the previous one"
            ) from None


def _numbers(report: Report) -> dict[str, float]:
    """Convert all values to floats with a single copy from the device."""
    if not report:
        return {}
    values: Tensor = torch.stack([value.detach().double().reshape(()) for value in report.values()])
    return dict(zip(report, values.tolist(), strict=True))
