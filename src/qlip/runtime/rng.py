"""Random numbers: generators seeded by any values, and saving and restoring torch's RNG state."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def hash_int(*parts: object) -> int:
    """Hash the text of the values to a 128-bit integer, equal on every machine and in every version."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(*parts: object) -> np.random.Generator:
    """Make a random generator seeded by the values alone."""
    return np.random.Generator(np.random.PCG64(hash_int(*parts)))


def rng_state() -> list[Tensor]:
    """Return torch's RNG states, uint8: of the CPU and, if there is one, of the current GPU."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return states


def restore_rng_state(states: Sequence[Tensor]) -> None:
    """Restore what `rng_state` returned; the state of a GPU is ignored if there is none."""
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[1])


def rng_state_to_json(states: Sequence[Tensor]) -> list[str]:
    """Convert RNG states to hexadecimal text."""
    return [state.numpy().tobytes().hex() for state in states]


def rng_state_from_json(texts: Sequence[str]) -> list[Tensor]:
    """Convert hexadecimal text to RNG states.

    Raises:
        ValueError: the text is not hexadecimal.
    """
    return [torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8) for text in texts]
