"""The static tables of the entropy coder: integers, so that every machine computes the same probabilities.

They are a model's: trained on its tokens (`qlip.tokens.entropy.train_tables`), shipped in its folder, named by their
SHA-256.
docs/token-format.md says how a bit's probability follows from them.

Shapes: L bits per token, H hidden units, T probabilities; a leading 2 is a token's colour, black then white, a 9 the
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
from qlip.tokens.entropy.checkerboard import AROUND, BLACK, WHITE
from qlip.tokens.packing import MAX_BITS

if TYPE_CHECKING:
    from qlip.tokens.entropy.train_tables import ContextNetwork

FILE = "entropy_tables.safetensors"
"""In a model's folder. `entropy_tables-*.safetensors` beside it are earlier ones, for files that they coded."""
ONE = 1 << 16
"""Probabilities are counted in 1/65536."""
EXACT = 1 << 24
"""Below it float32 holds every integer, and so every sum of integers in any order."""

_NUM_PROBABILITIES = 512
_STEPS_A_NAT = 32  # between neighbouring probabilities of the list, in log odds
_FORMAT = {"format": "qlip entropy tables", "version": "1"}
_LARGEST = 1 << 26  # bytes of a file: 63 bits with thousands of hidden units take less


@dataclass(frozen=True, eq=False)
class Tables:
    """Making one checks every shape and that no sum can reach 2^24.

    Attributes:
        hidden_around: int16 (2, L, 9, H), what a bit of a plane (second) adds to the hidden sums.
        hidden_bias: int32 (2, L, H), of the channel that is coded.
        output: int16 (2, L, H), weights of the hidden sums that are positive.
        linear_around: int16 (2, L, 9, L), of a plane (second) straight to the channel that is coded (last); zero where
            that plane is not known by then.
        bias: int32 (2, L).
        probabilities: uint16 (T,), of a bit's being 1, in 1/65536, none of them 0.
        shift: int32 (), from a sum to a place in ``probabilities``: T/2 + sum / 2^shift, rounded down.
        source: what errors call them.

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
            raise QLIPError(f"{self.source}: hidden_around must be (2, L, {AROUND}, H), not {self.hidden_around.shape}")
        bits, hidden = self.num_bits, self.hidden_around.shape[3]
        wanted: dict[str, tuple[type[np.integer[Any]], tuple[int, ...]]] = {
            "hidden_around": (np.int16, (2, bits, AROUND, hidden)),
            "hidden_bias": (np.int32, (2, bits, hidden)),
            "output": (np.int16, (2, bits, hidden)),
            "linear_around": (np.int16, (2, bits, AROUND, bits)),
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
            raise QLIPError(f"{self.source}: {bits} bits per token and {hidden} hidden units; 1 to 63 and 1 to 4,096")
        if self.probabilities.ndim != 1 or not 2 <= len(self.probabilities) <= ONE or not self.probabilities.all():
            raise QLIPError(f"{self.source}: probabilities must be a list of 2 to 65,536, from 1 to 65,535 each")
        if not 0 <= int(self.shift) <= 23:
            raise QLIPError(f"{self.source}: shift must be 0 to 23, not {int(self.shift)}")
        for colour, first in ((BLACK, 0), (WHITE, -1)):  # a black token does not know the plane of its own channel yet
            if self.linear_around[colour].swapaxes(0, 1)[:, *np.tril_indices(bits, first)].any():
                raise QLIPError(f"{self.source}: linear_around has weights of planes that are not known yet")
        largest = _largest_sum(self)
        if largest >= EXACT:
            raise QLIPError(f"{self.source}: sums may reach {largest:,}; below {EXACT:,} they are exact")

    @property
    def num_bits(self) -> int:
        """Bits per token (L)."""
        return int(self.hidden_around.shape[1])

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of their content: of each tensor in the order of names its name, shape and little-endian bytes.

        A file's compression or a library's version does not change it.
        """
        total = hashlib.sha256()
        for name, array in sorted(self._tensors().items()):
            total.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
            total.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return total.hexdigest()

    def _tensors(self) -> dict[str, NDArray[Any]]:
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "source"}

    def save(self, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
        """Write them as safetensors, whole or not at all, with what else the file shall say of itself."""
        tensors = {name: np.asarray(array, order="C") for name, array in self._tensors().items()}
        write_bytes(Path(path), save(tensors, metadata=(metadata or {}) | _FORMAT))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            QLIPError: it cannot be read, or holds no such tables.
        """
        try:
            with open(path, "rb") as stream:
                return cls.from_bytes(stream.read(_LARGEST + 1), os.fspath(path))
        except OSError as error:
            raise QLIPError(f"{os.fspath(path)}: cannot be read ({error.strerror}); give the path of {FILE}") from None

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Self:
        """Read the content of a file that `save` wrote.

        Args:
            data: all of it.
            source: what errors call it.

        Raises:
            QLIPError: it holds no such tables.
        """
        try:
            tensors = load(data) if len(data) <= _LARGEST else {}
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise QLIPError(f"{source}: not a whole safetensors file ({' '.join(str(error).split())[:80]})") from None
        if tensors.keys() != {one.name for one in fields(cls)} - {"source"}:
            raise QLIPError(f"{source}: not a file of entropy tables; give one that `qlip tokens codec train` wrote")
        return cls(**tensors, source=source)

    @classmethod
    def from_network(cls, network: ContextNetwork) -> Self:
        """A trained network in integers: as fine as int16 and exact sums allow.

        Raises:
            QLIPError: weights so large that no scale fits, as of a training that diverged.
        """
        weights = {name: one.detach().double().cpu().numpy() for name, one in network.named_parameters()}
        weights["linear_around"] = weights["linear_around"] * network.known.double().cpu().numpy()
        for total in range(14, 4, -1):  # bits behind the point of the last sum
            hidden = total - total // 2
            scales = {"hidden": hidden, "output": total - hidden, "linear": total, "bias": total}
            rounded = {n: np.rint(w * 2.0 ** scales[n.partition("_")[0]]) for n, w in weights.items()}
            if all(np.abs(one).max() < 1 << 15 for one in rounded.values()):
                try:
                    tensors: dict[str, Any] = {name: one.astype(_kind(name)) for name, one in rounded.items()}
                    shift = np.array(total - int(np.log2(_STEPS_A_NAT)), np.int32)
                    return cls(**tensors, probabilities=_list_of_probabilities(), shift=shift)
                except QLIPError:  # sums too large: coarser
                    continue
        raise QLIPError("these weights are too large for integer tables; train them again with a lower learning rate")


def _kind(name: str) -> type[np.integer[Any]]:
    return np.int32 if name in ("bias", "hidden_bias") else np.int16


def _list_of_probabilities() -> NDArray[np.uint16]:
    odds = (np.arange(_NUM_PROBABILITIES) - (_NUM_PROBABILITIES - 1) / 2) / _STEPS_A_NAT
    return np.clip(np.rint(ONE / (1 + np.exp(-odds))), 1, ONE - 1).astype(np.uint16)


def _largest_sum(tables: Tables) -> int:
    """A bound on every sum that coding can meet, in units of the last one."""

    def size(array: NDArray[Any]) -> NDArray[np.int64]:
        return np.abs(array.astype(np.int64))

    # a channel's bias comes in as its difference to the one before: three of them at most in a sum half done
    hidden = size(tables.hidden_around).sum((1, 2)) + 3 * size(tables.hidden_bias).max(1)  # (2, H)
    last = (size(tables.output) @ hidden[..., None])[..., 0] + size(tables.linear_around).sum((1, 2))
    last = last + size(tables.bias) + (len(tables.probabilities) << int(tables.shift))
    return int(max(hidden.max(), last.max()))
