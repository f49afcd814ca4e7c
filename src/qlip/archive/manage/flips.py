"""Which bit is flipped, from a CRC-32 alone.

A CRC is linear: the checksum of a file with one bit flipped differs from the right one by a number that depends on the
bit's distance from the end alone. One bit further from the end is one more step of the CRC's shift register, and the
register runs through all 2^32 - 1 states, so below 512 MiB each distance has a number of its own; finding it is a
discrete logarithm (baby steps, giant steps: Shanks, 1971).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import cache

POLYNOMIAL = 0xEDB88320
"""Of zlib's CRC-32, bits reversed."""
PERIOD = 2**32 - 1
BABY_BITS = 16
BABY = 1 << BABY_BITS

Map = list[int]
"""A linear map of 32-bit vectors: the images of its basis."""


def candidates(data: bytes, crc32: int) -> Iterator[tuple[int, int]]:
    """Single bits whose flipping back gives `data` this checksum: (byte, bit), bit 0 worth 1.

    There is one at most below 512 MiB. That it is the bit that was flipped is for a hash of the whole to say.

    Args:
        data: the damaged bytes.
        crc32: `zlib.crc32` of the right ones.
    """
    difference, limit = zlib.crc32(data) ^ crc32, 8 * len(data)
    if not difference:
        return
    steps = _logarithm(difference, limit)
    if steps is None:
        return
    for distance in range(steps, limit + 1, PERIOD):
        byte, bit = divmod(limit - distance, 8)  # of distance 1 is the last byte's highest bit
        yield byte, bit


def flipped(data: bytes, byte: int, bit: int) -> bytes:
    """The bytes with one bit turned."""
    changed = bytearray(data)
    changed[byte] ^= 1 << bit
    return bytes(changed)


def _logarithm(state: int, limit: int) -> int | None:
    """After how many steps, 1 to `limit`, the register goes from 1 to `state`."""
    table, giant = _babies(), _giant()
    for passed in range(0, min(limit, PERIOD) + 1, BABY):
        steps = table.get(state)
        if steps is not None and 1 <= passed + steps <= limit:
            return passed + steps
        state = _apply(giant, state)
    return None


@cache
def _babies() -> dict[int, int]:
    """The register's states after 0, 1, ... steps from 1."""
    found, state = {}, 1
    for steps in range(BABY):
        found[state] = steps
        state = state >> 1 ^ (POLYNOMIAL if state & 1 else 0)
    return found


@cache
def _giant() -> Map:
    """`BABY` steps back, as a map."""
    back = [_step_back(1 << place) for place in range(32)]
    for _ in range(BABY_BITS):
        back = [_apply(back, image) for image in back]
    return back


def _step_back(state: int) -> int:
    return (state ^ POLYNOMIAL) << 1 & 0xFFFFFFFF | 1 if state >> 31 else state << 1


def _apply(images: Map, vector: int) -> int:
    result = 0
    while vector:
        low = vector & -vector
        result ^= images[low.bit_length() - 1]
        vector ^= low
    return result
