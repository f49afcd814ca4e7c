"""Training of entropy tables on tokens: a small network, which `Tables.from_network` rounds to integers.

`NeighbourhoodSampler` draws tokens with the bits around them, `ContextNetwork` predicts their bits, and `TableTraining`
is the training loop with a state to resume from.

Shapes: M images of N = h * w tokens of L bits, H hidden units, R tokens per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.errors import QLIPError
from qlip.tokens.entropy.checkerboard import BLACK, EDGES, NEIGHBOURHOOD, WHITE

TOKENS_PER_STEP = 4096
"""Default batch size; its tokens are drawn from all images, since neighbours of one image are less diverse."""


class ContextNetwork(nn.Module):
    """Log odds of a token's bits from the bits that are coded before them; see `qlip.tokens.entropy.checkerboard`.

    The hidden sums of a token grow plane by plane, so that one hidden layer serves all bits (Larochelle and Murray,
    "The Neural Autoregressive Distribution Estimator", 2011). Each bit has a linear part of its own. Black and white
    tokens have separate weights.

    Args:
        num_bits: L.
        hidden: H.
    """

    known: Tensor

    def __init__(self, num_bits: int, hidden: int) -> None:
        super().__init__()
        self.num_bits, self.hidden = num_bits, hidden
        self.hidden_around = _normal(2, num_bits, NEIGHBOURHOOD, hidden, scale=0.15)  # colour, plane, place
        self.hidden_bias = _normal(2, num_bits, hidden, scale=0.1)
        self.output = _normal(2, num_bits, hidden, scale=0.05)
        self.linear_around = _normal(
            2, num_bits, NEIGHBOURHOOD, num_bits, scale=0
        )  # colour, plane, place, coded channel
        self.bias = _normal(2, num_bits, scale=0)
        ones = torch.ones(num_bits, num_bits)
        self.register_buffer("known", torch.stack([ones.triu(1), ones.triu(0)])[:, :, None], persistent=False)

    def forward(self, around: Tensor, colour: int) -> Tensor:
        """Compute log odds (R, L) of tokens of one colour from the planes around them, float (L, R, 9) of +1, -1, 0."""
        linear = (self.linear_around[colour] * self.known[colour]).flatten(0, 1)
        logits = around.transpose(0, 1).flatten(1) @ linear + self.bias[colour]  # (R, L)
        total, terms = torch.zeros(around.shape[1], self.hidden), []  # (R, H)
        for plane in range(self.num_bits):  # faster than all planes at once: small sums stay in the processor's cache
            if colour == BLACK:
                terms.append(F.relu(total + self.hidden_bias[BLACK, plane]) @ self.output[BLACK, plane])
            total = torch.addmm(total, around[plane], self.hidden_around[colour, plane])
            if colour == WHITE:
                terms.append(F.relu(total + self.hidden_bias[WHITE, plane]) @ self.output[WHITE, plane])
        return logits + torch.stack(terms, dim=1)


def _normal(*shape: int, scale: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * scale)


class NeighbourhoodSampler:
    """Random tokens of a set of images, with the bits around them.

    Args:
        bits: bool (M, N, L).
        grid: (height, width).

    Raises:
        QLIPError: no image, or a grid that does not hold N tokens.
    """

    def __init__(self, bits: Tensor, grid: tuple[int, int]) -> None:
        height, width = grid
        if bits.ndim != 3 or not len(bits) or bits.shape[1] != height * width:
            raise QLIPError(f"tables are trained on (M, {height * width}, L) bits, not {tuple(bits.shape)}")
        self.num_images, self.num_bits, self.grid = len(bits), bits.shape[2], grid
        signs = bits.to(torch.int8).unflatten(1, grid) * 2 - 1
        self._padded = F.pad(signs, (0, 0, 1, 1, 1, 1)).flatten(0, 2)  # (M * (h + 2) * (w + 2), L)
        rows, columns = torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")
        self._offsets = (rows * (width + 2) + columns).flatten()

    def draw(self, count: int, generator: torch.Generator) -> list[tuple[int, Tensor, Tensor]]:
        """Draw ``count`` tokens, grouped by colour: (colour, planes (L, R, 9), bits (R, L)), float of +1, -1, 0.

        A colour without a drawn token is absent.
        """
        height, width = self.grid
        image, row, column = (
            torch.randint(0, high, (count,), generator=generator) for high in (self.num_images, height, width)
        )
        corner = (image * (height + 2) + row) * (width + 2) + column
        white = (row + column) % 2 == 1
        groups = ((BLACK, corner[~white]), (WHITE, corner[white]))
        return [(colour, *self._at(corners, colour)) for colour, corners in groups if len(corners)]

    def _at(self, corner: Tensor, colour: int) -> tuple[Tensor, Tensor]:
        """Gather planes (L, R, 9) and bits (R, L), given the upper left corners of the neighbourhoods, (R,)."""
        around = self._padded[corner[:, None] + self._offsets].permute(2, 0, 1).float()  # (L, R, 9)
        bits = around[:, :, NEIGHBOURHOOD // 2].t().contiguous()
        white = torch.zeros(NEIGHBOURHOOD, dtype=torch.bool)  # places that hold white tokens
        white[list(EDGES)] = True
        white = white if colour == BLACK else ~white
        one_plane_later = F.pad(around[:-1], (0, 0, 0, 0, 1, 0))
        return torch.where(white, one_plane_later, around), bits


def bits_per_token(network: ContextNetwork, drawn: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Compute the cross-entropy in bits per token: the mean code length of an ideal coder."""
    nats = [F.softplus(-bits * network(around, colour)).sum() for colour, around, bits in drawn]
    return torch.stack(nats).sum() / (sum(len(bits) for _, _, bits in drawn) * math.log(2))


class TableTraining:
    """Training loop that can be resumed; equal data, seed and steps give equal networks.

    Args:
        data: tokens to train on.
        steps: total number of steps.
        hidden: H.
        seed: of the initial weights and of the draws.
        learning_rate: initial rate of Adam; it decays linearly to 0.
        rows: R, tokens per step.
    """

    def __init__(
        self,
        data: NeighbourhoodSampler,
        steps: int,
        hidden: int = 32,
        seed: int = 0,
        learning_rate: float = 0.01,
        tokens_per_step: int = TOKENS_PER_STEP,
    ) -> None:
        self.data, self.steps, self.step = data, steps, 0
        self._rate, self._tokens_per_step = learning_rate, tokens_per_step
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = ContextNetwork(data.num_bits, hidden)
        self._optimizer = torch.optim.Adam(self.network.parameters(), lr=learning_rate)
        self._generator = torch.Generator().manual_seed(seed)

    def run(self, until: int | None = None, on_step: Callable[[int, float], None] = lambda step, bits: None) -> None:
        """Train up to a step, by default the last.

        Args:
            until: number of steps to have done.
            on_step: called after each step with its number and its bits per token.
        """
        while self.step < (self.steps if until is None else min(until, self.steps)):
            for group in self._optimizer.param_groups:
                group["lr"] = self._rate * (1 - self.step / self.steps)
            loss = bits_per_token(self.network, self.data.draw(self._tokens_per_step, self._generator))
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            self.step += 1
            on_step(self.step, loss.item())

    def state(self) -> dict[str, Tensor]:
        """Return the state to resume from, as named tensors."""
        moments = self._optimizer.state_dict()["state"]
        return {
            "step": torch.tensor(self.step),
            "generator": self._generator.get_state(),
            **{f"network/{name}": one for name, one in self.network.state_dict().items()},
            **{f"optimizer/{at}/{name}": one for at, some in moments.items() for name, one in some.items()},
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.step = int(state["step"])
        self._generator.set_state(state["generator"])
        prefix = "network/"
        self.network.load_state_dict({n.removeprefix(prefix): one for n, one in state.items() if n.startswith(prefix)})
        moments: dict[int, dict[str, Tensor]] = {}
        for name, one in state.items():
            if name.startswith("optimizer/"):
                _, parameter, moment = name.split("/")
                moments.setdefault(int(parameter), {})[moment] = one
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": moments})
