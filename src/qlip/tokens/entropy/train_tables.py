"""Training of the tables of `qlip.tokens.entropy.tables` on tokens: a small network, rounded to integers afterwards.

Shapes: M images of N = h * w tokens of L bits, H hidden units, R tokens per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.errors import QLIPError
from qlip.tokens.entropy.checkerboard import AROUND, BLACK, SIDES, WHITE

ROWS = 4096
"""Tokens per step, drawn from all images: neighbours of one image would tell less."""


class ContextNetwork(nn.Module):
    """A bit's log odds from the bits around it; see `qlip.tokens.entropy.checkerboard` for what it may see.

    The hidden sums of a token grow plane by plane, so that one layer serves all bits (Larochelle and Murray, "The
    Neural Autoregressive Distribution Estimator", 2011); beside it each bit has a linear part of its own. Black and
    white tokens have weights of their own.

    Args:
        num_bits: L.
        hidden: H.
    """

    known: Tensor

    def __init__(self, num_bits: int, hidden: int) -> None:
        super().__init__()
        self.num_bits, self.hidden = num_bits, hidden
        self.hidden_around = _normal(2, num_bits, AROUND, hidden, scale=0.15)  # colour, plane, place
        self.hidden_bias = _normal(2, num_bits, hidden, scale=0.1)
        self.output = _normal(2, num_bits, hidden, scale=0.05)
        self.linear_around = _normal(2, num_bits, AROUND, num_bits, scale=0)  # colour, plane, place, coded channel
        self.bias = _normal(2, num_bits, scale=0)
        ones = torch.ones(num_bits, num_bits)
        self.register_buffer("known", torch.stack([ones.triu(1), ones.triu(0)])[:, :, None], persistent=False)

    def forward(self, around: Tensor, colour: int) -> Tensor:
        """Log odds (R, L) of tokens of one colour from the planes around them, float (L, R, 9) of +1, -1, 0."""
        linear = (self.linear_around[colour] * self.known[colour]).flatten(0, 1)
        logits = around.transpose(0, 1).flatten(1) @ linear + self.bias[colour]
        total, parts = torch.zeros(around.shape[1], self.hidden), []
        for plane in range(self.num_bits):  # small sums that stay in the cache: faster than all planes at once
            if colour == BLACK:
                parts.append(F.relu(total + self.hidden_bias[BLACK, plane]) @ self.output[BLACK, plane])
            total = torch.addmm(total, around[plane], self.hidden_around[colour, plane])
            if colour == WHITE:
                parts.append(F.relu(total + self.hidden_bias[WHITE, plane]) @ self.output[WHITE, plane])
        return logits + torch.stack(parts, dim=1)


def _normal(*shape: int, scale: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * scale)


class Neighbourhoods:
    """Draws tokens with what is around them.

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
        """``count`` tokens by colour: (colour, planes (L, R, 9), their bits (R, L)), float of +1, -1, 0.

        A colour of which none was drawn is absent.
        """
        height, width = self.grid
        image, row, column = (
            torch.randint(0, high, (count,), generator=generator) for high in (self.num_images, height, width)
        )
        corner = (image * (height + 2) + row) * (width + 2) + column
        white = (row + column) % 2 == 1
        pairs = ((BLACK, corner[~white]), (WHITE, corner[white]))
        return [(colour, *self._at(some, colour)) for colour, some in pairs if len(some)]

    def _at(self, corner: Tensor, colour: int) -> tuple[Tensor, Tensor]:
        around = self._padded[corner[:, None] + self._offsets].permute(2, 0, 1).float()  # channels first
        bits = around[:, :, AROUND // 2].t().contiguous()
        behind = torch.zeros(AROUND, dtype=torch.bool)  # which of the places hold white tokens
        behind[list(SIDES)] = True
        behind = behind if colour == BLACK else ~behind
        late = F.pad(around[:-1], (0, 0, 0, 0, 1, 0))
        return torch.where(behind, late, around), bits


def bits_a_token(network: ContextNetwork, drawn: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Bits that an ideal coder would need, the mean over the tokens drawn."""
    spent = [F.softplus(-bits * network(around, colour)).sum() for colour, around, bits in drawn]
    return torch.stack(spent).sum() / (sum(len(bits) for _, _, bits in drawn) * math.log(2))


class Fit:
    """Training that can be stopped and gone on with; the same data, seed and steps give the same network.

    Args:
        data: tokens to learn from.
        steps: in all.
        hidden: H.
        seed: of the first weights and of what is drawn.
        learning_rate: of Adam, falling to nothing along a straight line.
        rows: R, tokens per step.
    """

    def __init__(
        self,
        data: Neighbourhoods,
        steps: int,
        hidden: int = 32,
        seed: int = 0,
        learning_rate: float = 0.01,
        rows: int = ROWS,
    ) -> None:
        self.data, self.steps, self.step, self._rate, self._rows = data, steps, 0, learning_rate, rows
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = ContextNetwork(data.num_bits, hidden)
        self._optimizer = torch.optim.Adam(self.network.parameters(), lr=learning_rate)
        self._generator = torch.Generator().manual_seed(seed)

    def run(self, until: int | None = None, each: Callable[[int, float], None] = lambda step, spent: None) -> None:
        """Train up to a step, the last by default; ``each`` hears the step and the bits per token after every one."""
        while self.step < (self.steps if until is None else min(until, self.steps)):
            for group in self._optimizer.param_groups:
                group["lr"] = self._rate * (1 - self.step / self.steps)
            spent = bits_a_token(self.network, self.data.draw(self._rows, self._generator))
            self._optimizer.zero_grad()
            spent.backward()
            self._optimizer.step()
            self.step += 1
            each(self.step, spent.item())

    def state(self) -> dict[str, Tensor]:
        """All that going on needs, as named tensors."""
        moments = self._optimizer.state_dict()["state"]
        return {
            "step": torch.tensor(self.step),
            "generator": self._generator.get_state(),
            **{f"network/{name}": one for name, one in self.network.state_dict().items()},
            **{f"optimizer/{at}/{name}": one for at, some in moments.items() for name, one in some.items()},
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.step = int(state["step"])
        self._generator.set_state(state["generator"])
        begins = "network/"
        self.network.load_state_dict({n.removeprefix(begins): one for n, one in state.items() if n.startswith(begins)})
        moments: dict[int, dict[str, Tensor]] = {}
        for name, one in state.items():
            if name.startswith("optimizer/"):
                _, at, what = name.split("/")
                moments.setdefault(int(at), {})[what] = one
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": moments})
