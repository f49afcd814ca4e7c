"""Cost of a training step, of any model, found by running its network once without memory.

Networks and tensors are PyTorch's fake tensors: meta tensors that know the device they stand for, so that autocast
works and nothing large is allocated, while each operation and each allocation is that of the real step. `count_flops`
counts operations, `peak_bytes` and `optimizer_bytes` the memory of tensors; only what trains costs a backward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Run = Callable[[], Mapping[str, Tensor]]
"""Runs a network; returns its outputs by name, those that train with a graph."""


@contextmanager
def without_memory() -> Iterator[None]:
    """Context in which networks and tensors are made and run without memory, and no random number is drawn.

    They also run outside of it, together with real tensors: an operation is real if all of its inputs are.
    """
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True):
        yield


def count_flops(run: Run) -> float:
    """Floating-point operations of matrix products and convolutions, forward and backward; a multiply-add is two.

    Activation checkpointing makes a step longer, not its work larger: switch it off to count.
    """
    # the counter knows no fused attention of CPUs
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backward(run())
    return float(counter.get_total_flops())


def peak_bytes(run: Run) -> int:
    """Most bytes of tensors that exist at once in a forward and backward pass, without those that existed before."""
    with LiveMemory() as memory:
        backward(run())
    return int(memory.peak)


def optimizer_bytes(optimizer: Optimizer) -> tuple[dict[int, int], int]:
    """Run the first step of an optimizer whose parameters have gradients.

    Returns:
        Bytes of its state by id of parameter, and the most bytes that the step needed beside the state.
    """
    with LiveMemory() as memory:
        optimizer.step()
    state = {
        id(parameter): sum(value.numel() * value.element_size() for value in values.values() if torch.is_tensor(value))
        for parameter, values in optimizer.state.items()
    }
    return state, memory.peak - memory.live


def backward(outputs: Mapping[str, Tensor]) -> None:
    """Backward pass from the sum of all outputs that have a graph; they are let go of first."""
    trained = [value.float().sum() for value in outputs.values() if value.requires_grad]
    del outputs
    torch.stack(trained).sum().backward()


class LiveMemory(TorchDispatchMode):
    """Counts bytes of storages made inside it, from the operation that makes one until nothing holds it.

    Attributes:
        live: bytes now.
        peak: most bytes at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages that it makes."""
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage(), 0)  # it was there before
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device.type != "meta":
                storage = value.untyped_storage()
                self._count(storage, storage.nbytes())
        return result

    def _count(self, storage: torch.UntypedStorage, size: int) -> None:
        """Count a storage that was not seen yet, until it is freed: another one may then have its address."""
        address = storage._cdata
        if address in self._known:
            return
        self._known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size
