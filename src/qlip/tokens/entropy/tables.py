"""Static tables of the entropy coder: integers, so that every machine computes the same probabilities.

Tables belong to a model: they are trained on its tokens (`qlip.tokens.entropy.train_tables`), lie in its folder, and
are named by their SHA-256. docs/token-format.md defines how the probability of a bit follows from them.

Shapes: L bits per token, H hidden units, T probabilities; a leading 2 is a token's colour, black then white; 9 are the
places of its neighbourhood.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from qlip.errors import QLIPError
from qlip.files import write_bytes
from qlip.tokens.entropy.checkerboard import BLACK, NEIGHBOURHOOD, WHITE
from qlip.tokens.packing import MAX_BITS

if TYPE_CHECKING:
    from qlip.tokens.entropy.train_tables import ContextNetwork

FILE = "entropy_tables.safetensors"
"""File name in a model's folder. Earlier tables, to read old files with, are `entropy_tables-*.safetensors`."""
PROBABILITY_SCALE = 1 << 16
"""Unit of probabilities: they are counts of 1/65536."""
EXACT_LIMIT = 1 << 24
"""Integers below this are exact in float32, and so are their sums, in any order."""

_NUM_PROBABILITIES = 512
_STEPS_PER_NAT = 32  # entries of the list of probabilities per unit of log odds
_FORMAT = {"format": "qlip entropy tables", "version": "1"}
_MAX_FILE_BYTES = 1 << 26  # 63 bits with thousands of hidden units take less


@dataclass(frozen=True, eq=False)
class Tables:
    """Integer tables; the constructor checks every shape and that no sum can reach 2^24.

    Attributes:
        hidden_around: int16 (2, L, 9, H), weights from the bits of a plane (second) to the hidden sums.
        hidden_bias: int32 (2, L, H), bias of the hidden sums for each coded channel.
        output: int16 (2, L, H), weights from the positive hidden sums to each coded channel.
        linear_around: int16 (2, L, 9, L), weights from the bits of a plane (second) to the coded channel (last); zero
            for planes that are coded later.
        bias: int32 (2, L), of each coded channel.
        probabilities: uint16 (T,), probabilities of a 1 in units of 1/65536, none of them 0.
        shift: int32 (); a sum's entry in ``probabilities`` is T/2 + sum / 2^shift, rounded down.
        source: name of the tables in errors.

    Raises:
        QLIPError: a shape or a dtype that is wrong, or a sum that is too large.
    """

    hidden_around: NDArray[np.int16]
    hidden_bias: NDArray[np.int32]
    output: NDArray[np.int16]
    linear_around: NDArray[np.int16]
    bias: NDArray[np.int32]
    probabilities: NDArray[np.uint16]
    shift: NDArray[np.int32]
    source: str = "these tables"

    def __post_init__(self) -> None:
        if self.hidden_around.ndim != 4:
            raise QLIPError(
                f"{self.source}: hidden_around must be (2, L, {NEIGHBOURHOOD}, H), not {self.hidden_around.shape}"
            )
        bits, hidden = self.num_bits, self.hidden_around.shape[3]
        wanted: dict[str, tuple[type[np.integer[Any]], tuple[int, ...]]] = {
            "hidden_around": (np.int16, (2, bits, NEIGHBOURHOOD, hidden)),
            "hidden_bias": (np.int32, (2, bits, hidden)),
            "output": (np.int16, (2, bits, hidden)),
            "linear_around": (np.int16, (2, bits, NEIGHBOURHOOD, bits)),
            "bias": (np.int32, (2, bits)),
            "probabilities": (np.uint16, self.probabilities.shape),
            "shift": (np.int32, ()),
        }
        for name, (dtype, shape) in wanted.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != shape:
                raise QLIPError(
                    f"{self.source}: {name} must be {np.dtype(dtype).name} {shape}, not {array.dtype} {array.shape}"
                )
        if not 1 <= bits <= MAX_BITS or not 1 <= hidden <= 1 << 12:
            raise QLIPError(
                f"{self.source}: {bits} bits per token and {hidden} hidden units; need 1 to 63 and 1 to 4,096"
            )
        if (
            self.probabilities.ndim != 1
            or not 2 <= len(self.probabilities) <= PROBABILITY_SCALE
            or not self.probabilities.all()
        ):
            raise QLIPError(f"{self.source}: probabilities must be a list of 2 to 65,536, from 1 to 65,535 each")
        if not 0 <= int(self.shift) <= 23:
            raise QLIPError(f"{self.source}: shift must be 0 to 23, not {int(self.shift)}")
        for colour, first in ((BLACK, 0), (WHITE, -1)):  # a black token's own channel is not coded before it
            if self.linear_around[colour].swapaxes(0, 1)[:, *np.tril_indices(bits, first)].any():
                raise QLIPError(f"{self.source}: linear_around has weights for planes that are coded later")
        largest = _largest_sum(self)
        if largest >= EXACT_LIMIT:
            raise QLIPError(
                f"{self.source}: sums may reach {largest:,}; they must stay below {EXACT_LIMIT:,} to be exact"
            )

    @property
    def num_bits(self) -> int:
        """Bits per token (L)."""
        return int(self.hidden_around.shape[1])

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over name, dtype, shape and little-endian bytes of each tensor, in the order of names.

        It does not depend on how a file stores them.
        """
        total = hashlib.sha256()
        for name, array in sorted(self._tensors().items()):
            total.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
            total.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return total.hexdigest()

    def _tensors(self) -> dict[str, NDArray[Any]]:
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "source"}

    def save(self, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
        """Write a safetensors file atomically, with additional metadata."""
        tensors = {name: np.asarray(array, order="C") for name, array in self._tensors().items()}
        write_bytes(Path(path), save(tensors, metadata=(metadata or {}) | _FORMAT))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            QLIPError: the file cannot be read, or holds no such tables.
        """
        try:
            with open(path, "rb") as stream:
                return cls.from_bytes(stream.read(_MAX_FILE_BYTES + 1), os.fspath(path))
        except OSError as error:
            raise QLIPError(f"{os.fspath(path)}: cannot be read ({error.strerror}); give the path of {FILE}") from None

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Self:
        """Read the content of a file that `save` wrote.

        Args:
            data: the whole content.
            source: name of the file in errors.

        Raises:
            QLIPError: the file holds no such tables.
        """
        try:
            tensors = load(data) if len(data) <= _MAX_FILE_BYTES else {}
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise QLIPError(f"{source}: not a whole safetensors file ({' '.join(str(error).split())[:80]})") from None
        if tensors.keys() != {one.name for one in fields(cls)} - {"source"}:
            raise QLIPError(f"{source}: not a file of entropy tables; give one that `qlip tokens codec train` wrote")
        return cls(**tensors, source=source)

    @classmethod
    def from_network(cls, network: ContextNetwork) -> Self:
        """Round a trained network to integers, as finely as int16 and exact sums allow.

        Raises:
            QLIPError: weights too large for any scale, as after a training that diverged.
        """
        weights = {name: one.detach().double().cpu().numpy() for name, one in network.named_parameters()}
        weights["linear_around"] = weights["linear_around"] * network.known.double().cpu().numpy()
        for total in range(14, 4, -1):  # fractional bits of the last sum
            hidden = total - total // 2
            scales = {"hidden": hidden, "output": total - hidden, "linear": total, "bias": total}
            rounded = {n: np.rint(w * 2.0 ** scales[n.partition("_")[0]]) for n, w in weights.items()}
            if all(np.abs(one).max() < 1 << 15 for one in rounded.values()):
                try:
                    tensors: dict[str, Any] = {name: one.astype(_dtype(name)) for name, one in rounded.items()}
                    shift = np.array(total - int(np.log2(_STEPS_PER_NAT)), np.int32)
                    return cls(**tensors, probabilities=_probabilities(), shift=shift)
                except QLIPError:  # sums too large: try a coarser scale
                    continue
        raise QLIPError("these weights are too large for integer tables; train them again with a lower learning rate")


def _dtype(name: str) -> type[np.integer[Any]]:
    return np.int32 if name in ("bias", "hidden_bias") else np.int16


def _probabilities() -> NDArray[np.uint16]:
    odds = (np.arange(_NUM_PROBABILITIES) - (_NUM_PROBABILITIES - 1) / 2) / _STEPS_PER_NAT
    return np.clip(np.rint(PROBABILITY_SCALE / (1 + np.exp(-odds))), 1, PROBABILITY_SCALE - 1).astype(np.uint16)


def _largest_sum(tables: Tables) -> int:
    """Return a bound on all sums in coding, in units of the last one."""

    def size(array: NDArray[Any]) -> NDArray[np.int64]:
        return np.abs(array.astype(np.int64))

    # a hidden bias is added as the difference to the previous channel's: at most three of them in a partial sum
    hidden = size(tables.hidden_around).sum((1, 2)) + 3 * size(tables.hidden_bias).max(1)  # (2, H)
    last = (size(tables.output) @ hidden[..., None])[..., 0] + size(tables.linear_around).sum((1, 2))
    last = last + size(tables.bias) + (len(tables.probabilities) << int(tables.shift))
    return int(max(hidden.max(), last.max()))
