"""Cost of a network's forward and backward pass, of any model: floating-point operations, and bytes of activations.

Both run the network once on fake tensors: meta tensors that know the device they stand for, so that autocast works and
nothing large is allocated. Only what trains costs a backward pass. Matrix products and convolutions count as
operations. Activation checkpointing makes a step longer, not its work larger: switch it off to count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Run = Callable[[], Mapping[str, Tensor]]
"""Runs a network; returns its outputs by name, those that train with a graph."""


@contextmanager
def without_memory() -> Iterator[None]:
    """Context in which networks and tensors are made and run without memory, and no random number is drawn."""
    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        yield


def count_flops(run: Run) -> float:
    """Floating-point operations of a forward and backward pass; a multiplication and an addition are two."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it knows no CPU kernel
        _backward(run())
    return float(counter.get_total_flops())


def activation_bytes(run: Run, held: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, found by hooks on saved tensors.

    Args:
        run: the network.
        held: tensors that exist anyway, such as parameters.
    """
    seen = {tensor.untyped_storage()._cdata for tensor in held}
    kept: list[torch.UntypedStorage] = []  # alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = run()
    del made
    return sum(storage.nbytes() for storage in kept)


def _backward(outputs: Mapping[str, Tensor]) -> None:
    trained = [value.float().sum() for value in outputs.values() if value.requires_grad]
    torch.stack(trained).sum().backward()
