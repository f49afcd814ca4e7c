"""The state machine of text and images: what may follow, which softmax a target belongs to, faults of documents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlip.errors import QLIPError
from qlip.um3.config import UM3Config
from qlip.um3.sequence import IGNORED, IN_TEXT, TEXT, VISUAL, Grammar, image_ids, indices_of
from tests.um3.tiny import BEGIN, END, document, interleavings, random_indices, tiny_config

SHARED, PER_GROUP = tiny_config(), tiny_config(rows="per_group")
CONFIGS = pytest.mark.parametrize("config", [SHARED, PER_GROUP], ids=["shared", "per_group"])
GRAMMAR = Grammar(SHARED)
V = SHARED.visual_begin


@CONFIGS
def test_image_ids__and_back(config: UM3Config) -> None:
    indices = random_indices(config, count=(2, 1))
    ids = image_ids(config, indices)
    assert ids.shape == (2, 1, 12) and torch.equal(indices_of(config, ids), indices)
    second = 8 if config.rows == "per_group" else 0
    assert ids[0, 0, :4].tolist() == (indices[0, 0, :2] + torch.tensor([V, V + second])).flatten().tolist()


@CONFIGS
@given(st.data())
def test_grammar__round_trips_any_interleaving(config: UM3Config, data: st.DataObject) -> None:
    parts, grammar = data.draw(interleavings(config)), Grammar(config)
    ids = document(config, parts)
    grammar.check(torch.tensor(ids, dtype=torch.int64))
    state, states, read = grammar.start(), [], list[int | list[int]]()
    for place, id_ in enumerate(ids):
        states.append(state)
        allowed = grammar.allowed(state)
        assert id_ in allowed and id_ in allowed.ids()
        state = grammar.advance(state, id_)
        if state == config.image_length:
            indices = indices_of(config, torch.tensor(ids[place + 1 - config.image_length : place + 1]))
            seeds = [part for part in parts if isinstance(part, int)]
            assert torch.equal(indices, random_indices(config, seeds[sum(isinstance(one, int) for one in read)]))
            read.append(0)
    assert state == IN_TEXT and len(read) == sum(isinstance(part, int) for part in parts)
    types = grammar.target_types(torch.tensor([ids], dtype=torch.int64), torch.zeros(1, len(ids), dtype=torch.int64))
    expected = [VISUAL + before % config.num_groups if 0 <= before < config.image_length else TEXT for before in states]
    assert types[0, 1:].tolist() == expected[1:] and types[0, :1].tolist() == [IGNORED] * bool(ids)


def test_target_types__are_the_targets_not_the_inputs() -> None:
    ids = torch.tensor([document(SHARED, [[7, 8], 0, [9]])])
    types = GRAMMAR.target_types(ids, torch.zeros_like(ids))
    image = [VISUAL, VISUAL + 1] * 6
    #                     7        8  <boi>         <eoi>  9
    assert types[0].tolist() == [IGNORED, TEXT, TEXT, *image, TEXT, TEXT]


def test_target_types__begin_with_each_document_and_leave_padding_out() -> None:
    first, second = document(SHARED, [1, [7]]), document(SHARED, [2])
    ids = torch.tensor([first + second + [0, 0]])
    documents = torch.tensor([[0] * len(first) + [1] * len(second) + [-1, -1]])
    types = GRAMMAR.target_types(ids, documents)
    image = [VISUAL, VISUAL + 1] * 6
    assert types[0].tolist() == [IGNORED, *image, TEXT, TEXT, IGNORED, *image, TEXT, IGNORED, IGNORED]


@CONFIGS
@settings(max_examples=30)
@given(st.data(), st.integers(1, 60))
def test_allowed__any_walk_within_a_budget_is_whole(config: UM3Config, data: st.DataObject, budget: int) -> None:
    grammar, ids, state = Grammar(config), list[int](), IN_TEXT
    for left in range(budget, 0, -1):
        allowed = grammar.allowed(state, left)
        begins = BEGIN in allowed
        assert not begins or left >= grammar.image_cost
        ids.append(BEGIN if begins and data.draw(st.booleans()) else data.draw(st.sampled_from(allowed.ids())))
        state = grammar.advance(state, ids[-1])
    grammar.check(torch.tensor(ids))


def test_allowed__ids_of_the_group_that_is_due_and_images_that_fit() -> None:
    grammar = Grammar(PER_GROUP)
    assert grammar.allowed(5, 13).ids() == list(range(V + 8, V + 16))
    assert not {BEGIN, END} & set(grammar.allowed(IN_TEXT, 13).ids())
    assert BEGIN in grammar.allowed(IN_TEXT, 14).ids()


IMAGE = image_ids(SHARED, random_indices(SHARED)).tolist()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([7, BEGIN, *IMAGE[:5], 7], "position 7: id 7, one of text, cuts an image short: 5 of its 12 ids, and no end"),
        ([7, BEGIN, *IMAGE[:5]], "position 7: the document ends inside an image: 5 of its 12 ids, and no end"),
        ([BEGIN, *IMAGE], "ends inside an image: 12 of its 12 ids"),
        ([BEGIN, *IMAGE, 7], "position 13: id 7 stands behind a whole image, where its end, 6, is due"),
        ([BEGIN, BEGIN], "position 1: id 5, one of text, cuts an image short"),
        ([7, END], "position 1: id 6, an image's end, stands outside an image"),
        ([7, IMAGE[0]], f"position 1: id {IMAGE[0]}, a visual id, stands outside an image"),
        ([7, 48], "position 1: id 48 is none of the 48; does the data belong to another tokenizer"),
        ([-1], "position 0: id -1 is none of the 48"),
    ],
)
def test_check__names_the_fault(ids: list[int], message: str) -> None:
    with pytest.raises(QLIPError, match=message):
        GRAMMAR.check(torch.tensor(ids))


def test_check__a_value_of_another_group() -> None:
    ids = [BEGIN, *image_ids(PER_GROUP, random_indices(PER_GROUP)).tolist(), END]
    ids[2] = V
    with pytest.raises(QLIPError, match=f"position 2: id {V} is no value of group 1, which is due"):
        Grammar(PER_GROUP).check(torch.tensor(ids))
    with pytest.raises(QLIPError, match=f"id {V} at place 1 of an image is no value of its group"):
        indices_of(PER_GROUP, torch.tensor(ids[1:-1]))


def test_image_ids__of_another_grid_are_refused() -> None:
    with pytest.raises(QLIPError, match=r"indices of shape \(4, 2\): need \(..., 6, 2\), the tokens of an image of 2"):
        image_ids(SHARED, torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(QLIPError, match=r"ids of shape \(5,\): an image has 12 ids"):
        indices_of(SHARED, torch.zeros(5, dtype=torch.int64))
