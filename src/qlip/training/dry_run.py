"""Dry run: what a recipe of any task would take: parameters, memory, operations, learning rates and data.

Nothing is trained and no weights are allocated: the task's phases and optimizers run once on tensors without memory
(:mod:`qlip.training.costs`). The memory of a rank is:

- **resident**: weights, gradients, optimizer state and moving average; with ``fsdp`` divided by the ranks that share a
  copy. Under autocast 2 more bytes per trained weight, for the copy that products take, which no ranks share.
- **activations**: of the most expensive phase, in proportion to the samples held at a time.
- **passing**, for a moment beside the activations: the layers that ``fsdp`` gathers, and what the plan adds.
- **update**: what an optimizer's step allocates when activations are gone.
- **reserve**, on a GPU: its context, libraries' workspaces, what an allocator cannot use: 1 GiB and a twentieth.

tests/training/test_dry_run.py holds it against measured steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qlip.errors import QLIPError
from qlip.modeling.transformer import Block
from qlip.runtime.machine import total_memory
from qlip.training.batches import number_of_micro_batches
from qlip.training.costs import Run, count_flops, optimizer_bytes, peak_bytes
from qlip.training.optim.muon import Muon
from qlip.training.optim.schedule import warmup_cosine
from qlip.training.parallel.distributed import check_shares
from qlip.training.plan import Plan, RankReads, SourceSummary, make_plan, one_line
from qlip.training.recipe import changed
from qlip.training.recipe_schema import RunRecipe
from qlip.training.task import Phase

GIB = 2**30
Rates = tuple[float, float] | None
"""Lowest and highest peak learning rate; None if nothing trains."""


@dataclass(frozen=True)
class PartSummary:
    """Parameters of a part, how many of them train, and their peak rates; Muon's matrices have a range of their own."""

    part: str
    parameters: int
    trained: int
    rates: Rates
    muon_rates: Rates


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one rank needs.

    Attributes:
        resident: all the time, by what it is for.
        activations: most that networks hold in a step, of a micro-batch.
        passing: what comes and goes beside activations.
        update: while the optimizer moves.
        reserve: of a GPU, for what is not ours.
    """

    resident: dict[str, int]
    activations: int
    passing: dict[str, int] = field(default_factory=dict)
    update: int = 0
    reserve: int = 0

    @property
    def peak(self) -> int:
        """Most that exists at once, without the reserve."""
        step = self.activations + sum(self.passing.values())
        return sum(self.resident.values()) + max(step, self.update)

    @property
    def total(self) -> int:
        """Bytes that a device must have."""
        return self.peak + self.reserve


@dataclass(frozen=True)
class Remedy:
    """Settings that change the estimate, and what it then is."""

    settings: tuple[str, ...]
    total: int
    fits: bool


@dataclass(frozen=True)
class Device:
    """Device that the estimate is compared with; ``memory`` in bytes."""

    name: str
    memory: int
    gpu: bool


@dataclass(frozen=True)
class DryRun:
    """All that is known beforehand. Units are per sample (texts of full length); memory is of one rank."""

    name: str
    task: str
    world: int
    config: Mapping[str, Any] | None
    notes: list[str]
    parts: list[PartSummary]
    memory: MemoryEstimate
    device: Device
    remedies: list[Remedy]
    batch_size: int
    micro_batches: int
    samples_at_a_time: int
    steps: int
    units: Mapping[str, float]
    flops: float
    schedule: list[tuple[int, float]]
    sources: list[SourceSummary]
    ranks: list[RankReads] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Number of samples of the whole run."""
        return self.batch_size * self.steps

    @property
    def fits(self) -> bool:
        """True if the memory of a rank is enough."""
        return self.memory.total <= self.device.memory


def dry_run(recipe: RunRecipe, world: int = 1, memory: float | None = None) -> DryRun:
    """Estimate what a recipe would take.

    Args:
        recipe: checked.
        world: ranks.
        memory: of each rank's device, in GiB; None asks this machine's GPU, or else its RAM.

    Raises:
        QLIPError: the model's architecture cannot be known, or the ranks cannot share the batch.
    """
    if recipe.batch_size < world:
        raise QLIPError(f"batch_size {recipe.batch_size} for {world} ranks: a rank would get no sample")
    check_shares(recipe.parallel, world)
    plan = make_plan(recipe)
    needs = Needs(plan, world, _device(memory))
    with one_line(recipe, "take a step"):
        estimate = needs.of(recipe)
        remedies = [] if estimate.total <= needs.device.memory else find_remedies(recipe, needs)
        flops = needs.flops if plan.flops is None else plan.flops()
    sources, ranks, missing = plan.read(world)
    return DryRun(
        name=recipe.name,
        task=recipe.task,
        world=world,
        config=plan.config,
        notes=[*recipe.notes, *plan.notes, *missing],
        parts=parts_of(plan),
        memory=estimate,
        device=needs.device,
        remedies=remedies,
        batch_size=recipe.batch_size,
        micro_batches=number_of_micro_batches(recipe.batch_size, world, recipe.micro_batch_size),
        samples_at_a_time=samples_at_a_time(recipe, world),
        steps=recipe.schedule.steps,
        units=plan.units,
        flops=flops,
        schedule=_schedule(recipe),
        sources=sources,
        ranks=ranks,
    )


def samples_at_a_time(recipe: RunRecipe, world: int) -> int:
    """Samples that a rank holds at a time: the largest of its micro-batches."""
    share = -(-recipe.batch_size // world)
    return -(-share // number_of_micro_batches(recipe.batch_size, world, recipe.micro_batch_size))


def _schedule(recipe: RunRecipe) -> list[tuple[int, float]]:
    """Steps, 0 for the first, and the factor on every peak rate."""
    schedule = recipe.schedule
    steps, warmup = schedule.steps, min(schedule.warmup, schedule.steps - 1)
    points = sorted({0, warmup, *(steps * quarter // 4 for quarter in (1, 2, 3)), steps - 1})
    return [(step, warmup_cosine(step, steps=steps, warmup=schedule.warmup, floor=schedule.floor)) for step in points]


def _device(memory: float | None) -> Device:
    if memory is not None:
        return Device("the device", int(memory * GIB), gpu=True)
    if torch.cuda.is_available():
        return Device(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory, gpu=True)
    if (found := total_memory()) is None:
        raise QLIPError("this system does not say how much memory it has; name the memory to plan for")
    return Device("this machine's RAM", found, gpu=False)


# -------------------------------------------------------------------- parameters


def _rates(plan: Plan) -> dict[int, tuple[float, bool]]:
    """Peak rate of each trained parameter, by its id, and whether Muon moves it."""
    return {
        id(parameter): (group["initial_lr"], isinstance(optimizer, Muon))
        for phase in plan.task.phases
        for optimizer in phase.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def parts_of(plan: Plan) -> list[PartSummary]:
    """Parts of the model, then the other networks."""
    rates = _rates(plan)
    parts: dict[str, list[nn.Parameter]] = {}
    for network, module in plan.task.networks.items():
        for name, parameter in module.named_parameters():
            parts.setdefault(plan.part(name) if network == "model" else network, []).append(parameter)
    found = []
    for part, parameters in parts.items():
        trained = [one for one in parameters if id(one) in rates]
        low_high: list[Rates] = []
        for muon in (False, True):
            of_kind = sorted(rates[id(one)][0] for one in trained if rates[id(one)][1] == muon)
            low_high.append((of_kind[0], of_kind[-1]) if of_kind else None)
        found.append(PartSummary(part, _count(parameters), _count(trained), *low_high))
    return found


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# -------------------------------------------------------------------- memory


class Needs:
    """Memory of one rank, for recipes that differ only in settings which leave the trained parameters as they are.

    Args:
        plan: of the recipe.
        world: number of ranks.
        device: that must be enough.
    """

    def __init__(self, plan: Plan, world: int, device: Device) -> None:
        self.plan, self.world, self.device = plan, world, device
        self._measured: dict[tuple[bool, bool], int] = {}

    def of(self, recipe: RunRecipe) -> MemoryEstimate:
        """Estimate for a recipe."""
        shards = min(recipe.parallel.shard or self.world, self.world) if recipe.parallel.kind == "fsdp" else 1
        resident = self.resident(recipe, shards)
        passing = self.plan.passing(self.world, recipe)
        if shards > 1:
            passing["gathered layers"] = 2 * self._largest_unit  # one computes, the next arrives
        # Muon gathers whole matrices on every rank
        update = max(size if muon else size // shards for muon, size in self._optimizers[1])
        copies = resident.get("bfloat16 copies", 0)  # in the measured bytes, and do not grow with the samples
        activations = max(0, self._activations(recipe) - copies) * samples_at_a_time(recipe, self.world)
        estimate = MemoryEstimate(resident, activations // len(self.plan.batch), passing, update)
        return replace(estimate, reserve=GIB + estimate.peak // 20) if self.device.gpu else estimate

    def after(self, recipe: RunRecipe, change: Mapping[str, Any]) -> Remedy:
        """Estimate for a recipe with other values at dotted keys."""
        total = self.of(changed(recipe, change)).total
        settings = tuple(f"{key}={str(value).lower()}" for key, value in change.items())
        return Remedy(settings, total, total <= self.device.memory)

    def in_smaller_pieces(self, recipe: RunRecipe, change: Mapping[str, Any]) -> Remedy:
        """The largest micro-batch, halved as often as it takes, that fits with other changes; 1 if none does."""
        size = samples_at_a_time(recipe, self.world)
        while True:
            size = max(1, size // 2)
            remedy = self.after(recipe, {**change, "micro_batch_size": size})
            if remedy.fits or size == 1:
                return remedy

    def resident(self, recipe: RunRecipe, shards: int = 1) -> dict[str, int]:
        """Bytes that are there all the time, by what they are for; ``shards`` ranks share a copy."""
        rates, state, found = _rates(self.plan), self._optimizers[0], {}
        for name, module in self.plan.task.networks.items():
            every = list(module.parameters())
            trained = [one for one in every if id(one) in rates]
            kinds = {
                "weights": _bytes(every),
                "gradients": _bytes(trained),
                f"{recipe.optimizer.name} state": sum(state.get(id(one), 0) for one in trained),
            }
            if name != "model":
                found[name] = sum(kinds.values()) // shards
                continue
            if recipe.ema is not None:
                kinds["moving average"] = _bytes(trained)
            found |= {kind: size // shards for kind, size in kinds.items()}
            if recipe.precision == "bfloat16":
                found["bfloat16 copies"] = 2 * _count(trained)
        found |= {name: _bytes(one.network.parameters()) for name, one in self.plan.task.frozen.items()}
        return {name: size for name, size in found.items() if size}

    @cached_property
    def _optimizers(self) -> tuple[dict[int, int], list[tuple[bool, int]]]:
        """Bytes of optimizer state by id of parameter; per optimizer if it is Muon, and the most that a step adds."""
        state: dict[int, int] = {}
        updates = []
        for phase in self.plan.task.phases:
            _with_gradients(phase)
            for optimizer in phase.optimizers:
                found, update = optimizer_bytes(optimizer)
                state |= found
                updates.append((isinstance(optimizer, Muon), update))
        return state, updates

    @cached_property
    def _largest_unit(self) -> int:
        """Bytes of the largest block, or of all that is in no block."""
        model = self.plan.task.networks["model"]
        blocks = [_bytes(one.parameters()) for one in model.modules() if isinstance(one, Block)]
        return max([*blocks, _bytes(model.parameters()) - sum(blocks)])

    def _activations(self, recipe: RunRecipe) -> int:
        """Most bytes in a forward and backward pass of the plan's samples, over the phases."""
        key = (recipe.precision == "bfloat16", recipe.activation_checkpointing)
        if key not in self._measured:
            self._set_checkpointing(recipe.activation_checkpointing)
            phases = self.plan.task.phases
            for phase in phases:
                _with_gradients(phase)
            inputs = _bytes(value for value in vars(self.plan.batch).values() if isinstance(value, Tensor))
            self._measured[key] = inputs + max(peak_bytes(self._forward(phase, key[0])) for phase in phases)
        return self._measured[key]

    @cached_property
    def flops(self) -> float:
        """Floating-point operations per sample of the first phase, both passes."""
        self._set_checkpointing(False)  # it makes a step longer, not its work larger
        return count_flops(self._forward(self.plan.task.phases[0], False)) / len(self.plan.batch)

    def _set_checkpointing(self, enabled: bool) -> None:
        for network in self.plan.task.networks.values():
            for module in network.modules():
                if isinstance(module, Block):
                    module.activation_checkpointing = enabled

    def _forward(self, phase: Phase, bfloat16: bool) -> Run:
        def run() -> Mapping[str, Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                inputs = phase.forward(self.plan.batch, False)
            return inputs.sums | inputs.mean_stats | inputs.embeddings

        return run


def _with_gradients(phase: Phase) -> None:
    """Give parameters that train a gradient, so that it is not counted as new."""
    for parameter in phase.parameters:
        parameter.grad = torch.zeros_like(parameter)


def find_remedies(recipe: RunRecipe, needs: Needs) -> list[Remedy]:
    """Settings that make it fit, each alone; where none does, as many together as it takes, or all of them."""
    changes = list(needs.plan.saving)
    model = needs.plan.task.networks["model"]
    if not recipe.activation_checkpointing and any(isinstance(one, Block) for one in model.modules()):
        changes.append({"activation_checkpointing": True})
    if recipe.precision == "float32" and needs.device.gpu:
        changes.append({"precision": "bfloat16"})
    if needs.world > 1 and recipe.parallel.kind == "ddp":
        changes.append({"parallel.kind": "fsdp"})
    alone = [needs.after(recipe, change) for change in changes]
    in_pieces = _takes_pieces(recipe)
    if in_pieces:
        alone.append(needs.in_smaller_pieces(recipe, {}))
    if fitting := [remedy for remedy in alone if remedy.fits]:
        return fitting
    together: dict[str, Any] = {}
    best = alone[-1:]
    for change in changes:
        together |= change
        best = [(needs.in_smaller_pieces if in_pieces else needs.after)(recipe, together)]
        if best[0].fits:
            break
    return best


def _takes_pieces(recipe: RunRecipe) -> bool:
    """Return whether a recipe allows micro-batches; balancing losses by their gradients does not."""
    try:
        changed(recipe, {"micro_batch_size": 1})
    except QLIPError:
        return False
    return True
