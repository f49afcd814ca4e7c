"""Entropy-coded token files: round trips, and damaged or hostile files, refused in one line."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest

from qlip.errors import QLIPError
from qlip.tokens import TokenCodec, TokenCodecs, TokenFile
from qlip.tokens.entropy.coder import MAX_RATIO
from qlip.tokens.token_file import ENTROPY_CODED, HEADER_BYTES, MAX_FILE_BYTES, RAW_BITS, read_header
from tests.tokens.samples import CODES, DECODER, entropy_tables, rare_ones, token_file
from tests.tokens.test_token_file_fuzz import consistent, mutate

NUM_MUTATED = 2500


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> TokenCodecs:
    path = tmp_path_factory.mktemp("tables") / "entropy_tables.safetensors"
    entropy_tables(8, bias=-6000, scale_down=9).save(path)
    return TokenCodecs.of_file(path)


@pytest.fixture(scope="module")
def codec(codecs: TokenCodecs) -> TokenCodec:
    assert codecs.current is not None
    return codecs.current


def coded_file(codec: TokenCodec, grid: tuple[int, int], seed: int = 0) -> tuple[TokenFile, bytes]:
    tokens = TokenFile(rare_ones(grid[0] * grid[1], seed), grid, (64, 48), 8, CODES, DECODER)
    return tokens, tokens.to_bytes(codec)


def with_checksum(content: bytes) -> bytes:
    return content + struct.pack(">I", zlib.crc32(content))


def outcome(data: bytes, codecs: TokenCodecs) -> str | None:
    """Return None for a valid file, which must be the only one for its tokens; else the one-line error."""
    try:
        read = TokenFile.from_bytes(data, "f", codecs)
    except QLIPError as error:
        message = str(error)
        assert message.startswith("f: ") and "\n" not in message and len(message) < 330, message
        return message
    coding = data[5]
    assert coding in (RAW_BITS, ENTROPY_CODED)
    assert read.to_bytes(codecs.current if coding == ENTROPY_CODED else None) == data
    return None


def test_token_file__entropy_coded_is_shorter_and_lossless(
    codecs: TokenCodecs, codec: TokenCodec, tmp_path: Path
) -> None:
    tokens, data = coded_file(codec, (9, 7))
    assert len(data) < tokens.num_bytes
    assert TokenFile.from_bytes(data, codecs=codecs) == tokens
    tokens.save(tmp_path / "f.qlip", codec)
    assert (tmp_path / "f.qlip").read_bytes() == data
    assert TokenFile.load(tmp_path / "f.qlip", codecs) == tokens
    header = read_header(tmp_path / "f.qlip")  # without any tables
    assert (header.coding, header.grid_height, header.code_fingerprint.hex()) == (ENTROPY_CODED, 9, CODES)
    assert data[HEADER_BYTES[1] : HEADER_BYTES[1] + 8].hex() == codec.digest[:16]


def test_token_file__stays_raw_where_coding_saves_nothing(codec: TokenCodec) -> None:
    noise = token_file((8, 8), 8, 8)
    assert noise.to_bytes(codec) == noise.to_bytes()
    other = token_file((8, 8), 28)  # tables are for 8 bits per token
    assert other.to_bytes(codec) == other.to_bytes()


def test_token_file__missing_tables_are_named(codecs: TokenCodecs, codec: TokenCodec, tmp_path: Path) -> None:
    _, data = coded_file(codec, (9, 7))
    tag = codec.digest[:16]
    with pytest.raises(QLIPError, match=f"f: entropy-coded with the tables {tag}; give the model that coded it"):
        TokenFile.from_bytes(data, "f")
    entropy_tables(8, seed=5).save(tmp_path / "other.safetensors")
    with pytest.raises(QLIPError, match=rf"f: entropy-coded with the tables {tag}, but .*other.*; give the model"):
        TokenFile.from_bytes(data, "f", TokenCodecs.of_file(tmp_path / "other.safetensors"))


def test_token_file__every_flipped_bit_is_detected(codecs: TokenCodecs, codec: TokenCodec) -> None:
    _, data = coded_file(codec, (9, 7))
    valid = 0
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        assert outcome(bytes(flipped), codecs) is not None, bit
        if bit < 8 * (len(data) - 4):  # with a checksum that fits: another image's only file, or refused
            valid += outcome(with_checksum(bytes(flipped[:-4])), codecs) is None
    assert valid > 100


def test_token_file__mutations_of_coded_files_are_valid_or_refused_in_one_line(
    codecs: TokenCodecs, codec: TokenCodec
) -> None:
    draw = random.Random(0)
    bases = [coded_file(codec, grid, seed)[1] for seed, grid in enumerate([(9, 7), (16, 16), (5, 20), (1, 90)])]
    seen: set[str] = set()
    valid = 0
    for number in range(NUM_MUTATED):
        base = draw.choice(bases)
        if number % 4:
            message = outcome(with_checksum(consistent(draw, mutate(draw, base[:-4]))), codecs)
        else:
            message = outcome(mutate(draw, base), codecs)
        valid += message is None
        seen |= {word for word in REASONS if message is not None and word in message}
    assert valid >= 200
    assert seen == set(REASONS), set(REASONS) - seen


REASONS = [
    "damaged",
    "no encoder writes",
    "are too few for",
    "entropy-coded with the tables",
    "are entropy-coded with tables for 8",
    "to as many bytes as raw bits or more",
    "too short to name its tables",
    "entropy-coded tokens; such a file holds 1 to",
    "payload coding",
]


def test_token_file__allocation_is_bounded_by_the_payload(codecs: TokenCodecs, codec: TokenCodec) -> None:
    """Check that a header with many tokens allocates nothing unless the payload has a 64th of their bits."""
    tag, draw = bytes.fromhex(codec.digest)[:8], random.Random(1)
    _, data = coded_file(codec, (16, 16))
    tracemalloc.start()
    try:
        for side, payload in [(255, 0), (255, 900), (65535, 900), (256, 1016), (256, 1500), (64, 60), (16, 100)]:
            body = tag + draw.randbytes(payload)
            head = data[:5] + bytes([ENTROPY_CODED]) + data[6:8] + struct.pack(">HH", side, side) + data[12:20]
            file = with_checksum(head + struct.pack(">I", len(body)) + data[24 : HEADER_BYTES[1]] + body)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            outcome(file, codecs)
            peak = tracemalloc.get_traced_memory()[1] - before
            plausible = min(side * side, MAX_RATIO * payload)
            assert peak <= 1500 * plausible + 400_000, (side, payload, peak)
    finally:
        tracemalloc.stop()
    assert MAX_FILE_BYTES < 1 << 25
