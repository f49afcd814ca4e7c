"""Training of the entropy coder's tables: it learns known dependencies, resumes exactly, and sees no later bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.tokens import Tables, TokenCodec, pack_batch
from qlip.tokens.entropy.train_tables import ContextNetwork, NeighbourhoodSampler, TableTraining, bits_per_token

GRID, BITS = (4, 4), 4


def striped(count: int, seed: int) -> Tensor:
    """Make bits, bool (count, 16, 4), with known dependencies between them.

    Channel 0 is constant over an image except for one bit in ten. Channel 1 equals channel 0. Channel 2 is the
    exclusive or of channel 0 of the token and of its left neighbour. Channel 3 is random.
    """
    generator = torch.Generator().manual_seed(seed)
    colour = torch.randint(0, 2, (count, 1, 1), generator=generator)
    first = colour ^ (torch.rand(count, *GRID, generator=generator) < 0.1).long()
    third = torch.zeros_like(first)
    third[:, :, 1:] = first[:, :, 1:] ^ first[:, :, :-1]
    chance = torch.randint(0, 2, (count, *GRID), generator=generator)
    return torch.stack([first, first, third, chance], dim=-1).flatten(1, 2).bool()


@pytest.fixture(scope="module")
def trained() -> TableTraining:
    torch.set_num_threads(1)
    training = TableTraining(
        NeighbourhoodSampler(striped(400, seed=0), GRID), steps=250, hidden=8, tokens_per_step=1024
    )
    training.run()
    return training


def test_table_training__learns_dependencies_between_bits(trained: TableTraining) -> None:
    held_out = NeighbourhoodSampler(striped(200, seed=1), GRID).draw(4000, torch.Generator().manual_seed(0))
    with torch.no_grad():
        bits = float(bits_per_token(trained.network, held_out))
    assert 1.2 < bits < 2.1  # one random bit, and channel 0 at less than a bit; raw: 4


def test_tables__integers_code_at_the_networks_cross_entropy(trained: TableTraining) -> None:
    bits = striped(300, seed=2)
    codec = TokenCodec(Tables.from_network(trained.network))
    images = pack_batch(bits.long() @ torch.tensor([[8], [4], [2], [1]]), BITS)
    coded = codec.encode(images, GRID)
    assert codec.decode(coded, GRID) == images
    with torch.no_grad():
        promised = float(
            bits_per_token(trained.network, NeighbourhoodSampler(bits, GRID).draw(20_000, torch.Generator()))
        )
    bits = 8 * np.mean([len(one) for one in coded]) / 16
    assert promised - 0.05 < bits < promised + 0.6  # an image is whole bytes: half a byte over, on 16 tokens


def test_table_training__resumed_gives_the_same_weights() -> None:
    data = NeighbourhoodSampler(striped(20, seed=3), GRID)
    whole, first, second = (TableTraining(data, steps=8, hidden=3, seed=5, tokens_per_step=64) for _ in range(3))
    whole.run()
    first.run(until=5)
    second.load_state(first.state())
    steps: list[int] = []
    second.run(on_step=lambda step, bits: steps.append(step))
    assert steps == [6, 7, 8]
    assert all(torch.equal(a, b) for a, b in zip(whole.network.parameters(), second.network.parameters(), strict=True))


def test_context_network__no_bit_depends_on_later_ones() -> None:
    """Check gradients of a token's log odds: only planes that are coded earlier have any."""
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


def test_table_training__invalid_input_is_refused() -> None:
    with pytest.raises(QLIPError, match=r"trained on \(M, 16, L\) bits, not \(0, 16, 4\)"):
        NeighbourhoodSampler(torch.zeros(0, 16, 4, dtype=torch.bool), GRID)
    network = ContextNetwork(BITS, 3)
    with torch.no_grad():
        network.output += 1e9
    with pytest.raises(QLIPError, match="too large for integer tables"):
        Tables.from_network(network)
