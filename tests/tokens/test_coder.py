"""The entropy coder: its bytes against a literal twin, frozen; alone and in company; what it refuses."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlip.errors import QLIPError
from qlip.tokens import Tables, TokenCodec, TokenCodecs, pack
from qlip.tokens.entropy.checkerboard import board
from qlip.tokens.entropy.coder import MAX_CODED_TOKENS, SPARSEST
from qlip.tokens.packing import packed_size
from tests.tokens.literal_coder import LiteralCoder
from tests.tokens.samples import entropy_tables, random_indices, rare_ones

GOLDEN_TABLES = "fa63afec9ede26321e590290d90f4b934e1f4145d7f9faefbc9b37c2df1cda08"
GOLDEN = {(3, 4): "1657dacbc98d580de5b4cf0aea9f", (1, 1): "3c", (2, 5): "09c5245470f50c304070"}


def tokens(grid: tuple[int, int], num_bits: int, seed: int) -> bytes:
    return pack(random_indices(grid[0] * grid[1], num_bits, num_bits, seed), num_bits)


@pytest.mark.parametrize("grid", GOLDEN)
def test_the_bytes_never_change(grid: tuple[int, int]) -> None:
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
def test_the_bytes_are_the_literal_twins(
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
def test_company_changes_nothing(grid: tuple[int, int], num_bits: int, count: int, seed: int) -> None:
    codec = TokenCodec(entropy_tables(num_bits, seed=seed % 7))
    images = [tokens(grid, num_bits, seed + n) for n in range(count)]
    together = codec.encode(images, grid)
    assert together == [codec.encode([image], grid)[0] for image in images]
    assert codec.decode(together, grid) == images


def test_more_images_than_are_worked_on_at_once() -> None:
    codec, grid = TokenCodec(entropy_tables(4)), (8, 8)
    images = [tokens(grid, 4, seed) for seed in range(150)]
    together = codec.encode(images, grid)
    assert together[149:] == codec.encode(images[149:], grid)
    assert codec.decode(together, grid) == images


def test_what_the_tables_expect_takes_few_bytes_and_never_too_few() -> None:
    rare = TokenCodec(entropy_tables(8, bias=-6000, tame=9))
    raw = rare_ones(256, seed=0)
    (coded,) = rare.encode([raw], (16, 16))
    assert len(coded) < 0.7 * len(raw)
    certain = TokenCodec(entropy_tables(8, bias=-60_000))
    (coded,) = certain.encode([bytes(2**14)], (128, 128))
    assert len(coded) >= 2**14 / SPARSEST
    assert certain.decode([coded], (128, 128)) == [bytes(2**14)]


def test_the_chessboard() -> None:
    one = board(2, 3)
    assert one.order.tolist() == [0, 2, 4, 1, 3, 5]
    assert one.num_black == 3
    outside = 6
    assert one.around[0].tolist() == [outside, outside, outside, outside, 0, 3, outside, 4, 2]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda coded: coded[: len(coded) // 2], "no encoder writes"),
        (lambda coded: coded + b"\0", "no encoder writes"),
        (lambda coded: coded[:1], "too few for 256 tokens of 8 bits"),
        (lambda coded: b"", "too few"),
        (lambda coded: b"\xff" * len(coded), "no encoder writes"),
    ],
)
def test_refuses_other_bytes_than_its_own(change, says: str) -> None:  # type: ignore[no-untyped-def]
    codec = TokenCodec(entropy_tables(8, bias=-6000, tame=9))
    coded = codec.encode([rare_ones(256, seed=1)], (16, 16))
    with pytest.raises(QLIPError, match=says):
        codec.decode([change(coded[0])], (16, 16))


def test_refuses_what_is_no_packed_image() -> None:
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


def test_the_largest_grid_comes_back() -> None:
    codec, grid = TokenCodec(entropy_tables(2, hidden=1, bias=-3000)), (256, 256)
    image = random.Random(0).randbytes(packed_size(MAX_CODED_TOKENS, 2))
    assert codec.decode(codec.encode([image], grid), grid) == [image]


def test_any_order_of_summing_gives_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another machine's matrix product would: in float64, and from the last term to the first."""
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


def test_a_model_s_tables_are_found_by_their_hash(tmp_path: Path) -> None:
    now, before = entropy_tables(7, seed=1), entropy_tables(7, seed=2)
    now.save(tmp_path / "entropy_tables.safetensors")
    before.save(tmp_path / "entropy_tables-2025.safetensors")
    codecs = TokenCodecs.of_model(tmp_path)
    assert codecs.current is not None and codecs.current.digest == now.digest
    assert codecs.find(bytes.fromhex(before.digest)[:8]).digest == before.digest
    with pytest.raises(QLIPError, match=f"tables {'00' * 8}, and .* has {now.digest[:16]}, {before.digest[:16]}; give"):
        codecs.find(bytes(8))
    (tmp_path / "entropy_tables.safetensors").unlink()
    assert TokenCodecs.of_model(tmp_path).current is None
    assert TokenCodecs.of_file(tmp_path / "entropy_tables-2025.safetensors").current is not None


def test_tables_come_back_from_their_file(tmp_path: Path) -> None:
    tables = entropy_tables(5)
    tables.save(tmp_path / "t.safetensors", {"data": "drawn"})
    read = Tables.load(tmp_path / "t.safetensors")
    assert read.digest == tables.digest and read.shift.shape == ()
    tables.save(tmp_path / "again.safetensors")
    assert Tables.load(tmp_path / "again.safetensors").digest == tables.digest
    assert entropy_tables(5, seed=1).digest != tables.digest


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shift": np.array(30, np.int32)}, "shift must be 0 to 23, not 30"),
        ({"shift": np.array([8], np.int32)}, r"shift must be int32 \(\), not int32 \(1,\)"),
        ({"bias": np.zeros((2, 4), np.int64)}, r"bias must be int32 \(2, 4\), not int64"),
        ({"hidden_around": np.zeros((4, 9, 3), np.int16)}, r"hidden_around must be \(2, L, 9, H\)"),
        ({"output": np.full((2, 4, 3), 32767, np.int16)}, "sums may reach .* below 16,777,216 they are exact"),
        ({"probabilities": np.array([1, 0], np.uint16)}, "from 1 to 65,535 each"),
        ({"linear_around": np.ones((2, 4, 9, 4), np.int16)}, "planes that are not known yet"),
    ],
)
def test_refuses_tables_that_could_not_be_exact(change, says: str) -> None:  # type: ignore[no-untyped-def]
    tables = entropy_tables(4)
    with pytest.raises(QLIPError, match=says):
        Tables(**(tables._tensors() | change))


def test_refuses_files_that_are_no_tables(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "t.safetensors"
    with pytest.raises(QLIPError, match="cannot be read"):
        Tables.load(path)
    path.write_bytes(b"tables")
    with pytest.raises(QLIPError, match=r"t\.safetensors: not a whole safetensors file"):
        Tables.load(path)
    entropy_tables().save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(QLIPError, match="not a whole"):
        Tables.load(path)
    save_file({"weights": np.zeros(3)}, path)
    with pytest.raises(QLIPError, match="not a file of entropy tables"):
        Tables.load(path)
