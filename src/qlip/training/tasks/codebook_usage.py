"""Use of the codes: dead bits and codes that are never chosen, over a window of steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qlip.errors import QLIPError
from qlip.training.parallel.collectives import sum_over_ranks

MAX_HISTOGRAM_BITS = 16
"""Groups of more bits have more codes than a window has tokens; their use says nothing."""

DEAD_BITS = 0.05
"""A bit whose marginal entropy is below this many bits is dead: 99.4% of tokens agree on it."""


class UsageMonitor(nn.Module):
    """Counts of bits and of group codes since the last summary.

    Its buffers are those of the global batch, equal on all ranks, so whichever rank saves them saves the window, and
    a run may go on from there with another number of ranks. They are part of the state that a run saves.

    Args:
        num_bits: bits a token, L.
        group_size: bits a group, G, a divisor of L; a token is K = L / G groups.

    Raises:
        QLIPError: ``group_size`` does not divide ``num_bits``.
    """

    tokens: Tensor
    ones: Tensor
    histogram: Tensor | None

    def __init__(self, num_bits: int, group_size: int) -> None:
        super().__init__()
        if group_size < 1 or num_bits % group_size:
            raise QLIPError(f"group_size {group_size} does not divide num_bits {num_bits}; give one of its divisors")
        self.num_bits, self.group_size, self.num_groups = num_bits, group_size, num_bits // group_size
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ones", torch.zeros(num_bits, dtype=torch.int64))
        countable = group_size <= MAX_HISTOGRAM_BITS
        shape = (self.num_groups, 2**group_size)
        self.register_buffer("histogram", torch.zeros(shape, dtype=torch.int64) if countable else None)

    @torch.no_grad()
    def update(self, indices: Tensor) -> None:
        """Count a batch; all ranks call it, the same number of times, each with its own tokens (B may differ).

        Args:
            indices: (B, N, K) int64 in [0, 2^G).

        Raises:
            QLIPError: not int64, or not K groups a token.
        """
        if indices.dtype != torch.int64 or indices.shape[-1] != self.num_groups:
            raise QLIPError(
                f"indices must be int64 of {self.num_groups} groups a token, got {indices.dtype} {tuple(indices.shape)}"
            )
        groups = indices.reshape(-1, self.num_groups)  # (T, K)
        shifts = torch.arange(self.group_size - 1, -1, -1, device=indices.device)
        counts = [self.tokens.new_full((1,), len(groups))]
        counts.append(((groups.unsqueeze(-1) >> shifts) & 1).sum(0).flatten())
        if self.histogram is not None:
            places = groups + torch.arange(self.num_groups, device=indices.device) * 2**self.group_size
            codes = torch.zeros_like(self.histogram).flatten()
            counts.append(codes.scatter_add_(0, places.flatten(), torch.ones_like(places).flatten()))
        # ranks add up here rather than in the summary, for a window is saved halfway through
        total = sum_over_ranks(torch.cat(counts))
        self.tokens += total[0]
        self.ones += total[1 : 1 + self.num_bits]
        if self.histogram is not None:
            self.histogram += total[1 + self.num_bits :].view_as(self.histogram)

    @torch.no_grad()
    def summary(self) -> dict[str, Tensor]:
        """Counts since the last call; starts a new window.

        Returns:
            Scalars float32, the same on all ranks; nothing where nothing was counted.

            - ``bits_dead``: number of bits whose marginal entropy is below 0.05 bits;
            - ``bit_entropy_min``, ``bit_entropy_mean``: over bits, in bits, 1 at most;
            - with groups of at most 16 bits, ``group_perplexity``: the mean over groups of exp(entropy), as a share of
              2^G, and ``codes_used``: the share of the K 2^G group codes that occurred. Both are at most
              (tokens in the window) / 2^G.
        """
        if not self.tokens:
            return {}
        shares = self.ones.double() / self.tokens
        entropies = (torch.special.entr(shares) + torch.special.entr(1 - shares)) / math.log(2)
        found = {
            "bits_dead": (entropies < DEAD_BITS).sum(),
            "bit_entropy_min": entropies.min(),
            "bit_entropy_mean": entropies.mean(),
        }
        if self.histogram is not None:
            nats = torch.special.entr(self.histogram.double() / self.tokens).sum(1)
            found["group_perplexity"] = nats.exp().mean() / 2**self.group_size
            found["codes_used"] = (self.histogram > 0).double().mean()
        for counts in self.buffers():
            counts.zero_()
        return {name: value.float() for name, value in found.items()}
