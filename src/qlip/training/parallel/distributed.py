"""Processes that train together: which one this is, on which device, how they agree. A single one is the same, alone.

torchrun (or anything else that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) starts them.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous

from qlip.errors import QLIPError
from qlip.modeling.transformer import Block
from qlip.runtime.ranks import local_rank, rank, world_size
from qlip.runtime.rng import hash_int
from qlip.training.accumulate import Sync
from qlip.training.parallel.faults import CollectiveError, Reasons, is_about_a_peer
from qlip.training.parallel.parallelize import averaged, compile_blocks, replicate, shard, synchronised
from qlip.training.recipe_schema import ParallelSection, RunRecipe

JSON = TypeVar("JSON")
Made = TypeVar("Made")

# PyTorch 2.13 renamed them; the releases before know the old names only
warnings.filterwarnings("ignore", r".*torch\.distributed\.(all_gather_into|reduce_scatter)_tensor", FutureWarning)
warnings.filterwarnings("ignore", r"`broadcast_buffers` is deprecated", FutureWarning)
# nothing changes a network's outputs in place
warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)


class Parallel:
    """This process and its peers; a context manager, for the group ends with it.

    Attributes:
        rank: of this process, from 0.
        world: number of processes.
        device: where this one computes: its own GPU, or the CPU.
        console: prints on the first rank, and is quiet on the others.

    Args:
        recipe: its ``parallel``, ``precision`` and ``compile``.
        console: for progress; standard error by default.

    Raises:
        QLIPError: more processes than GPUs, or ranks that cannot be shared out as the recipe says.
    """

    def __init__(self, recipe: RunRecipe, console: Console | None = None) -> None:
        self.settings, self.precision, self.compile = recipe.parallel, recipe.precision, recipe.compile
        self.rank, self.world = rank(), world_size()
        self.device = _device(local_rank())
        check_shares(self.settings, self.world)
        self.console = (console or Console(stderr=True)) if self.rank == 0 else Console(quiet=True)
        self._meshes: dict[str, DeviceMesh] = {}
        self._blocks = 0
        self._reasons: Reasons | None = None

    # ---------------------------------------------------------------- its life

    def __enter__(self) -> Self:
        """Meet the others. Returns itself."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world == 1:
            return self
        timeout = timedelta(seconds=self.settings.timeout)
        # flags and states travel between CPUs, so that no GPU has to be waited for
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        try:
            store, _, _ = next(rendezvous("env://", self.rank, self.world, timeout=timeout))
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=timeout)
        except (dist.DistError, RuntimeError, ValueError) as error:
            raise QLIPError(f"rank {self.rank} of {self.world} cannot meet the others ({error})") from None
        self._reasons = Reasons(PrefixStore("qlip", store), self.rank, self.world)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Part in peace, or see to it that one line says why not: the rank where it began says it, the rest are silent.

        Raises:
            QLIPError: on the rank that speaks.
            SystemExit: on the others.
        """
        if self._reasons is None:
            return
        if error is None:
            dist.barrier()
            dist.destroy_process_group()
        elif isinstance(error, CollectiveError):
            dist.destroy_process_group()  # all are here, so the process may train again
            self._end(error if self.first else None)
        elif is_about_a_peer(error):
            reason = self._reasons.explain_silence(error)
            self._end(None if reason is None else QLIPError(reason))
        elif not isinstance(error, SystemExit):
            reason = " ".join(str(error).split()) or type(error).__name__
            self._reasons.give(f"rank {self.rank}: {reason}")
            self._end(QLIPError(f"rank {self.rank}: {reason}") if isinstance(error, QLIPError) else error)

    def _end(self, error: BaseException | None) -> None:
        if error is None:
            raise SystemExit(1)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            get_error_handler().record_exception(error)  # torchrun's own report then names the cause
        raise error from (None if isinstance(error, QLIPError) else error.__cause__)

    # ---------------------------------------------------------------- agreement

    def say(self, line: str) -> None:
        """Print a line as it is, on the first rank."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks and writes for all."""
        return self.rank == 0

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of all ranks, each for itself."""
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def total(self, numbers: Sequence[int]) -> list[int]:
        """The sum of all ranks', each for itself."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def any(self, *flags: bool) -> list[bool]:
        """Whether any rank says so, each for itself."""
        return [number > 0 for number in self.largest([int(flag) for flag in flags])]

    def _reduced(self, numbers: Sequence[int], operation: Any) -> list[int]:
        if self.world == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(values, operation)
        return [int(value) for value in values]

    def gather(self, value: JSON) -> list[JSON]:
        """Everybody's value, in the order of ranks: what JSON can say, for nothing is unpickled here."""
        if self.world == 1:
            return [value]
        own = _bytes(value)
        (most,) = self.largest([len(own)])
        padded = torch.full((most,), ord(" "), dtype=torch.uint8)  # JSON does not mind spaces behind it
        padded[: len(own)] = own
        everybody = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(everybody, padded)
        return [_value(one) for one in everybody]

    def broadcast(self, value: JSON) -> JSON:
        """The first rank's value, of what JSON can say."""
        if self.world == 1:
            return value
        own = _bytes(value) if self.first else torch.empty(0, dtype=torch.uint8)
        (length,) = self.largest([len(own)])
        message = own if self.first else torch.empty(length, dtype=torch.uint8)
        dist.broadcast(message, 0)
        result: JSON = _value(message)
        return result

    def on_rank0(self, make: Callable[[], JSON]) -> JSON:
        """Let the first rank do something while the others wait.

        Args:
            make: returns what JSON can say (None too).

        Raises:
            CollectiveError: on all ranks, where it raised a QLIPError.
        """
        if self.world == 1:
            return make()
        value: Any = None
        fault: str | None = None
        if self.first:
            try:
                value = make()
            except QLIPError as error:
                fault = str(error)
        value, fault = self.broadcast([value, fault])
        if fault is not None:
            raise CollectiveError(fault)
        result: JSON = value
        return result

    def all_or_none(self, make: Callable[[], Made]) -> Made:
        """Do something on every rank; where one cannot, none goes on.

        Args:
            make: returns this rank's own.

        Raises:
            CollectiveError: on all ranks, with the first's reason.
        """
        if self.world == 1:
            return make()
        made: list[Made] = []
        fault: str | None = None
        try:
            made.append(make())
        except QLIPError as error:
            fault = str(error)
        if any(self.any(fault is not None)):
            faults = [f"rank {rank}: {one}" for rank, one in enumerate(self.gather(fault)) if one is not None]
            raise CollectiveError(faults[0])
        return made[0]

    # ---------------------------------------------------------------- networks

    def wrap(self, module: nn.Module, ignored: Sequence[nn.Parameter] = ()) -> nn.Module:
        """See :class:`qlip.training.task.Wrap`. A module that has nothing to train is moved to the device only."""
        module.to(self.device)
        self._blocks += sum(isinstance(child, Block) for child in module.modules())
        if self.compile:
            compile_blocks(module)
        if self.world == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        if self.settings.kind == "ddp":
            return replicate(module, ignored, self.device)
        return shard(module, ignored, self.mesh(self.device.type))

    def check_blocks(self) -> None:
        """Raise QLIPError if compilation or sharding was asked for and no wrapped network has a `Block`."""
        for key, asked in (("compile", self.compile), ("parallel.kind fsdp", self.settings.kind == "fsdp")):
            if asked and not self._blocks:
                remedy = "set compile=false" if key == "compile" else "set parallel.kind=ddp"
                raise QLIPError(f"{key}: the model has no Block; subclass qlip.modeling.transformer.Block, or {remedy}")

    def mesh(self, device_type: str) -> DeviceMesh:
        """Ranks as FSDP sees them, for collectives on a kind of device: a row, or (copies, shards of a copy)."""
        if device_type not in self._meshes:
            share = self.settings.shard
            if share is None or share == self.world:
                mesh = init_device_mesh(device_type, (self.world,), mesh_dim_names=("shard",))
            else:
                shape = (self.world // share, share)
                mesh = init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
            self._meshes[device_type] = mesh
        return self._meshes[device_type]

    def sync(self, modules: Sequence[nn.Module]) -> Sync:
        """When wrapped modules exchange gradients, for :func:`qlip.training.accumulate.backward`."""

        def entered(last: bool) -> AbstractContextManager[Any]:
            return synchronised(modules, last)

        return entered

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average over ranks the gradients of parameters that no wrapper covers."""
        if self.world > 1:
            averaged([parameter.grad for parameter in parameters if parameter.grad is not None], self.world)

    def autocast(self) -> torch.autocast:
        """The recipe's precision, around the networks' forward passes."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def group(self) -> dist.ProcessGroup | None:
        """A new group of all ranks' CPUs, for work beside the training's; None for a single process."""
        if self.world == 1:
            return None
        timeout = timedelta(seconds=self.settings.timeout)
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
        return group

    def seed(self, seed: int) -> None:
        """Seed what differs between ranks (dropout); the first rank's seed is the recipe's own.

        Called when the networks are made, for their weights must not differ.
        """
        if self.rank > 0:
            seed = hash_int(seed, "rank", self.rank) % 2**63
        torch.manual_seed(seed)


def check_shares(settings: ParallelSection, world: int) -> None:
    """Raises QLIPError where so many ranks cannot share copies of a model as the recipe says; one shares nothing."""
    share = settings.shard
    if share is not None and world > 1 and world % share:
        raise QLIPError(f"parallel.shard: {world} ranks are not a multiple of {share}; change either")


def _device(number: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if number >= torch.cuda.device_count():
        raise QLIPError(
            f"local rank {number} has no GPU, for this machine shows {torch.cuda.device_count()};"
            " start as many processes on it (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", number)


def _bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value(message: Tensor) -> Any:
    return json.loads(message.numpy().tobytes())
