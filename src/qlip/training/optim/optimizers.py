"""Optimizers over named parameters: learning rates per part and layer, weight decay, and the matrices for Muon."""

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
    """Optimizer settings of one parameter.

    Attributes:
        muon: True if Muon updates it.
        lr: peak learning rate.
        weight_decay: decoupled weight decay.
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
    """Build the optimizers of a model's parameters.

    Normalisation gains, biases and, except with LAMB or ``decay_embeddings``, embeddings have no weight decay. Each
    group stores its peak rate as ``initial_lr``, which a schedule multiplies, and its parameters' names as
    ``param_names``.

    Args:
        named: names and parameters, after sharding; frozen parameters and parts with learning rate 0 are skipped.
        settings: optimizer section of the recipe.
        groups: parameter groups of the model.
        part_rates: peak learning rates of parts with their own rate.

    Returns:
        One AdamW; one LAMB; or a Muon for the matrices inside blocks (update scaled to AdamW's root mean square, arXiv
        2502.16982, so that rates and weight decay are comparable) and an AdamW for all other parameters.

    Raises:
        QLIPError: if no parameter is trainable, or a setting applies to no parameter.
    """
    by_settings: dict[tuple[ParamSettings, bool], dict[str, Any]] = {}
    parameters = dict(named)
    chosen = peak_settings(parameters.items(), settings, groups, part_rates)
    if not chosen:
        raise QLIPError("nothing to train: every part is locked or has a learning rate of 0; unlock a part")
    check_applies(chosen, settings, groups)
    for name, one in chosen.items():
        parameter = parameters[name]
        # foreach kernels accept plain or sharded tensors, not a mix
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
    """PyTorch's AdamW, with the fused kernel if the devices support it."""
    devices = {parameter.device.type for group in groups for _, parameter in group["params"]}
    fused = devices <= {"cpu", "cuda"}
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


def peak_settings(
    named: Iterable[tuple[str, Tensor]],
    settings: OptimizerSection,
    groups: ParamGroups,
    part_rates: Mapping[Any, float] | None = None,
) -> dict[str, ParamSettings]:
    """Optimizer settings of each trainable parameter, by name.

    The rate of a part replaces ``lr`` and scales Muon's rate by the same ratio; at depth k the rate is multiplied by
    ``layer_decay`` to the power k.
    """
    chosen: dict[str, ParamSettings] = {}
    for name, parameter in named:
        share = (part_rates or {}).get(groups.part(name), settings.lr) / settings.lr
        if not parameter.requires_grad or not share:
            continue
        share *= (settings.layer_decay or 1.0) ** groups.depth(name)
        muon = settings.name == "muon" and groups.is_matrix(name)
        rate = settings.muon_lr if muon else settings.lr
        # LAMB's trust ratio goes with weight decay; as in EVA-CLIP's grouping, embeddings have both, vectors neither
        every_matrix = settings.name == "lamb" or settings.decay_embeddings
        decays = parameter.ndim > 1 if every_matrix else groups.decays(name)
        chosen[name] = ParamSettings(muon, rate * share, settings.weight_decay if decays else 0.0)
    return chosen


def check_applies(chosen: Mapping[str, ParamSettings], settings: OptimizerSection, groups: ParamGroups) -> None:
    """Raise QLIPError if an optimizer setting applies to no trainable parameter."""
    if settings.name == "muon" and not any(one.muon for one in chosen.values()):
        raise QLIPError("optimizer.name muon: the model has no trainable matrix inside a Block; use adamw or lamb")
    if settings.layer_decay is not None and not any(groups.depth(name) for name in chosen):
        raise QLIPError("optimizer.layer_decay: the model has no trainable Block, so no depth; remove layer_decay")


def _new_group(settings: ParamSettings) -> dict[str, Any]:
    """Empty parameter group with the given settings."""
    rate = settings.lr
    return {"params": [], "lr": rate, "initial_lr": rate, "weight_decay": settings.weight_decay}


def named_state(optimizer: Optimizer) -> dict[str, Tensor]:
    """State tensors of an optimizer by name, ``<parameter>/<key>``, without its settings, which the recipe has.

    Moments of sharded parameters are sharded too (DTensor); step counts are plain scalars.
    """
    state: dict[str, Tensor] = {}
    for name, parameter, _ in named_parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return state


def load_named_state(optimizer: Optimizer, state: dict[str, Tensor]) -> None:
    """Restore :func:`named_state`. A parameter without state has not been updated yet.

    Args:
        optimizer: optimizer over parameters of the same names.
        state: tensors on any device; those of a sharded parameter are DTensors with its layout.
    """
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, short = key.rpartition("/")
        entries.setdefault(name, {})[short] = value
    for name, parameter, fused in named_parameters(optimizer):
        own = entries.get(name)
        if own:
            optimizer.state[parameter] = {
                # a fused optimizer keeps its step count on the device, others on the CPU, to avoid synchronisation
                key: value.detach().clone().to(parameter.device if value.ndim or fused else "cpu")
                for key, value in own.items()
            }


def named_parameters(optimizer: Optimizer) -> list[tuple[str, nn.Parameter, bool]]:
    """Name of each parameter of an optimizer, the parameter, and whether its group is fused."""
    return [
        (name, parameter, bool(group.get("fused")))
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    ]
