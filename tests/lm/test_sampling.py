"""Sampling against LlamaGen's probabilities and a literal twin; noise that depends on its key alone."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from qlip.errors import QLIPError
from qlip.lm.sampling import Sampling, draw_from, uniforms
from tests.lm.llamagen import FOLDER

CASES: dict[str, dict[str, Any]] = json.loads((FOLDER / "sampling" / "cases.json").read_text())


@pytest.mark.parametrize("number", sorted(CASES))
def test_probabilities__equal_llamagens(number: str) -> None:
    tensors, case = load_file(FOLDER / "sampling" / "sampling.safetensors"), CASES[number]
    sampling = Sampling(**{name: case[name] for name in ("temperature", "top_k", "top_p")})
    before = tensors["logits"].clone()
    found = sampling.probabilities(tensors["logits"])
    torch.testing.assert_close(found, tensors[f"probs.{number}"], atol=2e-5, rtol=0)
    assert torch.equal(tensors["logits"], before)


def literal(logits: list[float], sampling: Sampling) -> list[float]:
    """One row, in Python."""
    scaled = [one / max(sampling.temperature, 1e-5) for one in logits]
    if sampling.top_k:
        least = sorted(scaled, reverse=True)[min(sampling.top_k, len(scaled)) - 1]
        scaled = [one if one >= least else -math.inf for one in scaled]

    def softmax(values: list[float]) -> list[float]:
        weights = [math.exp(one - max(values)) for one in values]
        return [one / sum(weights) for one in weights]

    shares, total = softmax(scaled), 0.0
    if sampling.top_p < 1:
        for place in sorted(range(len(shares)), key=lambda i: -shares[i]):
            if total > sampling.top_p:
                scaled[place] = -math.inf
            total += shares[place]
    shares = softmax(scaled)
    shares = [one if one >= sampling.min_p * max(shares) else 0.0 for one in shares]
    return [one / sum(shares) for one in shares]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.7, top_k=5),
        Sampling(1.3, top_p=0.6),
        Sampling(min_p=0.2),
        Sampling(0.9, top_k=8, top_p=0.8, min_p=0.1),
        Sampling(top_k=1),
        Sampling(top_k=1000),
    ],
)
def test_probabilities__equal_a_literal_twin(sampling: Sampling) -> None:
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    logits[0, :4] = logits[0, :4].max()  # ties
    expected = torch.tensor([literal(row, sampling) for row in logits.tolist()])
    torch.testing.assert_close(sampling.probabilities(logits), expected.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [(Sampling(), 7), (Sampling(0.8, top_k=5), 5), (Sampling(top_p=0.8), 3), (Sampling(min_p=0.2), 3)],
)
def test_draws__have_their_probabilities(sampling: Sampling, kept: int) -> None:
    count, logits = 20_000, torch.tensor([0.1, 2.0, -1.0, 1.5, 0.0, -3.0, 1.0])
    shares = sampling.probabilities(logits)
    seen = sampling.draw(logits.expand(count, -1), uniforms(0, [5], count, 1).flatten()).bincount(minlength=7)
    assert int((shares > 0).sum()) == kept and not seen[shares == 0].any()
    expected = shares[shares > 0] * count
    limit = [13.8, 16.3, 18.5, 20.5, 22.5][kept - 3]  # 99.9% of kept - 1 degrees of freedom
    assert float(((seen[shares > 0] - expected) ** 2 / expected).sum()) < limit


def test_draw_from__first_id_whose_sum_exceeds_the_uniform() -> None:
    weights = torch.tensor([0.5, 0.0, 0.5, 1.0]).expand(6, 4)  # they need not sum to 1
    noise = torch.tensor([0.0, 0.2499, 0.25, 0.4999, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw_from(weights, noise).tolist() == [0, 0, 2, 2, 3, 3]


@given(st.integers(0, 2**30), st.integers(0, 40), st.integers(0, 40))
def test_draw_from__never_an_id_of_weight_0(seed: int, before: int, after: int) -> None:
    kept = torch.rand(2, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 20 + 1e-300
    weights = torch.cat([torch.zeros(2, before), kept, torch.zeros(2, after)], -1)
    ids = draw_from(weights, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert bool((weights.gather(-1, ids[:, None]) > 0).all())


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_k=8, top_p=0.8, min_p=0.1)])
def test_draws__of_a_batch_equal_singles(sampling: Sampling) -> None:
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(3))
    noise = uniforms(0, range(9), 1, 1).flatten()
    together = sampling.draw(logits, noise)
    assert together.tolist() == [int(sampling.draw(logits[i : i + 1], noise[i : i + 1])) for i in range(9)]


def test_draws__never_fall_on_what_is_impossible() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(3, -1)
    noise = torch.tensor([0.0, math.nextafter(1.0, 0.0), 0.5], dtype=torch.float64)
    allowed = torch.tensor([False, True, True, False])
    assert Sampling().draw(logits, noise, allowed).tolist() == [1, 2, 2]
    each = torch.tensor([[True, False, False, False], [False, False, False, True], [False, True, False, False]])
    assert Sampling().draw(logits, noise, each).tolist() == [0, 3, 1]
    assert Sampling(0.0).draw(torch.tensor([[1.0, 3.0, 3.0]]), noise[:1]).tolist() == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_draws__from_logits_that_are_not_finite_are_refused(value: float) -> None:
    logits = torch.zeros(2, 3)
    logits[1, 2] = value
    for sampling in (Sampling(), Sampling(0.0)):
        with pytest.raises(QLIPError, match="not finite"):
            sampling.draw(logits, torch.zeros(2, dtype=torch.float64))
    with pytest.raises(QLIPError, match="no value is allowed"):
        Sampling().draw(torch.zeros(1, 3), torch.zeros(1, dtype=torch.float64), torch.zeros(3, dtype=torch.bool))
    masked = torch.tensor([[-math.inf, 0.0, -math.inf]])
    assert Sampling().draw(masked, torch.zeros(1, dtype=torch.float64)).tolist() == [1]
    for sampling in (Sampling(), Sampling(0.0)):
        with pytest.raises(QLIPError, match="are -inf"):
            sampling.draw(masked, torch.zeros(1, dtype=torch.float64), torch.tensor([True, False, True]))
    assert Sampling().draw(torch.full((1, 3), 3e38), torch.zeros(1, dtype=torch.float64)).tolist() == [0]


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_k": 1.5},
     {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": math.nan}, {"min_p": 2.0}, {"temperature": True}],
)  # fmt: skip
def test_settings__out_of_range_are_one_line(settings: dict[str, Any]) -> None:
    with pytest.raises(QLIPError, match=next(iter(settings))):
        Sampling(**settings)


def test_noise__depends_on_its_key_alone() -> None:
    together = uniforms(7, [3, 0, 12], 6, 4)
    assert together.shape == (3, 6, 4) and together.dtype == torch.float64
    assert torch.equal(uniforms(7, [12], 6, 4)[0], together[2])
    assert torch.equal(uniforms(7, [3], 20, 4)[0, :6], together[0])
    for other in (uniforms(8, [3], 6, 4), uniforms(7, [4], 6, 4), uniforms(7, [3], 6, 4, round_=1)):
        assert not torch.isin(other, together).any()
    assert float(uniforms(1, [0], 1, 1)) == 0.3035680343067586


def test_noise__is_uniform_and_independent() -> None:
    noise = torch.stack([uniforms(0, range(200), 16, 4, round_=r) for r in range(2)]).numpy()
    counts = np.histogram(noise, 20, (0, 1))[0]
    expected = noise.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # 99.9% of 19 degrees of freedom
    flat = noise.reshape(2, -1)
    assert abs(np.corrcoef(flat)[0, 1]) < 4 / flat.shape[1] ** 0.5


@pytest.mark.parametrize(("seed", "number"), [(-1, 0), (0, -1), (1 << 64, 0), (0, 1 << 64), (0, 1.5)])
def test_noise__of_no_key_is_refused(seed: int, number: Any) -> None:
    with pytest.raises(QLIPError, match="integer"):
        uniforms(seed, [number], 1, 1)
