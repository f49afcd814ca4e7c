"""100,000 damaged and hostile files: each is refused in one line, or valid and writes back the same bytes."""

from __future__ import annotations

import random
import re
import struct
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from qlip.errors import QLIPError
from qlip.tokens import TokenFile
from tests.tokens.samples import PREPARATION, token_file

NUM_CASES = 100_000
NUM_MEASURED = 10_000
NUM_ON_DISK = 2_000
SECONDS_PER_CASE = 1.0  # usually 20 microseconds; the machine may be busy

BASES = [
    token_file(grid, num_bits, num_bits, seed).to_bytes()
    for seed, (grid, num_bits) in enumerate([((1, 1), 1), ((1, 3), 7), ((8, 8), 28), ((2, 5), 63), ((3, 3), 9)])
] + [
    token_file(grid, num_bits, num_bits, seed, preparation=PREPARATION, tiles=tiles).to_bytes()
    for seed, (grid, tiles, num_bits) in enumerate([((1, 1), (1, 1), 1), ((4, 6), (2, 3), 28), ((3, 3), (1, 1), 9)])
]
FIELDS = [
    (0, 4),
    (4, 1),
    (5, 1),
    (6, 1),
    (7, 1),
    (8, 2),
    (10, 2),
    (12, 4),
    (16, 4),
    (20, 4),
    (24, 32),
    (56, 32),
    (88, 8),
    (96, 2),
    (98, 2),
]
REASONS = [
    "empty",
    "not a .qlip file",
    "version",
    "the header alone",
    "more than the largest .qlip file",
    r"bytes that its header states\); copy",
    "too long",
    "damaged",
    "payload coding",
    "entropy-coded",
    "flags",
    "grid .* must be 1 to",
    "a grid of [0-9,]+ tokens",
    "original size .* must be 1 to",
    "tiles .* must be 1 to",
    "tiles do not divide",
    "an original of",
    "1 to 63 bits",
    "tokens of [0-9]+ bits take",
    "padding",
]


def mutate(draw: random.Random, data: bytes) -> bytes:
    """Make one to three changes of the content."""
    content = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        place = draw.randrange(len(content) + 1)
        offset, size = draw.choice(FIELDS)
        match draw.randrange(9):
            case 0 | 1 if content:  # flip bits
                for _ in range(draw.choice([1, 1, 2, 8])):
                    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            case 2:  # truncate
                del content[place:]
            case 3:  # insert
                content[place:place] = draw.randbytes(draw.choice([1, 2, 4, 64]))
            case 4:  # delete
                del content[place : place + draw.choice([1, 2, 4, 64])]
            case 5:  # a field of extreme or random value
                value = draw.choice([bytes(size), b"\xff" * size, b"\x80" + bytes(size - 1), draw.randbytes(size)])
                content[offset : offset + size] = value
            case 6:  # a field a little off
                number = int.from_bytes(content[offset : offset + size]) + draw.choice([-2, -1, 1, 2, 8])
                content[offset : offset + size] = (number % 256**size).to_bytes(size)
            case 7:  # a field of another file
                content[offset : offset + size] = draw.choice(BASES)[offset : offset + size]
            case 8:  # the head of one file, the tail of another
                content[place:] = draw.choice(BASES)[place:-4]
    return bytes(content)


def consistent(draw: random.Random, content: bytes) -> bytes:
    """Correct the stated length, so that the checks after it are reached."""
    header = 100 if content[4:5] == b"\2" else 88
    if len(content) < header or draw.random() < 0.5:
        return content
    return content[:20] + struct.pack(">I", len(content) - header) + content[24:]


def cases(num_cases: int, seed: int) -> Iterator[tuple[bytes, bool]]:
    """Iterate over (file, whether its checksum was corrected); half are."""
    draw = random.Random(seed)
    for number in range(num_cases):
        base = draw.choice(BASES)
        if number % 2:
            yield mutate(draw, base), False
        else:
            content = consistent(draw, mutate(draw, base[:-4]))
            yield content + struct.pack(">I", zlib.crc32(content)), True


def outcome(data: bytes) -> str:
    """Return "valid" or the reason of the refusal; any other exception fails the test."""
    try:
        read = TokenFile.from_bytes(data, source="f")
    except QLIPError as error:
        message = str(error)
        assert message.startswith("f: ") and "\n" not in message and len(message) < 250, message
        return next((reason for reason in REASONS if re.search(reason, message)), message)
    assert read.to_bytes() == data
    return "valid"


def test_token_file__mutations_are_valid_or_refused_in_one_line() -> None:
    seen: Counter[str] = Counter()
    for data, resealed in cases(NUM_CASES, seed=0):
        start = time.perf_counter()
        reason = outcome(data)
        assert time.perf_counter() - start < SECONDS_PER_CASE, data.hex()
        assert resealed or reason != "valid" or data in BASES, f"damage went unnoticed: {data.hex()}"
        seen[reason] += 1
    assert set(seen) == {"valid", *REASONS}, f"a check that no mutation reached, or an unknown reason: {seen}"
    assert min(seen.values()) >= 20, seen
    assert seen["valid"] >= 5_000, seen


def test_token_file__allocation_is_a_multiple_of_the_file() -> None:
    huge = BASES[2][:88] + bytes(1_000_000)  # a large file with a small announcement
    extra = [huge, *(huge[:o] + b"\xff" * s + huge[o + s :] for o, s in FIELDS)]
    files = [*(data for data, _ in cases(NUM_MEASURED, seed=1)), *extra]
    tracemalloc.start()
    try:
        for data in files:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            outcome(data)
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak <= 4 * len(data) + 8192, (peak, data[:200].hex())
    finally:
        tracemalloc.stop()


def test_token_file__mutations_on_disk_have_the_same_outcome(tmp_path: Path) -> None:
    path = tmp_path / "f"
    tracemalloc.start()
    try:
        for data, _ in cases(NUM_ON_DISK, seed=2):
            path.write_bytes(data)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                read: TokenFile | None = TokenFile.load(path)
            except QLIPError:
                read = None
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak <= 4 * len(data) + 32_768, (peak, data.hex())  # with the stream's buffer
            assert (read is not None) == (outcome(data) == "valid")
            if read is not None:
                assert read.indices(read.bits_per_token).shape == (read.num_tokens, 1)
    finally:
        tracemalloc.stop()
