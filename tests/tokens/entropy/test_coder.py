"""The entropy coder: frozen bytes, equality with a literal implementation, independence of the batch, refusals."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlip.errors import QLIPError
from qlip.tokens import TokenCodec, pack
from qlip.tokens.entropy.coder import MAX_CODED_TOKENS, MAX_RATIO
from qlip.tokens.packing import packed_size
from tests.tokens.entropy.literal_coder import LiteralCoder
from tests.tokens.samples import entropy_tables, random_indices, rare_ones

GOLDEN_TABLES = "fa63afec9ede26321e590290d90f4b934e1f4145d7f9faefbc9b37c2df1cda08"
GOLDEN = {(3, 4): "1657dacbc98d580de5b4cf0aea9f", (1, 1): "3c", (2, 5): "09c5245470f50c304070"}


def tokens(grid: tuple[int, int], num_bits: int, seed: int) -> bytes:
    return pack(random_indices(grid[0] * grid[1], num_bits, num_bits, seed), num_bits)


@pytest.mark.parametrize("grid", GOLDEN)
def test_token_codec__bytes_never_change(grid: tuple[int, int]) -> None:
    codec = TokenCodec(entropy_tables())
    assert codec.digest == GOLDEN_TABLES
    (coded,) = codec.encode([tokens(grid, 7, seed=3)], grid)
    assert coded.hex() == GOLDEN[grid]


@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    num_bits=st.integers(1, 9),
    hidden=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    bias=st.sampled_from([0, -4000, 4000, -30_000, 30_000]),
)
@settings(max_examples=60, deadline=None)
def test_token_codec__equals_the_literal_coder(
    grid: tuple[int, int], num_bits: int, hidden: int, seed: int, bias: int
) -> None:
    tables = entropy_tables(num_bits, hidden, seed, bias)
    codec, literal, packed = TokenCodec(tables), LiteralCoder(tables), tokens(grid, num_bits, seed)
    (coded,) = codec.encode([packed], grid)
    assert coded == literal.encode(packed, grid)
    assert codec.decode([coded], grid) == [packed] == [literal.decode(coded, grid)]


@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    num_bits=st.integers(1, 63),
    count=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_token_codec__bytes_do_not_depend_on_the_batch(
    grid: tuple[int, int], num_bits: int, count: int, seed: int
) -> None:
    codec = TokenCodec(entropy_tables(num_bits, seed=seed % 7))
    images = [tokens(grid, num_bits, seed + n) for n in range(count)]
    batched = codec.encode(images, grid)
    assert batched == [codec.encode([image], grid)[0] for image in images]
    assert codec.decode(batched, grid) == images


def test_token_codec__batches_of_several_chunks() -> None:
    codec, grid = TokenCodec(entropy_tables(4)), (8, 8)
    images = [tokens(grid, 4, seed) for seed in range(150)]
    batched = codec.encode(images, grid)
    assert batched[149:] == codec.encode(images[149:], grid)
    assert codec.decode(batched, grid) == images


def test_token_codec__length_of_probable_tokens_is_bounded_below() -> None:
    rare = TokenCodec(entropy_tables(8, bias=-6000, scale_down=9))
    raw = rare_ones(256, seed=0)
    (coded,) = rare.encode([raw], (16, 16))
    assert len(coded) < 0.7 * len(raw)
    certain = TokenCodec(entropy_tables(8, bias=-60_000))
    (coded,) = certain.encode([bytes(2**14)], (128, 128))
    assert len(coded) >= 2**14 / MAX_RATIO
    assert certain.decode([coded], (128, 128)) == [bytes(2**14)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda coded: coded[: len(coded) // 2], "no encoder writes"),
        (lambda coded: coded + b"\0", "no encoder writes"),
        (lambda coded: coded[:1], "too few for 256 tokens of 8 bits"),
        (lambda coded: b"", "too few"),
        (lambda coded: b"\xff" * len(coded), "no encoder writes"),
    ],
)
def test_token_codec__bytes_of_no_encoder_are_refused(change, message: str) -> None:  # type: ignore[no-untyped-def]
    codec = TokenCodec(entropy_tables(8, bias=-6000, scale_down=9))
    coded = codec.encode([rare_ones(256, seed=1)], (16, 16))
    with pytest.raises(QLIPError, match=message):
        codec.decode([change(coded[0])], (16, 16))


def test_token_codec__malformed_input_is_refused() -> None:
    codec = TokenCodec(entropy_tables(7))
    with pytest.raises(QLIPError, match="take 8 bytes, not 7"):
        codec.encode([bytes(7)], (3, 3))
    with pytest.raises(QLIPError, match="padding"):
        codec.encode([bytes(7) + b"\1"], (3, 3))
    for grid in ((0, 3), (MAX_CODED_TOKENS + 1, 1)):
        assert not codec.can_code(grid[0] * grid[1])
        with pytest.raises(QLIPError, match="entropy coding takes 1 to 65,536"):
            codec.encode([b""], grid)
        with pytest.raises(QLIPError, match="entropy coding takes 1 to 65,536"):
            codec.decode([b""], grid)


def test_token_codec__largest_grid() -> None:
    codec, grid = TokenCodec(entropy_tables(2, hidden=1, bias=-3000)), (256, 256)
    image = random.Random(0).randbytes(packed_size(MAX_CODED_TOKENS, 2))
    assert codec.decode(codec.encode([image], grid), grid) == [image]


def test_token_codec__sums_do_not_depend_on_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum in float64 and from the last term to the first, as the matrix product of another machine might."""
    codec, grid = TokenCodec(entropy_tables(9, hidden=5)), (6, 6)
    images = [tokens(grid, 9, seed) for seed in range(4)]
    coded, matmul = codec.encode(images, grid), np.matmul

    def backwards(left, right, out=None):  # type: ignore[no-untyped-def]
        result = matmul(left[..., ::-1].astype(np.float64), right[..., ::-1, :].astype(np.float64)).astype(np.float32)
        if out is None:
            return result
        out[...] = result
        return out

    monkeypatch.setattr(np, "matmul", backwards)
    assert codec.encode(images, grid) == coded
