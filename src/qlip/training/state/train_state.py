"""Named tensors of a run (networks, optimizers, EMA) with their sharding: collected for a save, restored by a load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from qlip.errors import QLIPError, nearest
from qlip.training.optim.ema import EMA
from qlip.training.optim.optimizers import load_named_state, named_parameters, named_state
from qlip.training.state.dcp_safetensors import Entry
from qlip.training.task import Task

MODEL, OPTIMIZER, AVERAGE = "model", "optimizer", "ema"


def collect(task: Task, ema: EMA | None) -> dict[str, Tensor]:
    """Collect all tensors to save.

    Names are ``<network>/<name>``, ``optimizer/<phase>.<number>/<parameter>/<key>`` and ``ema/<name>``.
    """
    tensors: dict[str, Tensor] = {}
    for network, module in task.networks.items():
        assert network not in (OPTIMIZER, AVERAGE)
        tensors |= {f"{network}/{key}": value for key, value in module.state_dict().items()}
    for prefix, optimizer in _optimizers(task).items():
        tensors |= {f"{prefix}/{key}": value for key, value in named_state(optimizer).items()}
    if ema is not None:
        tensors |= {f"{AVERAGE}/{key}": value for key, value in ema.state().items()}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def targets(task: Task, ema: EMA | None, stored: Mapping[str, Entry], where: str) -> dict[str, Tensor]:
    """Build the tensors to load into, with the shapes and sharding of this run.

    Networks and averages are loaded in place; optimizer state goes into new tensors.

    Args:
        task: the run's task.
        ema: its averages, if any.
        stored: index of the checkpoint.
        where: name of the checkpoint, for errors.

    Raises:
        QLIPError: the checkpoint is of another model or another recipe.
    """
    wanted = {name: tensor for name, tensor in collect(task, ema).items() if not name.startswith(f"{OPTIMIZER}/")}
    for prefix, optimizer in _optimizers(task).items():
        parameters = {name: parameter for name, parameter, _ in named_parameters(optimizer)}
        for name in stored:
            if name.startswith(f"{prefix}/"):
                wanted[name] = _empty_state(
                    parameters.get(name.removeprefix(f"{prefix}/").rpartition("/")[0]), stored[name]
                )
    odd = sorted(wanted.keys() ^ stored.keys())
    if odd:
        what = f"lacks {odd[0]!r}" if odd[0] in wanted else f"has {odd[0]!r}{nearest(odd[0], wanted)} in addition"
        raise QLIPError(f"{where}: holds another model ({what}); choose another run folder")
    for name, tensor in wanted.items():
        if tuple(tensor.shape) != stored[name].shape:
            raise QLIPError(
                f"{where}: holds another model ({name!r} is {stored[name].shape}, here {tuple(tensor.shape)});"
                " choose another run folder"
            )
    return wanted


def restore(task: Task, ema: EMA | None, loaded: Mapping[str, Tensor]) -> None:
    """Load optimizer state and averages from filled :func:`targets`; networks were filled in place."""
    for prefix, optimizer in _optimizers(task).items():
        load_named_state(optimizer, _below(prefix, loaded))
    if ema is not None:
        ema.load(_below(AVERAGE, loaded))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _optimizers(task: Task) -> dict[str, Optimizer]:
    return {
        f"{OPTIMIZER}/{phase.name}.{number}": optimizer
        for phase in task.phases
        for number, optimizer in enumerate(phase.optimizers)
    }


def _empty_state(parameter: Tensor | None, stored: Entry) -> Tensor:
    """Zeros for one tensor of optimizer state: sharded like its parameter if the shapes are equal, else unsharded."""
    if parameter is not None and tuple(parameter.shape) == stored.shape:
        return torch.zeros_like(parameter.detach(), dtype=stored.dtype)
    return torch.zeros(stored.shape, dtype=stored.dtype)


class Staging:
    """CPU copies that a save can write while training continues; the buffers are reused by later saves."""

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor], cpu_mesh: Any) -> dict[str, Tensor]:
        """Copy tensors to the CPU; sharded tensors stay sharded, over ``cpu_mesh``.

        Args:
            tensors: named tensors on any device.
            cpu_mesh: returns the device mesh of the ranks' CPUs; called only for sharded tensors.
        """
        copies: dict[str, Tensor] = {}
        moved = False
        for name, tensor in tensors.items():
            own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            copy = self._copies.get(name)
            if copy is None or copy.shape != own.shape or copy.dtype != own.dtype:
                copy = torch.empty(own.shape, dtype=own.dtype, pin_memory=own.device.type == "cuda")
                self._copies[name] = copy
            copy.copy_(own, non_blocking=True)
            moved |= own.device.type == "cuda"
            copies[name] = copy if not isinstance(tensor, DTensor) else _sharded(copy, tensor, cpu_mesh())
        if moved:
            torch.cuda.current_stream().synchronize()
        return copies


def _sharded(local: Tensor, like: DTensor, mesh: Any) -> Tensor:
    return DTensor.from_local(
        local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).detach()
