"""The .qlip file: frozen bytes, round trips, and what is refused."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import stat
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlip.errors import QLIPError
from qlip.tokens import TokenFile, check_model
from qlip.tokens.token_file import HEADER_BYTES, MAX_FILE_BYTES, MAX_GRID_TOKENS, OVERHEAD_BYTES
from tests.tokens.samples import CODES, DECODER, PREPARATION, random_indices, token_file

GOLDEN_2 = (
    "d14c49500200000700020002000001e0000000a00000000464a7994c6feb92d40f0c88d34e120cf1a01b6e36af329ab2f2444a8c"
    "0e4a2043c9fbd9152b7ff1375f060ed14c4fac7b6be8709b34cd20c2aeaf8962b100c1ad0123456789abcdef000200020b03f810"
    "623fe7fa"
)
GOLDEN = {
    # 1 x 3 tokens of 7 bits, 5 64 127, the file of docs/token-format.md
    (1, 3, 7): (
        [[5], [64], [127]],
        "d14c49500100000700010003000001e0000000a00000000364a7994c6feb92d40f0c88d34e120cf1a01b6e36af329ab2f2444a8c"
        "0e4a2043c9fbd9152b7ff1375f060ed14c4fac7b6be8709b34cd20c2aeaf8962b100c1ad0b03f8891bcf6d",
    ),
    # 2 x 1 tokens of 28 bits in groups of 14
    (2, 1, 14): (
        [[1, 2], [16383, 8192]],
        "d14c49500100001c00020001000001e0000000a00000000764a7994c6feb92d40f0c88d34e120cf1a01b6e36af329ab2f2444a8c"
        "0e4a2043c9fbd9152b7ff1375f060ed14c4fac7b6be8709b34cd20c2aeaf8962b100c1ad0004002fffe00072b98393",
    ),
}


def sealed(content: bytes) -> bytes:
    """Content with the checksum that fits it."""
    return content + struct.pack(">I", zlib.crc32(content))


def spliced(data: bytes, offset: int, value: bytes) -> bytes:
    """A file with one field overwritten and its checksum made anew."""
    return sealed(data[:offset] + value + data[offset + len(value) : -4])


@pytest.mark.parametrize("key", GOLDEN)
def test_token_file__bytes_never_change(key: tuple[int, int, int]) -> None:
    height, width, group_size = key
    indices, golden = GOLDEN[key]
    made = TokenFile.from_indices(
        torch.tensor(indices),
        group_size,
        grid=(height, width),
        original_size=(480, 160),
        code_fingerprint=CODES,
        decoder_fingerprint=DECODER,
    )
    assert made.to_bytes().hex() == golden
    read = TokenFile.from_bytes(bytes.fromhex(golden))
    assert read == made
    assert read.indices(group_size).tolist() == indices


def test_token_file__sizes_are_those_of_the_docs() -> None:
    bundled = token_file((8, 8), 28)
    prepared = dataclasses.replace(bundled, preparation=PREPARATION)
    assert (HEADER_BYTES, OVERHEAD_BYTES, len(bundled.bits)) == ({1: 88, 2: 100}, {1: 92, 2: 104}, 224)
    assert (bundled.version, bundled.num_bytes, prepared.version, prepared.num_bytes) == (1, 316, 2, 328)
    for made in (bundled, prepared):
        assert len(made.to_bytes()) == made.num_bytes
    assert MAX_FILE_BYTES == 33_030_248


def test_token_file_version_2__bytes_never_change() -> None:
    """2 x 2 tiles of 1 x 1 tokens of 7 bits, the second file of docs/token-format.md."""
    made = TokenFile.from_indices(
        torch.tensor([[5], [64], [127], [1]]),
        7,
        grid=(2, 2),
        original_size=(480, 160),
        code_fingerprint=CODES,
        decoder_fingerprint=DECODER,
        preparation=PREPARATION,
        tiles=(2, 2),
    )
    assert made.to_bytes().hex() == GOLDEN_2
    assert TokenFile.from_bytes(bytes.fromhex(GOLDEN_2)) == made
    assert made.tile_grid == (1, 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tiles": (3, 1)}, r"3 x 1 tiles do not divide a grid of 8 x 8 tokens"),
        ({"tiles": (0, 1)}, r"tiles \(rows, columns\) must be 1 to 65,535 each"),
        ({"tiles": [1, 1]}, r"must be a tuple of two integers"),
        ({"tiles": (2, 2), "preparation": None}, "tiles need a preparation fingerprint"),
        ({"preparation": "0" * 15}, "a preparation fingerprint is 16 lower-case hex digits"),
        ({"preparation": "G" * 16}, "a preparation fingerprint is 16 lower-case hex digits"),
    ],
)
def test_token_file_version_2__fields_out_of_range_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(QLIPError, match=reason):
        dataclasses.replace(token_file((8, 8), 28), **({"preparation": PREPARATION} | changes))


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (96, b"\0\0", "tiles"),
        (96, b"\0\3", "tiles do not divide"),
        (98, b"\0\3", "tiles do not divide"),
        (4, b"\3", "version 3 of the format, this qlip reads versions 1 and 2"),
        (4, b"\1", "too long"),
    ],
)
def test_token_file_version_2__forged_fields_are_refused(offset: int, value: bytes, reason: str) -> None:
    data = dataclasses.replace(token_file((8, 8), 28), preparation=PREPARATION).to_bytes()
    with pytest.raises(QLIPError, match=reason):
        TokenFile.from_bytes(spliced(data, offset, value))


def test_token_file_version_2__truncated_at_any_byte_is_refused() -> None:
    data = dataclasses.replace(token_file((2, 2), 28), preparation=PREPARATION, tiles=(1, 2)).to_bytes()
    for length in range(len(data)):
        with pytest.raises(QLIPError, match="truncated|empty"):
            TokenFile.from_bytes(data[:length])


@given(
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    num_bits=st.integers(1, 63),
    size=st.tuples(st.integers(1, 2**14), st.integers(1, 2**14)),
    fingerprints=st.tuples(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32)),
    preparation=st.none() | st.binary(min_size=8, max_size=8).map(bytes.hex),
    tiled=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_token_file__round_trip(
    grid: tuple[int, int],
    num_bits: int,
    size: tuple[int, int],
    fingerprints: tuple[bytes, bytes],
    preparation: str | None,
    tiled: bool,
    seed: int,
) -> None:
    indices = random_indices(grid[0] * grid[1], num_bits, num_bits, seed)
    made = TokenFile.from_indices(
        indices,
        num_bits,
        grid=grid,
        original_size=size,
        code_fingerprint=fingerprints[0].hex(),
        decoder_fingerprint=fingerprints[1].hex(),
        preparation=preparation,
        tiles=grid if tiled and preparation is not None else (1, 1),  # tiles of one token
    )
    data = made.to_bytes()
    read = TokenFile.from_bytes(data)
    assert read == made
    assert read.to_bytes() == data
    assert torch.equal(read.indices(num_bits), indices)


def test_token_file__save_and_load(tmp_path: Path) -> None:
    made = token_file()
    path = tmp_path / "photo.qlip"
    made.save(path)
    made.save(path)  # over the first
    assert TokenFile.load(path) == made
    assert TokenFile.load(str(path)).source == str(path)
    assert path.read_bytes() == made.to_bytes()
    assert os.listdir(tmp_path) == ["photo.qlip"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask  # as any program's file, not a private one


def test_token_file__largest(tmp_path: Path) -> None:
    path = tmp_path / "large.qlip"
    made = dataclasses.replace(
        token_file(),
        bits=bytes(MAX_GRID_TOKENS * 63 // 8),
        grid=(2**11, 2**11),
        bits_per_token=63,
        original_size=(2**14, 2**14),
        preparation=PREPARATION,
    )
    made.save(path)
    assert path.stat().st_size == MAX_FILE_BYTES
    assert TokenFile.load(path) == made


WHOLE = token_file((1, 3), 7, 7).to_bytes()  # 3 bits of padding


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\xd1", r"truncated \(1 bytes,"),
        (b"QLIP is a tokenizer", "not a .qlip file"),
        (b"\xff\xd8\xff\xe0" + bytes(400), "not a .qlip file"),
        (WHOLE[:50], r"truncated \(50 bytes, the header alone has 88\)"),
        (WHOLE[:-1], r"truncated \(94 of the 95 bytes"),
        (WHOLE + b"\n", r"too long \(96 bytes, its header states 95\)"),
        (WHOLE + WHOLE, r"too long \(190 bytes, its header states 95\)"),
        (WHOLE[:30] + bytes([WHOLE[30] ^ 4]) + WHOLE[31:], "damaged"),
        (WHOLE[:-1] + bytes([WHOLE[-1] ^ 1]), "damaged"),
        (spliced(WHOLE, 4, b"\x03"), "version 3 of the format, this qlip reads versions 1 and 2.*newer qlip"),
        (spliced(WHOLE, 4, b"\x00"), "version 0"),
        (spliced(WHOLE, 5, b"\x03"), "payload coding 3.*pip install -U qlip"),
        (spliced(WHOLE, 6, b"\x80"), "flags 0x80"),
        (spliced(WHOLE, 7, b"\x00"), "1 to 63 bits, an int, not 0"),
        (spliced(WHOLE, 7, b"\x40"), "1 to 63 bits, an int, not 64"),
        (spliced(WHOLE, 7, b"\x0e"), "3 tokens of 14 bits take 6 bytes, not 3"),
        (spliced(WHOLE, 8, b"\x00\x00"), r"grid \(height, width\) must be 1 to "),
        (spliced(WHOLE, 8, b"\xff\xff\xff\xff"), "grid of 4,294,836,225 tokens"),
        (spliced(WHOLE, 12, bytes(4)), r"original size \(width, height\) must be 1 to "),
        (spliced(WHOLE, 12, b"\xff" * 8), "original of 4294967295 x 4294967295 pixels"),
        (spliced(WHOLE, 20, b"\xff\xff\xff\xff"), "states 4,294,967,387 bytes, more than the largest"),
        (spliced(WHOLE, 20, b"\x01\x00\x00\x00"), r"truncated \(95 of the 16,777,308 bytes"),
        (spliced(WHOLE, 20, b"\x00\x00\x00\x00"), r"too long \(95 bytes, its header states 92\)"),
        (spliced(WHOLE, 90, bytes([WHOLE[90] | 1])), "last 3 bits are padding"),
    ],
)
def test_token_file__bad_content_is_refused_in_one_line_that_names_the_file(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "photo.qlip"
    path.write_bytes(data)
    with pytest.raises(QLIPError, match=message) as from_file:
        TokenFile.load(path)
    assert str(from_file.value).startswith(f"{path}: ")
    assert "\n" not in str(from_file.value)
    with pytest.raises(QLIPError, match=message):
        TokenFile.from_bytes(data)


def test_load__paths_that_are_not_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.qlip")  # opening it would block
    for path, message in [
        (tmp_path / "none.qlip", "No such file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe.qlip", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
    ]:
        with pytest.raises(QLIPError, match=message):
            TokenFile.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits_per_token": 28.0}, "an int, not 28.0"),
        ({"bits": b"\x00"}, "take 224 bytes, not 1"),
        ({"grid": (8, 9)}, "take 252 bytes, not 224"),
        ({"grid": [8, 8]}, "tuple of two integers"),
        ({"grid": (8.0, 8)}, "tuple of two integers"),
        ({"grid": (True, 64)}, "tuple of two integers"),
        ({"grid": (-8, -8)}, "must be 1 to 65,535"),
        ({"original_size": (0, 5)}, "must be 1 to "),
        ({"original_size": (2**14, 2**14 + 1)}, "at most 268,435,456"),
        ({"bits_per_token": 64}, "1 to 63 bits"),
        ({"code_fingerprint": "ab"}, "64 lower-case hex"),
        ({"decoder_fingerprint": "G" * 64}, "64 lower-case hex"),
        ({"decoder_fingerprint": DECODER + "\n"}, "64 lower-case hex"),
    ],
)
def test_token_file__fields_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(QLIPError, match=message):
        dataclasses.replace(token_file(), **change)


def test_indices__group_size_that_does_not_divide_names_the_file(tmp_path: Path) -> None:
    token_file().save(tmp_path / "photo.qlip")
    with pytest.raises(QLIPError, match=r"photo\.qlip: .*does not divide"):
        TokenFile.load(tmp_path / "photo.qlip").indices(9)


def test_check_model__names_both_models() -> None:
    tokens = token_file()
    check_model(tokens, "nano", CODES, DECODER)
    check_model(tokens, "nano", CODES, DECODER, need="decoder")
    check_model(tokens, "nano", CODES, "0" * 64, need="codes")
    check_model(tokens, "nano", "0" * 64, DECODER, need="decoder")
    with pytest.raises(QLIPError) as caught:
        check_model(tokens, "nano", "a" * 64, "b" * 64)
    for name in (CODES[:12], DECODER[:12], "nano", "a" * 12, "b" * 12):
        assert name in str(caught.value)
    with pytest.raises(QLIPError, match="may be compared with this model's tokens, but not decoded"):
        check_model(tokens, "nano", CODES, "b" * 64, need="decoder")


def test_save__failure_keeps_the_existing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "photo.qlip"
    token_file(seed=1).save(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QLIPError, match=r"photo\.qlip: cannot write \(No space left on device\)") as caught:
        token_file(seed=2).save(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["photo.qlip"]

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        token_file(seed=2).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["photo.qlip"]


FULL_DISK = """
import resource, sys
from qlip.errors import QLIPError
from qlip.tokens import TokenFile
tokens = TokenFile(bits=bytes(100_000), grid=(100, 1000), original_size=(9, 9), bits_per_token=8,
                   code_fingerprint="0" * 64, decoder_fingerprint="0" * 64)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    tokens.save(sys.argv[1])
except QLIPError as error:
    print(error)
"""


def test_save__write_that_stops_half_way_leaves_nothing(tmp_path: Path) -> None:
    """The kernel cuts the write at 50,000 of 100,092 bytes, as a full disk does."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "photo.qlip")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "photo.qlip: cannot write (File too large)" in result.stdout
    assert result.stdout.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_save__paths_that_a_rename_would_destroy_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "pipe" / "photo.qlip", "photo.qlip: cannot write"),
    ]:
        with pytest.raises(QLIPError, match=message):
            token_file().save(path)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "link.qlip").symlink_to(tmp_path / "photo.qlip")
    token_file().save(tmp_path / "link.qlip")
    assert (tmp_path / "link.qlip").is_symlink()
    assert TokenFile.load(tmp_path / "photo.qlip") == token_file()
