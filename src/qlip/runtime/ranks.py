"""Rank and world size of this process, as torchrun sets them in the environment."""

from __future__ import annotations

import os


def rank() -> int:
    """Return the rank of this process, from 0; 0 if it runs alone."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the rank of this process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of processes; 1 if this one runs alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Return whether this is rank 0, which prints and writes for all."""
    return rank() == 0
