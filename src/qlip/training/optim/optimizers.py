"""Parameters to optimizers: rates of parts and layers, what decays, and which matrices Muon takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from qlip.errors import QLIPError
from qlip.modeling.parts import ParamGroups
from qlip.training.optim.lamb import LAMB
from qlip.training.optim.muon import Muon
from qlip.training.recipe_schema import OptimizerSection


@dataclass(frozen=True)
class ParamSettings:
    """How one parameter is trained.

    Attributes:
        muon: whether Muon takes it.
        lr: peak learning rate.
        weight_decay: decoupled.
    """

    muon: bool
    lr: float
    weight_decay: float


def build_optimizers(
    named: Iterable[tuple[str, nn.Parameter]],
    settings: OptimizerSection,
    groups: ParamGroups,
    part_rates: Mapping[Any, float] | None = None,
) -> list[Optimizer]:
    """Optimizers over named parameters.

    Norms, biases and embeddings never decay. Each group keeps its peak rate as ``initial_lr``, which a schedule
    multiplies, and its parameters' names as ``param_names``.

    Args:
        named: names and parameters, after sharding; those that need no gradient, and parts of rate 0, are left out.
        settings: the recipe's.
        groups: of the model that has the parameters.
        part_rates: peak learning rates of parts that have one of their own.

    Returns:
        One AdamW, one LAMB, or a Muon (arXiv 2502.16982: its update scaled to AdamW's root mean square, so that rates
        and decay mean the same) for the blocks' matrices and an AdamW for the rest.

    Raises:
        QLIPError: nothing is left to train, or a setting applies to no parameter.
    """
    by_settings: dict[tuple[ParamSettings, bool], dict[str, Any]] = {}
    parameters = dict(named)
    chosen = peak_settings(parameters.items(), settings, groups, part_rates)
    if not chosen:
        raise QLIPError("nothing to train: every part is locked or has a learning rate of 0; unlock one")
    check_applies(chosen, settings, groups)
    for name, one in chosen.items():
        parameter = parameters[name]
        # one call over many tensors takes plain or sharded ones, not both
        group = by_settings.setdefault((one, isinstance(parameter, DTensor)), _new_group(one))
        group["params"].append((name, parameter))
    muon = [group for (one, _), group in by_settings.items() if one.muon]
    rest = [group for (one, _), group in by_settings.items() if not one.muon]
    optimizers: list[Optimizer] = []
    if muon:
        dtype = getattr(torch, settings.muon_precision)
        optimizers.append(Muon(muon, settings.muon_lr, settings.muon_momentum, settings.weight_decay, dtype=dtype))
    if rest and settings.name == "lamb":
        optimizers.append(LAMB(rest, settings.lr, settings.betas, settings.eps, settings.weight_decay))
    elif rest:
        optimizers.append(adamw(rest, settings.lr, settings.betas, settings.eps, settings.weight_decay))
    return optimizers


def adamw(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float = 1e-8, weight_decay: float = 0.05
) -> torch.optim.AdamW:
    """PyTorch's AdamW, one kernel for all tensors where the device has it."""
    devices = {parameter.device.type for group in groups for _, parameter in group["params"]}
    fused = devices <= {"cpu", "cuda"}
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


def peak_settings(
    named: Iterable[tuple[str, Tensor]],
    settings: OptimizerSection,
    groups: ParamGroups,
    part_rates: Mapping[Any, float] | None = None,
) -> dict[str, ParamSettings]:
    """How each parameter is trained, by name; those that do not train are not in it.

    A part's own rate stands for ``lr`` and scales Muon's rate as it does ``lr``; a parameter at depth k takes
    ``layer_decay`` to the power k of that.
    """
    chosen: dict[str, ParamSettings] = {}
    for name, parameter in named:
        share = (part_rates or {}).get(groups.part(name), settings.lr) / settings.lr
        if not parameter.requires_grad or not share:
            continue
        share *= (settings.layer_decay or 1.0) ** groups.depth(name)
        muon = settings.name == "muon" and groups.is_matrix(name)
        rate = settings.muon_lr if muon else settings.lr
        chosen[name] = ParamSettings(muon, rate * share, settings.weight_decay if groups.decays(name) else 0.0)
    return chosen


def check_applies(chosen: Mapping[str, ParamSettings], settings: OptimizerSection, groups: ParamGroups) -> None:
    """Raise QLIPError for a setting of the optimizer that applies to no parameter that trains."""
    if settings.name == "muon" and not any(one.muon for one in chosen.values()):
        raise QLIPError("optimizer.name muon: the model has no matrix inside a Block that trains; take adamw or lamb")
    if settings.layer_decay is not None and not any(groups.depth(name) for name in chosen):
        raise QLIPError("optimizer.layer_decay: the model has no Block that trains, so no depth; remove layer_decay")


def _new_group(settings: ParamSettings) -> dict[str, Any]:
    rate = settings.lr
    return {"params": [], "lr": rate, "initial_lr": rate, "weight_decay": settings.weight_decay}


def named_state(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimizer's tensors by parameter name, ``<parameter>/<key>``; its settings come from the recipe.

    Moments of sharded parameters are sharded too (DTensor); counts are plain scalars.
    """
    state: dict[str, Tensor] = {}
    for name, parameter, _ in named_parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return state


def load_named_state(optimizer: Optimizer, state: dict[str, Tensor]) -> None:
    """Put :func:`named_state` back. A parameter without state has not been stepped yet.

    Args:
        optimizer: over parameters of the same names.
        state: tensors of any device; those of a sharded parameter are DTensors cut as it is.
    """
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, short = key.rpartition("/")
        entries.setdefault(name, {})[short] = value
    for name, parameter, fused in named_parameters(optimizer):
        own = entries.get(name)
        if own:
            optimizer.state[parameter] = {
                # a fused step counts on the device, any other on the CPU, where reading it waits for nothing
                key: value.detach().clone().to(parameter.device if value.ndim or fused else "cpu")
                for key, value in own.items()
            }


def named_parameters(optimizer: Optimizer) -> list[tuple[str, nn.Parameter, bool]]:
    """Name and parameter of all that an optimizer moves, and whether its group's step is fused."""
    return [
        (name, parameter, bool(group.get("fused")))
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    ]
