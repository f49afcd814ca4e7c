"""Token ids are exact: against Python's own integers, for every width and every floating type."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlip.errors import QLIPError
from qlip.modeling.config import QuantizerConfig
from qlip.modeling.indices import bits_to_indices, indices_to_bits, regroup
from qlip.modeling.quantizer import BinarySphericalQuantizer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def _tokens_and_group_size(draw: st.DrawFn) -> tuple[list[list[bool]], int]:
    group_size = draw(st.integers(1, 63))
    num_bits = group_size * draw(st.integers(1, 3))
    token = st.lists(st.booleans(), min_size=num_bits, max_size=num_bits)
    tokens = draw(st.lists(token, min_size=1, max_size=4))
    return tokens, group_size


def _by_python(tokens: list[list[bool]], group_size: int) -> list[list[int]]:
    groups = []
    for token in tokens:
        text = "".join("1" if bit else "0" for bit in token)
        groups.append([int(text[i : i + group_size], 2) for i in range(0, len(text), group_size)])
    return groups


@given(_tokens_and_group_size())
@settings(max_examples=60, deadline=None)
def test_indices__agree_with_python_integers(case: tuple[list[list[bool]], int]) -> None:
    tokens, group_size = case
    bits = torch.tensor(tokens)
    indices = bits_to_indices(bits, group_size)
    assert indices.dtype == torch.int64
    assert indices.tolist() == _by_python(tokens, group_size)
    back = indices_to_bits(indices, group_size)
    assert back.dtype == torch.bool
    assert torch.equal(back, bits)


@given(_tokens_and_group_size(), st.sampled_from(DTYPES), st.floats(0.01, 100))
@settings(max_examples=60, deadline=None)
def test_quantizer_ids__exact_from_any_float(
    case: tuple[list[list[bool]], int], dtype: torch.dtype, size: float
) -> None:
    tokens, group_size = case
    latents = (torch.tensor(tokens).float() * 2 - 1).mul(size).to(dtype)
    config = QuantizerConfig(embed_dim=latents.shape[-1], group_size=group_size, input_format="blc")
    quantizer = BinarySphericalQuantizer(config).eval()
    output = quantizer(latents[None])
    assert output.indices[0].tolist() == _by_python(tokens, group_size)
    assert torch.equal(quantizer.codes_of(output.indices, dtype), output.codes)


@pytest.mark.parametrize("bits", range(1, 64))
def test_indices__every_width_at_its_limits(bits: int) -> None:
    ends = torch.tensor([[0], [1], [2**bits - 1], [2 ** (bits - 1)]])
    assert torch.equal(bits_to_indices(indices_to_bits(ends, bits), bits), ends)
    assert indices_to_bits(ends, bits)[3].tolist() == [True] + [False] * (bits - 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizer_ids__zero_of_either_sign_is_bit_0(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal
    latents = torch.tensor([[[0.0, -0.0, smallest, -smallest]]], dtype=dtype)
    config = QuantizerConfig(embed_dim=4, group_size=4, input_format="blc")
    assert BinarySphericalQuantizer(config).eval()(latents).indices.tolist() == [[[0b0010]]]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_regroup__is_lossless(data: st.DataObject) -> None:
    num_bits = data.draw(st.integers(1, 96))
    divisors = [size for size in range(1, min(num_bits, 63) + 1) if num_bits % size == 0]
    first, second = data.draw(st.sampled_from(divisors)), data.draw(st.sampled_from(divisors))
    token = data.draw(st.lists(st.booleans(), min_size=num_bits, max_size=num_bits))
    indices = bits_to_indices(torch.tensor([[token]]), first)
    regrouped = regroup(indices, second, from_group_size=first)
    assert regrouped.tolist() == [_by_python([token], second)]
    assert torch.equal(regroup(regrouped, first, from_group_size=second), indices)


def test_indices__out_of_range_is_refused() -> None:
    with pytest.raises(QLIPError, match=r"128.*7 bits"):
        indices_to_bits(torch.tensor([[3, 128]]), 7)
    with pytest.raises(QLIPError, match=r"-1 .*out of range"):
        indices_to_bits(torch.tensor([[-1]]), 7)
    with pytest.raises(QLIPError, match=r"int64"):
        indices_to_bits(torch.tensor([[1]], dtype=torch.int32), 7)
    for group_size in (0, 64):
        with pytest.raises(QLIPError, match=r"1 to 63"):
            bits_to_indices(torch.zeros(1, 64, dtype=torch.bool), group_size)
    with pytest.raises(QLIPError, match=r"does not divide"):
        regroup(torch.tensor([[1, 2]]), 3, from_group_size=7)
