"""Training of the entropy coder's tables: they learn what is there to learn, and go on where they stopped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.tokens import Tables, TokenCodec, pack_batch
from qlip.tokens.entropy.train_tables import ContextNetwork, Fit, Neighbourhoods, bits_a_token

GRID, BITS = (4, 4), 4


def striped(count: int, seed: int) -> Tensor:
    """Bits with three rules and one coin: channel 1 repeats 0, 2 is the exclusive or of both neighbours' channel 0.

    Channel 0 is the same all over an image but for one bit in ten, channel 3 is chance. Bool (count, 16, 4).
    """
    generator = torch.Generator().manual_seed(seed)
    colour = torch.randint(0, 2, (count, 1, 1), generator=generator)
    first = colour ^ (torch.rand(count, *GRID, generator=generator) < 0.1).long()
    third = torch.zeros_like(first)
    third[:, :, 1:] = first[:, :, 1:] ^ first[:, :, :-1]
    chance = torch.randint(0, 2, (count, *GRID), generator=generator)
    return torch.stack([first, first, third, chance], dim=-1).flatten(1, 2).bool()


@pytest.fixture(scope="module")
def fit() -> Fit:
    torch.set_num_threads(1)
    fit = Fit(Neighbourhoods(striped(400, seed=0), GRID), steps=250, hidden=8, rows=1024)
    fit.run()
    return fit


def test_it_finds_rules_that_no_bit_shows_alone(fit: Fit) -> None:
    held_out = Neighbourhoods(striped(200, seed=1), GRID).draw(4000, torch.Generator().manual_seed(0))
    with torch.no_grad():
        spent = float(bits_a_token(fit.network, held_out))
    assert 1.2 < spent < 2.1  # a coin, and channel 0 at less than a bit; raw bits would be 4


def test_integers_lose_next_to_nothing_and_code_what_the_network_promised(fit: Fit) -> None:
    bits = striped(300, seed=2)
    codec = TokenCodec(Tables.from_network(fit.network))
    images = pack_batch(bits.long() @ torch.tensor([[8], [4], [2], [1]]), BITS)
    coded = codec.encode(images, GRID)
    assert codec.decode(coded, GRID) == images
    with torch.no_grad():
        promised = float(bits_a_token(fit.network, Neighbourhoods(bits, GRID).draw(20_000, torch.Generator())))
    spent = 8 * np.mean([len(one) for one in coded]) / 16
    assert promised - 0.05 < spent < promised + 0.6  # an image is whole bytes: half a byte over, on 16 tokens


def test_a_stopped_training_goes_on_to_the_same_weights() -> None:
    data = Neighbourhoods(striped(20, seed=3), GRID)
    whole, first, second = (Fit(data, steps=8, hidden=3, seed=5, rows=64) for _ in range(3))
    whole.run()
    first.run(until=5)
    second.load_state(first.state())
    heard: list[int] = []
    second.run(each=lambda step, spent: heard.append(step))
    assert heard == [6, 7, 8]
    assert all(torch.equal(a, b) for a, b in zip(whole.network.parameters(), second.network.parameters(), strict=True))


def test_no_bit_sees_what_is_coded_after_it() -> None:
    """Gradients of a token's log odds by the planes around it: only earlier ones of its order of coding."""
    network = ContextNetwork(BITS, 3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
        network.hidden_bias += 20  # no unit is off
    for colour in (0, 1):
        around = torch.ones(BITS, 1, 9, requires_grad=True)
        for channel, logit in enumerate(network(around, colour)[0]):
            (seen,) = torch.autograd.grad(logit, around, retain_graph=True)
            assert [bool(plane.any()) for plane in seen] == [plane < channel + colour for plane in range(BITS)]


def test_refuses_what_is_no_set_of_images() -> None:
    with pytest.raises(QLIPError, match=r"trained on \(M, 16, L\) bits, not \(0, 16, 4\)"):
        Neighbourhoods(torch.zeros(0, 16, 4, dtype=torch.bool), GRID)
    network = ContextNetwork(BITS, 3)
    with torch.no_grad():
        network.output += 1e9
    with pytest.raises(QLIPError, match="too large for integer tables"):
        Tables.from_network(network)
