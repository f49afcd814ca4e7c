"""Sequences for language models: exact both ways, ids where the docstring says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlip import QLIPError
from qlip.lm import SequenceLayout

LAYOUTS = st.builds(
    SequenceLayout,
    group_size=st.integers(1, 40),
    groups=st.integers(1, 5),
    order=st.sampled_from(["token", "group"]),
    begin=st.booleans(),
    end=st.booleans(),
    offset=st.integers(0, 2**40),
)


@given(LAYOUTS, st.integers(0, 6), st.sampled_from([(), (1,), (2, 3)]), st.integers(0, 2**30))
def test_to_indices__inverts_to_sequence(
    layout: SequenceLayout, num_tokens: int, lead: tuple[int, ...], seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    shape = (*lead, num_tokens, layout.groups)
    indices = torch.randint(0, layout.values, shape, generator=random)
    ids = layout.to_sequence(indices)
    assert ids.shape == (*lead, layout.length(num_tokens)) and ids.dtype == torch.int64
    assert torch.equal(layout.to_indices(ids), indices)
    assert not ids.numel() or layout.offset <= int(ids.min()) <= int(ids.max()) < layout.offset + layout.vocabulary_size


def test_to_sequence__ids_and_orders_by_hand() -> None:
    indices = torch.tensor([[0, 1], [2, 3], [1, 0]])
    plain = SequenceLayout.for_bits(4, 2, begin=True, end=True, offset=100)
    assert plain.to_sequence(indices).tolist() == [104, 100, 101, 102, 103, 101, 100, 105]
    assert (plain.begin_id, plain.end_id, plain.vocabulary_size) == (104, 105, 6)
    by_group = SequenceLayout.for_bits(4, 2, order="group", end=True)
    assert by_group.to_sequence(indices).tolist() == [0, 2, 1, 1, 3, 0, 4]
    assert (by_group.begin_id, by_group.end_id) == (None, 4)
    published = SequenceLayout.for_bits(28, 14)
    assert (published.length(256), published.vocabulary_size) == (512, 16384)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 1, 5], "without its begin id, 4, at its begin"),
        ([4, 0, 1], "without its end id, 5, at its end"),
        ([], "without its begin id"),
        ([4, 0, 5], "1 sub-tokens are no whole number of tokens of 2 groups"),
        ([4, 0, 4, 5], "id 4 is no group's value: 0 to 3"),
        ([4, 0, -1, 5], "id -1 is no group's value"),
    ],
)
def test_to_indices__refuses_ids_that_are_no_image(ids: list[int], message: str) -> None:
    with pytest.raises(QLIPError, match=message):
        SequenceLayout.for_bits(4, 2, begin=True, end=True).to_indices(torch.tensor(ids, dtype=torch.int64))


def test_sequence_layout__refuses_impossible_values() -> None:
    with pytest.raises(QLIPError, match="does not divide 28 bits"):
        SequenceLayout.for_bits(28, 5)
    with pytest.raises(QLIPError, match="ids beyond int64"):
        SequenceLayout(62, 1, offset=2**63 - 1)
    with pytest.raises(QLIPError, match=r"need \(\.\.\., N, 2\)"):
        SequenceLayout.for_bits(28, 14).to_sequence(torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(QLIPError, match="index 4 is out of range"):
        SequenceLayout.for_bits(4, 2).to_sequence(torch.tensor([[4, 0]]))


def test_special_mask__is_true_at_begin_and_end_alone() -> None:
    layout = SequenceLayout(group_size=3, groups=2, begin=True, end=True, offset=10)
    ids = layout.to_sequence(torch.tensor([[7, 0], [1, 2]]))
    assert layout.special_mask(ids).tolist() == [True, False, False, False, False, True]
