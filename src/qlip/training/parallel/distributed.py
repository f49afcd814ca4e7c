"""Distributed training: process group, device, collectives and wrapping of networks; also for a single process.

torchrun (or any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) starts the processes.
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
from qlip.runtime.progress import print_line
from qlip.runtime.ranks import local_rank, rank, world_size
from qlip.runtime.rng import hash_int
from qlip.training.accumulate import Sync
from qlip.training.parallel.faults import CollectiveError, Reasons, is_about_a_peer
from qlip.training.parallel.parallelize import (
    averaged,
    checkpoint_blocks,
    compile_blocks,
    placed,
    replicate,
    shard,
    synchronised,
)
from qlip.training.recipe_schema import ParallelSection, RunRecipe

JSON = TypeVar("JSON")
Made = TypeVar("Made")

# PyTorch 2.13 renamed these collectives; older releases have the old names only
warnings.filterwarnings("ignore", r".*torch\.distributed\.(all_gather_into|reduce_scatter)_tensor", FutureWarning)
warnings.filterwarnings("ignore", r"`broadcast_buffers` is deprecated", FutureWarning)
# harmless: network outputs are never changed in place
warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)


class Parallel:
    """Process group of a training run, as a context manager that creates and destroys it.

    Attributes:
        rank: rank of this process, from 0.
        world: number of ranks.
        device: device of this rank: its own GPU, or the CPU.
        console: console that prints on rank 0 and is quiet on the other ranks.

    Args:
        recipe: recipe, of which ``parallel``, ``precision``, ``compile`` and ``activation_checkpointing`` are used.
        console: console for progress; standard error by default.

    Raises:
        QLIPError: if there are more processes than GPUs, or the world size does not fit ``parallel.shard``.
    """

    def __init__(self, recipe: RunRecipe, console: Console | None = None) -> None:
        self.settings, self.precision, self.compile = recipe.parallel, recipe.precision, recipe.compile
        self.checkpointing = recipe.activation_checkpointing
        self.rank, self.world = rank(), world_size()
        self.device = _device(local_rank())
        check_shares(self.settings, self.world)
        self.console = (console or Console(stderr=True)) if self.rank == 0 else Console(quiet=True)
        self._meshes: dict[str, DeviceMesh] = {}
        self._blocks = 0
        self._reasons: Reasons | None = None

    # ---------------------------------------------------------------- setup and shutdown

    def __enter__(self) -> Self:
        """Join the process group and return self."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world == 1:
            return self
        timeout = timedelta(seconds=self.settings.timeout)
        # flags and states are exchanged on CPUs, to avoid GPU synchronisation
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        try:
            store, _, _ = next(rendezvous("env://", self.rank, self.world, timeout=timeout))
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=timeout)
        except (dist.DistError, RuntimeError, ValueError) as error:
            raise QLIPError(f"rank {self.rank} of {self.world} cannot join the process group ({error})") from None
        self._reasons = Reasons(PrefixStore("qlip", store), self.rank, self.world)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the process group. After an error, only the rank where it began reports it; the others exit silently.

        Raises:
            QLIPError: on the rank that reports the error.
            SystemExit: on the other ranks.
        """
        if self._reasons is None:
            return
        if error is None:
            dist.barrier()
            dist.destroy_process_group()
        elif isinstance(error, CollectiveError):
            dist.destroy_process_group()  # all ranks get here, so the process may train again
            self._end(error if self.first else None)
        elif is_about_a_peer(error):
            reason = self._reasons.explain_silence(error)
            self._end(None if reason is None else QLIPError(reason))
        elif not isinstance(error, SystemExit):
            reason = " ".join(str(error).split()) or type(error).__name__
            self._reasons.give(f"rank {self.rank}: {reason}")
            self._end(QLIPError(f"rank {self.rank}: {reason}") if isinstance(error, QLIPError) else error)

    def _end(self, error: BaseException | None) -> None:
        """Raise the error, or exit silently if it is None."""
        if error is None:
            raise SystemExit(1)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            get_error_handler().record_exception(error)  # shown in torchrun's own report
        raise error from (None if isinstance(error, QLIPError) else error.__cause__)

    # ---------------------------------------------------------------- collectives

    def say(self, line: str) -> None:
        """Print a line verbatim, on rank 0 only."""
        print_line(self.console, line)

    @property
    def first(self) -> bool:
        """True on rank 0, which prints and writes for all ranks."""
        return self.rank == 0

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """Elementwise maximum over ranks."""
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def total(self, numbers: Sequence[int]) -> list[int]:
        """Elementwise sum over ranks."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def any(self, *flags: bool) -> list[bool]:
        """Elementwise logical or over ranks."""
        return [number > 0 for number in self.largest([int(flag) for flag in flags])]

    def _reduced(self, numbers: Sequence[int], operation: Any) -> list[int]:
        if self.world == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(values, operation)
        return [int(value) for value in values]

    def gather(self, value: JSON) -> list[JSON]:
        """Gather a JSON value from all ranks, in the order of ranks; JSON because nothing is unpickled."""
        if self.world == 1:
            return [value]
        own = _bytes(value)
        (most,) = self.largest([len(own)])
        padded = torch.full((most,), ord(" "), dtype=torch.uint8)  # JSON allows trailing spaces
        padded[: len(own)] = own
        received = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(received, padded)
        return [_value(message) for message in received]

    def broadcast(self, value: JSON) -> JSON:
        """Return rank 0's JSON value on all ranks."""
        if self.world == 1:
            return value
        own = _bytes(value) if self.first else torch.empty(0, dtype=torch.uint8)
        (length,) = self.largest([len(own)])
        message = own if self.first else torch.empty(length, dtype=torch.uint8)
        dist.broadcast(message, 0)
        result: JSON = _value(message)
        return result

    def on_rank0(self, make: Callable[[], JSON]) -> JSON:
        """Call a function on rank 0 and return its result on all ranks.

        Args:
            make: returns a JSON value, or None.

        Raises:
            CollectiveError: on all ranks, if ``make`` raised a QLIPError.
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
        """Call a function on every rank; if it fails on any rank, raise on all.

        Args:
            make: returns this rank's result.

        Raises:
            CollectiveError: on all ranks, with the message of the lowest rank that failed.
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
        """Implement :class:`qlip.training.task.Wrap`; without trainable parameters, only move the module."""
        placed(module, self.device)
        self._blocks += sum(isinstance(child, Block) for child in module.modules())
        if self.checkpointing:
            checkpoint_blocks(module)
        if self.compile:
            compile_blocks(module)
        if self.world == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        if self.settings.kind == "ddp":
            return replicate(module, ignored, self.device)
        return shard(module, ignored, self.mesh(self.device.type))

    def check_blocks(self) -> None:
        """Raise QLIPError if a setting that works on blocks is enabled and no wrapped network has a `Block`."""
        settings = (
            ("compile", self.compile, "compile=false"),
            ("activation_checkpointing", self.checkpointing, "activation_checkpointing=false"),
            ("parallel.kind fsdp", self.settings.kind == "fsdp", "parallel.kind=ddp"),
        )
        for key, enabled, remedy in settings:
            if enabled and not self._blocks:
                raise QLIPError(
                    f"{key}: the model has no Block; subclass qlip.modeling.transformer.Block, or set {remedy}"
                )

    def mesh(self, device_type: str) -> DeviceMesh:
        """Device mesh for FSDP on a type of device: 1-D (shard), or 2-D (replicate, shard)."""
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
        """Return the gradient synchronisation of wrapped modules, for :func:`qlip.training.accumulate.backward`."""

        def entered(last: bool) -> AbstractContextManager[Any]:
            return synchronised(modules, last)

        return entered

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average the gradients of parameters outside any wrapper over ranks."""
        if self.world > 1:
            averaged([parameter.grad for parameter in parameters if parameter.grad is not None], self.world)

    def autocast(self) -> torch.autocast:
        """Autocast context of the recipe's precision, for forward passes."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def group(self) -> dist.ProcessGroup | None:
        """New gloo group of all ranks, for collectives concurrent to training; None for a single process."""
        if self.world == 1:
            return None
        timeout = timedelta(seconds=self.settings.timeout)
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
        return group

    def seed(self, seed: int) -> None:
        """Seed the RNG differently on each rank, e.g. for dropout; rank 0 uses the recipe's seed.

        Call it after the networks are built, because their initial weights must be equal on all ranks.
        """
        if self.rank > 0:
            seed = hash_int(seed, "rank", self.rank) % 2**63
        torch.manual_seed(seed)


def check_shares(settings: ParallelSection, world: int) -> None:
    """Raise QLIPError if the world size is not a multiple of ``parallel.shard``; a single rank does not shard."""
    share = settings.shard
    if share is not None and world > 1 and world % share:
        raise QLIPError(
            f"parallel.shard: {world} ranks are not a multiple of {share}; change the number of ranks or parallel.shard"
        )


def _device(number: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if number >= torch.cuda.device_count():
        raise QLIPError(
            f"local rank {number} has no GPU: this machine has {torch.cuda.device_count()} visible;"
            " start at most that many processes on it (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", number)


def _bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value(message: Tensor) -> Any:
    return json.loads(message.numpy().tobytes())
