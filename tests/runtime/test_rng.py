"""Hashes and generators of named parts, and torch's RNG state."""

from __future__ import annotations

import json

import torch

from qlip.runtime.rng import generator, hash_int, restore_rng_state, rng_state, rng_state_from_json, rng_state_to_json


def test_hash_int_and_generator__depend_on_their_parts_alone() -> None:
    assert hash_int("seed", 1) == 16897049564449903209500966758296726196
    assert generator(7, "sample").random() == 0.44783247514145463
    assert hash_int("a", "b") != hash_int("ab")


def test_rng_state__restored_also_through_json_draws_the_same_numbers() -> None:
    torch.manual_seed(3)
    state = rng_state()
    text = json.dumps(rng_state_to_json(state))
    drawn = torch.rand(5)
    restore_rng_state(state)
    assert torch.equal(torch.rand(5), drawn)
    restore_rng_state(rng_state_from_json(json.loads(text)))
    assert torch.equal(torch.rand(5), drawn)
