"""Several processes on this machine that train together, as torchrun would start them."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def on_ranks(world: int, function: Callable[..., None], calls: Sequence[tuple[Any, ...]]) -> None:
    """Call a function with each row of arguments, one after the other, on every rank; processes start once."""
    spawn(_rank, (world, function, [(free_port(), *arguments) for arguments in calls]), nprocs=world)


def _rank(rank: int, world: int, function: Callable[..., None], calls: Sequence[tuple[Any, ...]]) -> None:
    torch.set_num_threads(1)
    for port, *arguments in calls:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        function(*arguments)
        gc.collect()  # what holds a group goes: its threads, alive while Python ends, can abort the process
