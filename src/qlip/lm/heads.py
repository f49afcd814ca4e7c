"""Heads: how the K groups of a token are modelled, given the transformer's state.

- `FlatHead`: a step per group; the transformer sees each group before the next.
- `ParallelHead`: a softmax per group, independent of each other.
- `ChainHead`: a hidden layer per group, which reads the state and the token's earlier groups.
- `DepthHead`: a small transformer over the token's groups, in the shape of transformers' Csm.
- `BitsHead`: independent bits; the baseline.
- `MaskedBitsHead`: a few rounds, each of which predicts a fixed share of the bits from those of earlier rounds.

All are proper distributions over tokens, so their likelihoods compare in bits per image. A head's last layer starts at
zero: the first loss is K ln V nats per token exactly.

Shapes: B images, S steps, D width, K groups per step, V values per group, L = K G bits per token, R rows of a draw: B,
or 2B with guidance, the conditional rows first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.lm.config import DecoderConfig
from qlip.lm.cross_entropy import linear_cross_entropy
from qlip.lm.transformer import DecoderBlock, RMSNorm
from qlip.modeling.indices import bits_to_indices, indices_to_bits


class Pick(Protocol):
    """Draws ids from logits: mixes the branches of guidance, then applies temperature, filters and noise."""

    def __call__(self, logits: Tensor, first: int) -> Tensor:
        """Draw M values per image.

        Args:
            logits: (R, M, V) floating.
            first: number of the first of the M draws among the token's ``num_draws``, which keys the noise.

        Returns:
            (B, M) int64.
        """
        ...


class Head(nn.Module):
    """Base class of heads.

    Attributes:
        num_draws: draws per step, each with noise of its own.
    """

    num_draws: int

    def nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihoods of the groups, each given what this head reads before it.

        Args:
            hidden: (B, S, D) states of the transformer, after its last norm.
            targets: (B, S, K) int64.

        Returns:
            (B, S, K) float32 nats.
        """
        raise NotImplementedError

    def draw(self, hidden: Tensor, pick: Pick, step: int) -> Tensor:
        """Draw the groups of one step.

        Args:
            hidden: (R, D).
            pick: draws from logits.
            step: number of the step in the image.

        Returns:
            (B, K) int64.
        """
        raise NotImplementedError

    def last_layers(self) -> Iterator[Tensor]:
        """Weights that start at zero."""
        raise NotImplementedError


class FlatHead(Head):
    """A softmax per step over the values of the step's group: groups take turns.

    Attributes:
        by_group: packed layers of the groups' rows, which then make a step's logits (:mod:`qlip.lm.packed`).
    """

    num_draws = 1

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.groups, self.values = config.num_groups, config.codebook_size
        self.output = nn.Linear(config.hidden_size, self.groups * self.values, bias=False)
        self.by_group: nn.ModuleList | None = None

    def group_weight(self, group: int) -> Tensor:
        """Rows of a group, (V, D)."""
        weights: Tensor = self.output.weight.unflatten(0, (self.groups, -1))
        return weights[group]

    def nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See :class:`Head`; K is 1 here."""
        found = [
            linear_cross_entropy(hidden[:, k :: self.groups].flatten(0, 1), self.group_weight(k), one.flatten())
            for k, one in enumerate(targets[..., 0].unflatten(1, (-1, self.groups)).unbind(2))
        ]
        return torch.stack(found, 1).reshape(targets.shape)

    def draw(self, hidden: Tensor, pick: Pick, step: int) -> Tensor:
        """See :class:`Head`."""
        return pick(self.step_logits(hidden, step)[:, None], 0)

    def step_logits(self, hidden: Tensor, step: int) -> Tensor:
        """Logits (R, V) of a step from the states (R, D)."""
        if self.groups == 1:
            return self.output(hidden)  # type: ignore[no-any-return]
        if self.by_group is not None:
            return self.by_group[step % self.groups](hidden)  # type: ignore[no-any-return]
        return F.linear(hidden, self.group_weight(step % self.groups))

    def last_layers(self) -> Iterator[Tensor]:
        """See :class:`Head`."""
        yield self.output.weight


class ParallelHead(Head):
    """A softmax per group, independent given the state."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.groups, self.values = config.num_groups, config.codebook_size
        self.num_draws = self.groups
        self.output = nn.Linear(config.hidden_size, self.groups * self.values, bias=False)

    def nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See :class:`Head`."""
        weights = self.output.weight.unflatten(0, (self.groups, -1))  # (K, V, D)
        rows = hidden.flatten(0, 1)
        found = [linear_cross_entropy(rows, weights[k], targets[..., k].flatten()) for k in range(self.groups)]
        return torch.stack(found, -1).reshape(targets.shape)

    def draw(self, hidden: Tensor, pick: Pick, step: int) -> Tensor:
        """See :class:`Head`."""
        return pick(self.output(hidden).unflatten(-1, (self.groups, -1)), 0)

    def last_layers(self) -> Iterator[Tensor]:
        """See :class:`Head`."""
        yield self.output.weight


class ChainHead(Head):
    """output_k(silu(hidden_k(norm_k(state + sum of embeddings of groups before k))))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.head_size
        self.groups, self.values = config.num_groups, config.codebook_size
        self.num_draws = self.groups
        self.embeddings = nn.ModuleList(nn.Embedding(self.values, width) for _ in range(self.groups - 1))
        self.norms = nn.ModuleList(RMSNorm(width, config.rms_norm_eps) for _ in range(self.groups))
        self.hidden = nn.ModuleList(nn.Linear(width, inner, bias=False) for _ in range(self.groups))
        self.output = nn.ModuleList(nn.Linear(inner, self.values, bias=False) for _ in range(self.groups))

    def _inner(self, state: Tensor, group: int) -> Tensor:
        return F.silu(self.hidden[group](self.norms[group](state)))

    def nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See :class:`Head`."""
        state, found = hidden.flatten(0, 1), list[Tensor]()
        for group, output in enumerate(self.output):
            target = targets[..., group].flatten()
            found.append(linear_cross_entropy(self._inner(state, group), cast(Tensor, output.weight), target))
            if group < len(self.embeddings):
                state = state + self.embeddings[group](target)
        return torch.stack(found, -1).reshape(targets.shape)

    def draw(self, hidden: Tensor, pick: Pick, step: int) -> Tensor:
        """See :class:`Head`."""
        drawn = list[Tensor]()
        for group, output in enumerate(self.output):
            drawn.append(pick(output(self._inner(hidden, group))[:, None], group))
            if group < len(self.embeddings):
                hidden = hidden + self.embeddings[group](both_branches(drawn[-1][:, 0], hidden))
        return torch.cat(drawn, 1)

    def last_layers(self) -> Iterator[Tensor]:
        """See :class:`Head`."""
        for output in self.output:
            yield cast(Tensor, output.weight)


class DepthHead(Head):
    """A transformer over [state, embedding of group 0, ..., embedding of group K - 2], as Csm's depth decoder.

    Group 0 is predicted from the state by a linear layer; group k > 0 from position k of the depth transformer, by an
    output matrix of its own. Inputs have the decoder's width and go through a projection; positions 0 to K - 1 are
    rotary.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, inner, heads = config.hidden_size, config.head_size, config.head.num_attention_heads
        self.groups, self.values = config.num_groups, config.codebook_size
        self.num_draws = self.groups
        self.head_width, self.base = inner // heads, config.rotary_base
        self.output = nn.Linear(width, self.values, bias=False)
        self.embedding = nn.Embedding(self.groups * self.values, width)
        self.projector = nn.Linear(width, inner, bias=False)
        self.layers = nn.ModuleList(
            DecoderBlock(
                width=inner,
                inner=depth_ffn_width(inner),
                heads=heads,
                kv_heads=heads,
                head_width=inner // heads,
                eps=config.rms_norm_eps,
            )
            for _ in range(config.head.num_layers)
        )
        self.norm = RMSNorm(inner, config.rms_norm_eps)
        self.outputs = nn.Parameter(torch.empty(self.groups - 1, self.values, inner))

    def _table(self, device: torch.device) -> Tensor:
        pairs = self.head_width // 2
        turns = self.base ** (-torch.arange(pairs, device=device, dtype=torch.float32) / pairs)
        angles = torch.outer(torch.arange(self.groups, device=device, dtype=torch.float32), turns)
        return torch.stack([angles.cos(), angles.sin()], -1)  # (K, d / 2, 2)

    def _run(self, state: Tensor, earlier: Tensor) -> Tensor:
        """States (M, 1 + j, width inside) from the decoder's state (M, D) and the first j groups (M, j)."""
        offsets = torch.arange(earlier.shape[1], device=earlier.device) * self.values
        x = self.projector(torch.cat([state[:, None], self.embedding(earlier + offsets)], 1))
        table = self._table(x.device)[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, table)
        return self.norm(x)  # type: ignore[no-any-return]

    def nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See :class:`Head`."""
        state, rows = hidden.flatten(0, 1), targets.flatten(0, 1)  # (M, D), (M, K)
        found = [linear_cross_entropy(state, self.output.weight, rows[:, 0])]
        if self.groups > 1:
            inner = self._run(state, rows[:, :-1])  # (M, K, width inside)
            found += [linear_cross_entropy(inner[:, k], self.outputs[k - 1], rows[:, k]) for k in range(1, self.groups)]
        return torch.stack(found, -1).reshape(targets.shape)

    def draw(self, hidden: Tensor, pick: Pick, step: int) -> Tensor:
        """See :class:`Head`."""
        drawn = pick(self.output(hidden)[:, None], 0)
        for group in range(1, self.groups):
            inner = self._run(hidden, both_branches(drawn, hidden))[:, -1]
            drawn = torch.cat([drawn, pick(F.linear(inner, self.outputs[group - 1])[:, None], group)], 1)
        return drawn

    def last_layers(self) -> Iterator[Tensor]:
        """See :class:`Head`."""
        yield self.output.weight
        yield self.outputs


class BitsHead(Head):
    """Independent bits (arXiv 2412.04431); a group's likelihood is the product of its bits'."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.groups, self.bits = config.num_groups, config.group_size
        self.num_draws = self.groups * self.bits
        self.output = nn.Linear(config.hidden_size, self.num_draws, bias=False)

    def nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See :class:`Head`."""
        bits = indices_to_bits(targets, self.bits)  # (B, S, L)
        nats: Tensor = bit_nats(self.output(hidden), bits).unflatten(-1, (self.groups, -1))
        return nats.sum(-1)

    def draw(self, hidden: Tensor, pick: Pick, step: int) -> Tensor:
        """See :class:`Head`."""
        return bits_to_indices(pick(two_way(self.output(hidden)), 0), self.bits)

    def last_layers(self) -> Iterator[Tensor]:
        """See :class:`Head`."""
        yield self.output.weight


class MaskedBitsHead(Head):
    """Bits unmasked in a fixed number of rounds, after BAR (arXiv 2602.09024).

    Round r predicts bits r, r + rounds, r + 2 rounds, ... of the token, independently of each other, from the state and
    the bits of earlier rounds, which enter as -1 and 1, masked ones as 0. The order is fixed, so the product over
    rounds is the exact likelihood of what `draw` samples. # ours: BAR trains random masks and unmasks by confidence.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.head_size
        self.groups, self.bits, self.rounds = config.num_groups, config.group_size, config.head.rounds
        self.num_draws = self.groups * self.bits
        self.state = nn.Linear(width, inner, bias=False)
        self.known = nn.Linear(self.num_draws, inner, bias=False)
        self.round = nn.Embedding(self.rounds, inner)
        self.hidden = nn.Linear(inner, inner, bias=False)
        self.norm = RMSNorm(inner, config.rms_norm_eps)
        self.output = nn.Linear(inner, self.num_draws, bias=False)

    def _logits(self, state: Tensor, known: Tensor, round_: int) -> Tensor:
        """Logits (..., L) of all bits from the projected state and the known bits (..., L), 0 where masked."""
        x = F.silu(state + self.known(known) + self.round.weight[round_])
        return self.output(self.norm(x + F.silu(self.hidden(x))))  # type: ignore[no-any-return]

    def nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See :class:`Head`."""
        bits = indices_to_bits(targets, self.bits)  # (B, S, L)
        signs = bits.to(hidden.dtype) * 2 - 1
        state = self.state(hidden)
        turn = torch.arange(self.num_draws, device=hidden.device) % self.rounds  # (L,), the round of each bit
        found = torch.zeros(bits.shape, dtype=torch.float32, device=hidden.device)
        for round_ in range(self.rounds):
            logits = self._logits(state, signs * (turn < round_), round_)
            found = found + bit_nats(logits, bits) * (turn == round_)
        nats: Tensor = found.unflatten(-1, (self.groups, -1))
        return nats.sum(-1)

    def draw(self, hidden: Tensor, pick: Pick, step: int) -> Tensor:
        """See :class:`Head`."""
        state = self.state(hidden)
        signs = state.new_zeros(len(hidden), self.num_draws)
        first = 0  # noise is keyed by the order of drawing: round by round
        for round_ in range(self.rounds):
            logits = self._logits(state, signs, round_)[:, round_ :: self.rounds]
            drawn = pick(two_way(logits), first)  # (B, bits of this round)
            signs[:, round_ :: self.rounds] = both_branches(drawn, hidden).to(signs.dtype) * 2 - 1
            first += logits.shape[1]
        bits = signs[: len(drawn)] > 0
        return bits_to_indices(bits, self.bits)

    def last_layers(self) -> Iterator[Tensor]:
        """See :class:`Head`."""
        yield self.output.weight


def build_head(config: DecoderConfig) -> Head:
    """The head of a configuration."""
    kinds = {
        "flat": FlatHead,
        "parallel": ParallelHead,
        "chain": ChainHead,
        "depth": DepthHead,
        "bits": BitsHead,
        "masked_bits": MaskedBitsHead,
    }
    return kinds[config.head.kind](config)


def depth_ffn_width(width: int) -> int:
    """Width of the SwiGLU inside the depth head: 8/3 of its width, rounded up to a multiple of 32."""
    return -(-8 * width // 3 // 32) * 32


def both_branches(drawn: Tensor, hidden: Tensor) -> Tensor:
    """Repeat what was drawn for B images for the R rows of a draw: both branches of guidance read the same prefix."""
    return drawn.repeat(len(hidden) // len(drawn), *[1] * (drawn.ndim - 1))


def bit_nats(logits: Tensor, bits: Tensor) -> Tensor:
    """Cross entropy of bits, float32 nats of the shape of ``bits``."""
    return F.binary_cross_entropy_with_logits(logits.float(), bits.float(), reduction="none")


def two_way(logits: Tensor) -> Tensor:
    """Logits of a bit as those of the two values 0 and 1: (..., M) to (..., M, 2)."""
    return torch.stack([torch.zeros_like(logits), logits], -1)
