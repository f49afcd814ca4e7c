from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlip import QLIPError
from qlip.training.optim.ema import EMA


class Network(nn.Module):
    """Weights that train, some that do not, a buffer, and a count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trained, self.frozen = nn.Linear(3, 4), nn.Linear(4, 2)
        self.frozen.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.trained(x)) + self.seen


def move(network: Network, seed: int) -> None:
    """What a training step does to weights and buffers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.trained.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)
        network.seen += 1


def test_averages_against_numpy() -> None:
    network = Network()
    ema = EMA(network, 0.8)
    expected = {f"trained.{n}": p.detach().numpy().copy() for n, p in network.trained.named_parameters()}
    for step in range(50):
        move(network, step)
        ema.update()
        decay = min(0.8, (1 + step) / (10 + step))
        for name, parameter in network.trained.named_parameters():
            old = expected[f"trained.{name}"]
            expected[f"trained.{name}"] = decay * old + (1 - decay) * parameter.detach().numpy()
    weights = ema.weights()
    assert weights.keys() == network.state_dict().keys()
    for name, value in expected.items():
        np.testing.assert_allclose(weights[name].numpy(), value, rtol=1e-5, atol=1e-6)
    assert torch.equal(weights["seen"], torch.full((2,), 50.0))
    assert weights["frozen.weight"].data_ptr() == network.frozen.weight.data_ptr()  # not kept twice
    assert ema.state().keys() == {"trained.weight", "trained.bias", "updates"}


def test_weights_come_back_bit_by_bit() -> None:
    network = Network()
    ema = EMA(network, 0.9)
    move(network, 0)
    ema.update()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    averages = {name: value.clone() for name, value in ema.weights().items()}
    with pytest.raises(KeyboardInterrupt), ema.applied():
        for name, value in network.state_dict().items():
            assert torch.equal(value, averages[name])
        raise KeyboardInterrupt
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    for name, value in ema.weights().items():
        assert torch.equal(value, averages[name])


def test_it_goes_on_from_its_state() -> None:
    whole, stopped = Network(), Network()
    one, other = EMA(whole, 0.99), EMA(stopped, 0.99)
    for step in range(12):
        for network, ema in ((whole, one), (stopped, other)):
            move(network, step)
            ema.update()
        if step == 5:
            saved = {name: value.clone() for name, value in other.state().items()}
            other = EMA(stopped, 0.99)
            other.load(saved)
    for name, value in one.weights().items():
        assert torch.equal(value, other.weights()[name])
    assert other.updates == 12


def test_a_state_of_other_parts_is_refused() -> None:
    ema = EMA(Network(), 0.9)
    state = ema.state()
    with pytest.raises(QLIPError, match="'trained.bias' is missing"):
        ema.load({name: value for name, value in state.items() if name != "trained.bias"})
    with pytest.raises(QLIPError, match="'frozen.bias' is not in the model's average"):
        ema.load({**state, "frozen.bias": torch.zeros(2)})
