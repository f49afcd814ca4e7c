"""Continuation of text: cached, padded, packed and shared beginnings give what recomputing everything gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.lm.causal import CausalModel
from qlip.lm.complete import complete
from qlip.lm.packed import Weights, pack
from qlip.lm.sampling import Sampling, uniforms
from tests.lm.test_causal import tiny

SAMPLING = Sampling(temperature=0.8, top_k=12, top_p=0.9)
PROMPTS = [torch.tensor([3, 9, 27, 1, 14]), torch.tensor([8, 5]), torch.tensor([30, 31, 32])]


@torch.no_grad()
def recomputed(
    model: CausalModel, prompt: Tensor, count: int, stop: tuple[int, ...], sampling: Sampling, number: int
) -> list[int]:
    """The slow twin: one sequence, a full pass per id."""
    noise = uniforms(7, [number], count, 1)[0, :, 0]
    ids = prompt[None]
    for step in range(count):
        ids = torch.cat([ids, sampling.draw(model(ids)[:, -1], noise[step : step + 1])[:, None]], 1)
        if int(ids[0, -1]) in stop:
            break
    return ids[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def padded(model: CausalModel, prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    start = torch.tensor([longest - len(one) for one in prompts])
    ids = torch.stack([torch.cat([one.new_zeros(longest - len(one)), one]) for one in prompts])
    return model.embed(ids), start


def rows(found: list[Tensor]) -> list[list[int]]:
    return [[one for one in row if one >= 0] for row in torch.stack(found, 1).tolist()]


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "tie_word_embeddings": True, "num_key_value_heads": 4}])
@pytest.mark.parametrize("weights", [None, "float32", "plain"])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), SAMPLING], ids=["greedy", "sampled"])
def test_complete__is_what_full_passes_give(
    sampling: Sampling, weights: Weights | None, changes: dict[str, Any]
) -> None:
    if weights == "float32" and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    model = tiny(**changes)
    free = [recomputed(model, one, 12, (), sampling, number) for number, one in enumerate(PROMPTS)]
    stop = (free[0][4], free[2][7])
    expected = [recomputed(model, one, 12, stop, sampling, number) for number, one in enumerate(PROMPTS)]
    fast = model if weights is None else pack(copy.deepcopy(model), weights)
    embeddings, start = padded(fast, PROMPTS)
    found = list(complete(fast, embeddings, start, max_tokens=12, stop=stop, sampling=sampling, seed=7))
    assert rows(found) == expected
    assert len(found) == max(map(len, expected))
    alone = complete(
        fast, fast.embed(PROMPTS[1][None]), max_tokens=12, stop=stop, sampling=sampling, seed=7, numbers=[1]
    )
    assert rows(list(alone)) == expected[1:2]


def test_complete__int8_weights_change_the_logits_little() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    model = tiny(hidden_size=64, intermediate_size=128)
    ids = torch.arange(30).view(2, 15)
    with torch.no_grad():
        expected, found = model(ids), pack(copy.deepcopy(model), "int8")(ids)
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.05


def test_complete__default_is_the_likeliest_id() -> None:
    model = tiny()
    found = complete(model, model.embed(PROMPTS[0][None]), max_tokens=5)
    assert rows(list(found)) == [recomputed(model, PROMPTS[0], 5, (), Sampling(temperature=0.0), 0)]


def test_complete__turns_with_a_kept_cache_are_one_text() -> None:
    model = pack(tiny(), "plain")
    greedy = Sampling(temperature=0.0)
    cache = model.new_cache(1, 40)
    first = [int(one) for one in complete(model, model.embed(PROMPTS[0][None]), max_tokens=4, cache=cache)]
    assert cache.length == len(PROMPTS[0]) + 3
    turn = torch.tensor([first[-1], 20, 21])
    second = [int(one) for one in complete(model, model.embed(turn[None]), max_tokens=4, cache=cache)]
    whole = torch.cat([PROMPTS[0], torch.tensor(first), torch.tensor([20, 21])])
    assert first == recomputed(model, PROMPTS[0], 4, (), greedy, 0)
    assert second == recomputed(model, whole, 4, (), greedy, 0)
    cache.advance(len(PROMPTS[0]) - cache.length)  # asks another question after the same beginning
    again = complete(model, model.embed(torch.tensor([first[0], 33])[None]), max_tokens=4, cache=cache)
    asked = torch.cat([PROMPTS[0], torch.tensor([first[0], 33])])
    assert [int(one) for one in again] == recomputed(model, asked, 4, (), greedy, 0)


def test_complete__questions_of_several_lengths_after_one_beginning() -> None:
    model = pack(tiny(), "plain")
    beginning = torch.tensor([11, 12, 13, 14])
    cache = model.new_cache(1, 24)
    model.hidden(model.embed(beginning[None]), cache=cache)
    embeddings, start = padded(model, PROMPTS)
    found = complete(model, embeddings, start, max_tokens=6, cache=cache.select(torch.zeros(3, dtype=torch.int64)))
    greedy = Sampling(temperature=0.0)
    assert rows(list(found)) == [recomputed(model, torch.cat([beginning, one]), 6, (), greedy, 0) for one in PROMPTS]


def test_complete__ends_with_the_context_or_the_cache() -> None:
    model = tiny(max_position_embeddings=8)
    assert len(list(complete(model, model.embed(PROMPTS[0][None]), max_tokens=50))) == 4  # the last needs no position
    cache = model.new_cache(1, 6)
    assert len(list(complete(model, model.embed(PROMPTS[0][None]), max_tokens=50, cache=cache))) == 2


def test_complete__of_what_it_cannot_is_one_line() -> None:
    model = tiny(max_position_embeddings=8)
    x = model.embed(PROMPTS[0][None])
    with pytest.raises(QLIPError, match="10 positions: the language model's context is 8"):
        next(complete(model, torch.cat([x, x], 1), max_tokens=1))
    with pytest.raises(QLIPError, match="nothing to continue"):
        next(complete(model, x, torch.tensor([5]), max_tokens=1))
    with pytest.raises(QLIPError, match="nothing to continue"):
        next(complete(model, x[:, :0], max_tokens=1))
    with pytest.raises(QLIPError, match="max_tokens 0"):
        next(complete(model, x, max_tokens=0))
    with pytest.raises(QLIPError, match="2 numbers for 1 sequences"):
        next(complete(model, x, max_tokens=1, numbers=[1, 2]))
    with pytest.raises(QLIPError, match="not finite"):
        next(complete(model, x * float("nan"), max_tokens=1))
    with pytest.raises(QLIPError, match="training mode"):
        next(complete(model.train(), x, max_tokens=1))
