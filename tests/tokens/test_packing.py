"""Packing compared with a literal implementation on strings of zeros and ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlip.errors import QLIPError
from qlip.tokens import TokenFile, pack, pack_batch, unpack, unpack_batch
from qlip.tokens.packing import packed_size, unpack_rows

DIVISORS = [(bits, group) for bits in range(1, 64) for group in range(1, bits + 1) if bits % group == 0]


def pack_literally(indices: list[list[int]], group_size: int) -> bytes:
    text = "".join(f"{index:0{group_size}b}" for token in indices for index in token)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[start : start + 8], 2) for start in range(0, len(text), 8))


@st.composite
def images(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    num_bits, group_size = draw(st.sampled_from(DIVISORS))
    edges = st.sampled_from([0, 1, 2**group_size - 1, 1 << (group_size - 1)])
    index = edges | st.integers(0, 2**group_size - 1)
    token = st.lists(index, min_size=num_bits // group_size, max_size=num_bits // group_size)
    return draw(st.lists(token, min_size=1, max_size=9)), num_bits, group_size


@given(images())
@settings(max_examples=400, deadline=None)
def test_pack__equals_the_literal_implementation_and_is_lossless(image: tuple[list[list[int]], int, int]) -> None:
    indices, num_bits, group_size = image
    tensor = torch.tensor(indices)
    data = pack(tensor, group_size)
    assert data == pack_literally(indices, group_size)
    assert len(data) == packed_size(len(indices), num_bits)
    assert torch.equal(unpack(data, len(indices), num_bits, group_size), tensor)


@pytest.mark.parametrize("num_bits", range(1, 64))
def test_unpack__every_group_size_reads_the_same_bits(num_bits: int) -> None:
    generator = torch.Generator().manual_seed(num_bits)
    single = torch.randint(0, 2, (11, num_bits), generator=generator)  # groups of one bit
    data = pack(single, 1)
    for group_size in (group for bits, group in DIVISORS if bits == num_bits):
        indices = unpack(data, 11, num_bits, group_size)
        text = ["".join(map(str, token)) for token in single.tolist()]
        expected = [[int(t[k : k + group_size], 2) for k in range(0, num_bits, group_size)] for t in text]
        assert indices.tolist() == expected
        assert indices.dtype == torch.int64
        assert pack(indices, group_size) == data


def test_pack__positions_of_bits() -> None:
    assert pack(torch.tensor([[1, 0, 0]]), 1) == bytes([0b1000_0000])  # channel 0 is the first byte's top bit
    assert pack(torch.tensor([[5], [64], [127]]), 7) == bytes.fromhex("0b03f8")  # no padding between tokens
    assert pack(torch.tensor([[2**63 - 1], [0]]), 63) == bytes.fromhex("fffffffffffffffe0000000000000000")


def test_pack_batch__equals_its_images_one_by_one() -> None:
    batch = torch.randint(0, 2**5, (4, 7, 3), generator=torch.Generator().manual_seed(0))
    rows = pack_batch(batch, 5)
    assert rows == [pack(image, 5) for image in batch]
    assert torch.equal(unpack_batch(rows, 7, 15, 5), batch)


def test_pack__no_token_is_no_byte() -> None:
    assert pack(torch.empty(0, 4, dtype=torch.int64), 7) == b""
    assert unpack(b"", 0, 28, 7).shape == (0, 4)
    assert pack_batch(torch.empty(0, 3, 4, dtype=torch.int64), 7) == []
    assert unpack_batch([], 3, 28, 7).shape == (0, 3, 4)


def test_pack__strides_do_not_matter() -> None:
    indices = torch.arange(24).view(4, 6).T[::2]  # (3, 4), not contiguous
    assert pack(indices, 5) == pack(indices.contiguous(), 5)


@pytest.mark.parametrize(
    ("indices", "group_size", "message"),
    [
        (torch.tensor([[128]]), 7, "index 128 is out of range"),
        (torch.tensor([[3, -1]]), 7, "index -1 is out of range"),
        (torch.tensor([[3]], dtype=torch.int32), 7, "int64"),
        (torch.tensor([[3.0]]), 7, "int64"),
        (torch.tensor([3]), 7, r"\(N, K\)"),
        (torch.tensor([[[3]]]), 7, r"\(N, K\)"),
        (torch.zeros(2, 8, dtype=torch.int64), 8, "1 to 63 bits, an int, not 64"),
        (torch.zeros(2, 0, dtype=torch.int64), 8, "1 to 63 bits, an int, not 0"),
        (torch.zeros(2, 1, dtype=torch.int64), -1, "1 to 63 bits, an int, not -1"),
    ],
)
def test_pack__invalid_indices_are_refused(indices: torch.Tensor, group_size: int, message: str) -> None:
    with pytest.raises(QLIPError, match=message) as caught:
        pack(indices, group_size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "num_tokens", "num_bits", "group_size", "message"),
    [
        (b"\x00\x00", 3, 7, 7, "take 3 bytes, not 2"),
        (b"\x00\x00\x00\x00", 3, 7, 7, "take 3 bytes, not 4"),
        (b"\x00\x00\x01", 3, 7, 7, "last 3 bits are padding"),
        (b"\x00\x00\x00", 3, 7, 2, "does not divide"),
        (b"\x00\x00\x00", 3, 7, 0, "group_size"),
        (b"\x00" * 24, 3, 64, 8, "1 to 63 bits, an int, not 64"),
        (b"", 3, 0, 1, "1 to 63 bits, an int, not 0"),
        (b"", -3, 7, 7, "0 or more"),
        (b"", 2**60, 63, 7, "take"),
    ],
)
def test_unpack__invalid_bytes_are_refused(
    data: bytes, num_tokens: int, num_bits: int, group_size: int, message: str
) -> None:
    with pytest.raises(QLIPError, match=message) as caught:
        unpack(data, num_tokens, num_bits, group_size)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 63), st.integers(1, 9), st.integers(0, 3), st.data())
def test_unpack_rows__equals_unpack_batch(num_bits: int, num_tokens: int, rows: int, data: st.DataObject) -> None:
    size = (num_tokens * num_bits + 7) // 8
    drawn = data.draw(st.binary(min_size=rows * size, max_size=rows * size))
    matrix = np.frombuffer(drawn, np.uint8).reshape(rows, size).copy()
    padding = 8 * size - num_tokens * num_bits
    matrix[:, -1] &= 0xFF << padding & 0xFF
    group = data.draw(st.sampled_from([g for g in range(1, num_bits + 1) if num_bits % g == 0]))
    plain = unpack_batch([row.tobytes() for row in matrix], num_tokens, num_bits, group)
    assert torch.equal(unpack_rows(matrix, num_tokens, num_bits, group), plain)


def test_unpack_rows__nonzero_padding_is_refused() -> None:
    with pytest.raises(QLIPError, match="padding"):
        unpack_rows(np.full((1, 1), 255, np.uint8), 1, 7, 7)


def test_pack__wrong_types_are_one_line() -> None:
    indices = torch.zeros(4, 4, dtype=torch.int64)
    packed = pack(indices, 7)
    for wrong in (indices.numpy(), indices.tolist(), None, "x", indices.double(), indices[0]):
        with pytest.raises(QLIPError):
            pack(wrong, 7)  # type: ignore[arg-type]
    for size in (None, "7", 7.0, 0):
        with pytest.raises(QLIPError, match="group_size|1 to 63 bits"):
            pack(indices, size)  # type: ignore[arg-type]
        with pytest.raises(QLIPError, match="group_size"):
            unpack(packed, 4, 28, size)  # type: ignore[arg-type]
    for data in (None, "x", 5, np.frombuffer(packed, np.uint8)):
        with pytest.raises(QLIPError, match="packed tokens are bytes"):
            unpack(data, 4, 28, 7)  # type: ignore[arg-type]
    for number in (None, "4", 4.0, -1):
        with pytest.raises(QLIPError, match="num_tokens"):
            unpack(packed, number, 28, 7)  # type: ignore[arg-type]
    for read in (TokenFile.from_bytes, TokenFile.load):
        for thing in (None, 5):
            with pytest.raises(QLIPError):
                read(thing)
