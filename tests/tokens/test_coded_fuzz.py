"""Damaged and hostile files with entropy-coded payloads: refused in one line, or valid and written back the same."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest

from qlip.errors import QLIPError
from qlip.tokens import TokenCodec, TokenCodecs, TokenFile
from qlip.tokens.entropy.coder import SPARSEST
from qlip.tokens.token_file import ENTROPY_CODED, HEADER_BYTES, MAX_FILE_BYTES, RAW_BITS, read_header
from tests.tokens.samples import CODES, DECODER, entropy_tables, rare_ones, token_file
from tests.tokens.test_fuzz import consistent, mutate

NUM_MUTATED = 2500


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> TokenCodecs:
    path = tmp_path_factory.mktemp("tables") / "entropy_tables.safetensors"
    entropy_tables(8, bias=-6000, tame=9).save(path)
    return TokenCodecs.of_file(path)


@pytest.fixture(scope="module")
def codec(codecs: TokenCodecs) -> TokenCodec:
    assert codecs.current is not None
    return codecs.current


def coded_file(codec: TokenCodec, grid: tuple[int, int], seed: int = 0) -> tuple[TokenFile, bytes]:
    tokens = TokenFile(rare_ones(grid[0] * grid[1], seed), grid, (64, 48), 8, CODES, DECODER)
    return tokens, tokens.to_bytes(codec)


def sealed(content: bytes) -> bytes:
    return content + struct.pack(">I", zlib.crc32(content))


def outcome(data: bytes, codecs: TokenCodecs) -> str | None:
    """None for a valid file, which must be the only one of its tokens; else the refusal, in one line."""
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


def test_a_coded_file_is_shorter_and_comes_back(codecs: TokenCodecs, codec: TokenCodec, tmp_path: Path) -> None:
    tokens, data = coded_file(codec, (9, 7))
    assert len(data) < tokens.num_bytes
    assert TokenFile.from_bytes(data, codecs=codecs) == tokens
    tokens.save(tmp_path / "f.qlip", codec)
    assert (tmp_path / "f.qlip").read_bytes() == data
    assert TokenFile.load(tmp_path / "f.qlip", codecs) == tokens
    header = read_header(tmp_path / "f.qlip")  # without any tables
    assert (header.coding, header.grid_height, header.code_fingerprint.hex()) == (ENTROPY_CODED, 9, CODES)
    assert data[HEADER_BYTES[1] : HEADER_BYTES[1] + 8].hex() == codec.digest[:16]


def test_bits_that_coding_would_not_shorten_stay_raw(codec: TokenCodec) -> None:
    noise = token_file((8, 8), 8, 8)
    assert noise.to_bytes(codec) == noise.to_bytes()
    other = token_file((8, 8), 28)  # tables for 8 bits a token do not take them
    assert other.to_bytes(codec) == other.to_bytes()


def test_what_is_missing_is_named(codecs: TokenCodecs, codec: TokenCodec, tmp_path: Path) -> None:
    _, data = coded_file(codec, (9, 7))
    tag = codec.digest[:16]
    with pytest.raises(QLIPError, match=f"f: entropy-coded with the tables {tag}; reading it needs the model"):
        TokenFile.from_bytes(data, "f")
    entropy_tables(8, seed=5).save(tmp_path / "other.safetensors")
    with pytest.raises(QLIPError, match=rf"f: entropy-coded with the tables {tag}, and .*other.*; give the model"):
        TokenFile.from_bytes(data, "f", TokenCodecs.of_file(tmp_path / "other.safetensors"))


def test_every_flipped_bit_is_noticed(codecs: TokenCodecs, codec: TokenCodec) -> None:
    _, data = coded_file(codec, (9, 7))
    valid = 0
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        assert outcome(bytes(flipped), codecs) is not None, bit
        if bit < 8 * (len(data) - 4):  # with a checksum that fits: another image's only file, or refused
            valid += outcome(sealed(bytes(flipped[:-4])), codecs) is None
    assert valid > 100


def test_every_mutation_is_valid_or_one_line(codecs: TokenCodecs, codec: TokenCodec) -> None:
    draw = random.Random(0)
    bases = [coded_file(codec, grid, seed)[1] for seed, grid in enumerate([(9, 7), (16, 16), (5, 20), (1, 90)])]
    seen: set[str] = set()
    valid = 0
    for number in range(NUM_MUTATED):
        base = draw.choice(bases)
        if number % 4:
            message = outcome(sealed(consistent(draw, mutate(draw, base[:-4]))), codecs)
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
    "entropy-coded with tables for 8",
    "to no fewer bytes than raw bits take",
    "does not even name its tables",
    "tokens, entropy-coded; such files hold 1 to",
    "payload coding",
]


def test_little_is_allocated_for_little(codecs: TokenCodecs, codec: TokenCodec) -> None:
    """A header may announce many tokens; the payload must be a 64th of their bits before they are believed."""
    tag, draw = bytes.fromhex(codec.digest)[:8], random.Random(1)
    _, data = coded_file(codec, (16, 16))
    tracemalloc.start()
    try:
        for side, payload in [(255, 0), (255, 900), (65535, 900), (256, 1016), (256, 1500), (64, 60), (16, 100)]:
            body = tag + draw.randbytes(payload)
            head = data[:5] + bytes([ENTROPY_CODED]) + data[6:8] + struct.pack(">HH", side, side) + data[12:20]
            file = sealed(head + struct.pack(">I", len(body)) + data[24 : HEADER_BYTES[1]] + body)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            outcome(file, codecs)
            peak = tracemalloc.get_traced_memory()[1] - before
            believed = min(side * side, SPARSEST * payload)
            assert peak <= 1500 * believed + 400_000, (side, payload, peak)
    finally:
        tracemalloc.stop()
    assert MAX_FILE_BYTES < 1 << 25
