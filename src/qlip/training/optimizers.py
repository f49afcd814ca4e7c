"""Parameters to optimizers: what decays, what does not, and which matrices Muon takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qlip.training.muon import Muon
from qlip.training.recipe import OptimizerSection


def build_optimizers(named: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSection) -> list[Optimizer]:
    """Optimizers over named parameters.

    Norms, biases, embeddings and the temperature never decay.

    Args:
        named: names and parameters that train.
        settings: the recipe's.

    Returns:
        One AdamW, or a Muon (arXiv 2502.16982: its update scaled to AdamW's root mean square, so that rates and decay
        mean the same) for the blocks' matrices and an AdamW for the rest.
    """
    parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
    muon = {name for name in parameters if settings.name == "muon" and is_block_matrix(name, parameters[name])}
    adam = [name for name in parameters if name not in muon]
    decayed = [name for name in adam if decays(name, parameters[name])]
    kept = [name for name in adam if name not in decayed]
    groups = [_group(parameters, decayed, settings.weight_decay), _group(parameters, kept, 0.0)]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas)
    if not muon:
        return [adamw]
    blocks = _group(parameters, sorted(muon), settings.weight_decay)
    return [
        Muon([blocks], settings.muon_lr, settings.muon_momentum, settings.weight_decay),
        adamw,
    ]


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases, temperature, embeddings (patches' too)."""
    return parameter.ndim >= 2 and "embedding" not in name


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a weight matrix inside a transformer block."""
    return ".encoder.layers." in name and parameter.ndim == 2


def _group(parameters: dict[str, nn.Parameter], names: list[str], weight_decay: float) -> dict[str, Any]:
    return {"params": [(name, parameters[name]) for name in names], "weight_decay": weight_decay}


def named_state(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimizer's tensors by parameter name, ``<parameter>/<key>``; its settings come from the recipe."""
    state: dict[str, Tensor] = {}
    for name, parameter in _named(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return state


def load_named_state(optimizer: Optimizer, state: dict[str, Tensor]) -> None:
    """Put :func:`named_state` back. A parameter without state has not been stepped yet."""
    for name, parameter in _named(optimizer):
        prefix = f"{name}/"
        entries = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if entries:
            optimizer.state[parameter] = {key: value.clone() for key, value in entries.items()}


def _named(optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
    pairs: list[tuple[str, nn.Parameter]] = []
    for group in optimizer.param_groups:
        pairs += zip(group["param_names"], group["params"], strict=True)
    return pairs
