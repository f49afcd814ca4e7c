"""Binary Spherical Quantization (arXiv 2406.07548) and its loss (QLIP eq. 1).

Shapes: B images, N tokens per image, T = B * N tokens, L bits per token, K groups of G bits, L = K * G.

The codebook is implicit: the 2^L corners of a hypercube on the unit sphere. The soft assignment of a latent to corners
is a softmax that factorises over bits, so a group's joint distribution over 2^G corners is an outer product of bit
probabilities. That gives both entropies without a (T, 2^G) table:

- per-sample entropy S: the sum of the bits' entropies;
- codebook entropy H of a group: the mean over tokens of an outer product of two half tables is one matrix product,
  (2^floor(G/2), T) times (T, 2^ceil(G/2)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.errors import QLIPError
from qlip.modeling.config import QuantizerConfig
from qlip.modeling.indices import bits_to_indices, indices_to_bits
from qlip.modeling.reduce import all_reduce_sum, global_count

Estimator = Literal["group", "bit"]

MAX_ENTROPY_BITS = 24
"""Largest group for the "group" estimator: its mean distribution has 2^G entries, too many to store or to estimate."""

EPSILON = 1e-8
"""Added inside the codebook entropy's logarithm, as published; it keeps the gradient finite where a mean underflows."""


@dataclass(frozen=True)
class LossWeights:
    """``beta * commitment + (gamma_0 * S - gamma_1 * H) / inv_temperature`` (eq. 1)."""

    beta: float = 0.0
    gamma_0: float = 1.0
    gamma_1: float = 1.0
    inv_temperature: float = 100.0


@dataclass(frozen=True)
class QuantizerLosses:
    """Scalars float32: eq. 1 and its terms, means over tokens; entropies in nats."""

    loss: Tensor
    persample_entropy: Tensor
    codebook_entropy: Tensor
    commitment: Tensor


@dataclass
class QuantizerStatistics:
    """Sums over tokens from which the loss is computed; they can be added over micro-batches and ranks.

    Attributes:
        persample: scalar float32, the sum over tokens of their entropies in nats.
        codebook: float32 sum over tokens of the soft assignment: (2, L) bit marginals for the "bit" estimator,
            (K, 2^floor(G/2), 2^ceil(G/2)) joint distributions of the groups for "group".
        commitment: scalar float32, the sum over tokens of the squared distance of latents to codes.
        tokens: number of tokens.
    """

    persample: Tensor
    codebook: Tensor
    commitment: Tensor
    tokens: int


@dataclass
class QuantizerOutput:
    """Output of a quantizer. Losses are means over the GLOBAL batch of tokens, computed on first access.

    Attributes:
        codes: (B, N, L) quantised latents, the input's dtype; the gradient is straight-through.
        indices: (B, N, K) int64.
        statistics: sums behind the losses, or None outside training.
        settings: weights of the loss's terms.
    """

    codes: Tensor
    indices: Tensor
    statistics: QuantizerStatistics | None = None
    settings: LossWeights = LossWeights()

    @cached_property
    def means(self) -> QuantizerLosses | None:
        """All losses at once, or None outside training. Collective: every rank must access it."""
        return None if self.statistics is None else quantizer_losses(self.statistics, self.settings)

    @property
    def loss(self) -> Tensor | None:
        """Scalar float32 (eq. 1), or None outside training."""
        return None if self.means is None else self.means.loss

    @property
    def persample_entropy(self) -> Tensor | None:
        """S, scalar float32 in nats per token, or None outside training."""
        return None if self.means is None else self.means.persample_entropy

    @property
    def codebook_entropy(self) -> Tensor | None:
        """H, scalar float32 in nats per token, or None outside training."""
        return None if self.means is None else self.means.codebook_entropy

    @property
    def commitment(self) -> Tensor | None:
        """Scalar float32, mean over tokens of the squared distance of latents to codes, or None outside training."""
        return None if self.means is None else self.means.commitment


class Quantizer(Protocol):
    """Interface between the model and a quantizer: latents to discrete codes and back."""

    num_bits: int
    group_size: int
    weights: LossWeights
    estimator: Estimator

    def __call__(self, latents: Tensor) -> QuantizerOutput:
        """(B, N, L) latents to codes, indices and, in training, the loss."""
        ...

    def indices_of(self, latents: Tensor) -> Tensor:
        """(B, N, L) latents to (B, N, K) int64 indices, without losses, in training too."""
        ...

    def codes_of(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, N, K) int64 indices to (B, N, L) codes of ``dtype``."""
        ...


class BinarySphericalQuantizer(nn.Module):
    """BSQ: the sign of every axis of the latent, scaled to the unit sphere. It has no parameters.

    Args:
        config: ``quantizer_cfg`` of the checkpoint. With ``l2_norm``, codes and the straight-through gradient are
            multiplied by 1/sqrt(L); the caller projects latents onto the sphere (``quantizer_l2_norm``).
    """

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.num_bits = config.embed_dim
        self.group_size = config.group_size
        self.scale = 1 / math.sqrt(config.embed_dim) if config.l2_norm else 1.0
        self.weights = LossWeights(config.beta, config.gamma_0, config.gamma_1, config.inv_temperature)
        # the published "analytical" computes both entropies from bits
        self.estimator: Estimator = "bit" if config.persample_entropy_compute == "analytical" else "group"

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantise, ``bit = latent > 0``.

        Args:
            latents: (B, N, L) floating.

        Returns:
            Codes and indices; in training also the statistics behind the losses.
        """
        bits = latents > 0  # (B, N, L)
        hard = torch.where(bits, self.scale, -self.scale).to(latents.dtype)
        # straight-through: adds an exact zero to the value, and to the gradient the latents' times the scale
        codes = hard + self.scale * (latents - latents.detach())
        statistics = self.statistics_of(latents, hard) if self.training else None
        return QuantizerOutput(codes, bits_to_indices(bits, self.group_size), statistics, self.weights)

    def statistics_of(self, latents: Tensor, hard: Tensor) -> QuantizerStatistics:
        """Sums over the tokens of (B, N, L) latents and their corners, in float32 even under autocast."""
        with torch.autocast(latents.device.type, enabled=False):
            flat = latents.float().flatten(0, -2)  # (T, L)
            persample, codebook = bsq_statistics(
                flat, self.group_size, self.weights.inv_temperature, self.scale, self.estimator
            )
            squared = (flat - hard.float().flatten(0, -2)).square().sum()
            return QuantizerStatistics(persample, codebook, squared, len(flat))

    def indices_of(self, latents: Tensor) -> Tensor:
        """(B, N, L) floating to (B, N, K) int64, ``bit = latent > 0``; no losses, hence no communication of ranks."""
        return bits_to_indices(latents > 0, self.group_size)

    def codes_of(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Codes of indices.

        Args:
            indices: (B, N, K) int64 in [0, 2^group_size).
            dtype: the codes' dtype.

        Returns:
            (B, N, L) corners, +-1/sqrt(L) (+-1 without ``l2_norm``).

        Raises:
            QLIPError: an index is out of range or not int64.
        """
        bits = indices_to_bits(indices, self.group_size)
        return torch.where(bits, self.scale, -self.scale).to(dtype)


def quantizer_losses(statistics: QuantizerStatistics, weights: LossWeights) -> QuantizerLosses:
    """The loss (eq. 1) and its terms, means over the tokens of ALL ranks, differentiable.

    Args:
        statistics: sums over this rank's tokens.
        weights: weights of the terms.
    """
    count = global_count(statistics.tokens, statistics.persample.device)
    scalars = all_reduce_sum(torch.stack((statistics.persample, statistics.commitment))) / count
    persample, commitment = scalars.unbind()
    return losses_of_means(persample, all_reduce_sum(statistics.codebook) / count, commitment, weights)


def losses_of_means(persample: Tensor, codebook: Tensor, commitment: Tensor, weights: LossWeights) -> QuantizerLosses:
    """The loss (eq. 1) and its terms from `QuantizerStatistics` divided by the number of tokens of all ranks."""
    entropy = codebook_entropy(codebook)
    entropies = weights.gamma_0 * persample - weights.gamma_1 * entropy
    loss = weights.beta * commitment + entropies / weights.inv_temperature
    return QuantizerLosses(loss, persample, entropy, commitment)


def bsq_entropies(
    latents: Tensor, group_size: int, inv_temperature: float, scale: float, estimator: Estimator = "group"
) -> tuple[Tensor, Tensor]:
    """Per-sample and codebook entropy of BSQ's soft assignment (eq. 1), means over the GLOBAL batch of tokens.

    A public shortcut for latents that are at hand; the model itself keeps :func:`bsq_statistics`. The arguments are
    those of :func:`bsq_statistics`.

    Returns:
        S and H, scalars in nats per token. S is equal for both estimators, since the soft assignment factorises.
    """
    persample, codebook = bsq_statistics(latents, group_size, inv_temperature, scale, estimator)
    statistics = QuantizerStatistics(persample, codebook, persample.new_zeros(()), len(latents))
    losses = quantizer_losses(statistics, LossWeights())
    return losses.persample_entropy, losses.codebook_entropy


def bsq_statistics(
    latents: Tensor, group_size: int, inv_temperature: float, scale: float, estimator: Estimator = "group"
) -> tuple[Tensor, Tensor]:
    """Sums over tokens from which the entropies of BSQ's soft assignment are computed (eq. 1).

    Args:
        latents: (T, L) float32.
        group_size: bits per group (G), a divisor of L.
        inv_temperature: inverse temperature of the softmax over corners (tau).
        scale: length of a corner's coordinate, 1/sqrt(L) or 1.
        estimator: ``"group"``: codebook entropy of each group's joint distribution; ``"bit"``: sum of the entropies of
            bit marginals (an upper bound of the former, at cost O(L)).

    Returns:
        The sum of per-sample entropies, a scalar in nats, equal for both estimators since the soft assignment
        factorises; and the sum of assignments, (K, 2^floor(G/2), 2^ceil(G/2)) or, for ``"bit"``, (2, L).

    Raises:
        QLIPError: ``estimator="group"`` with groups over 24 bits.
    """
    logits = 4 * inv_temperature * scale * latents  # (T, L), log-odds of bit 1 against bit 0
    magnitude = logits.abs()
    bit_entropies = F.softplus(-magnitude) + magnitude * torch.sigmoid(-magnitude)  # (T, L)
    persample = bit_entropies.sum(-1).sum(0)
    if estimator == "bit":
        return persample, torch.stack((torch.sigmoid(logits).sum(0), torch.sigmoid(-logits).sum(0)))
    if group_size > MAX_ENTROPY_BITS:
        raise QLIPError(
            f"the codebook entropy of groups of {group_size} bits needs 2^{group_size} entries; use groups of at most"
            f' {MAX_ENTROPY_BITS} bits, or persample_entropy_compute: "analytical" (bit marginals)'
        )
    grouped = logits.unflatten(-1, (-1, group_size)).transpose(0, 1)  # (K, T, G)
    half = group_size // 2
    rows, columns = _outer_table(grouped[..., :half]), _outer_table(grouped[..., half:])
    return persample, rows.transpose(-2, -1) @ columns  # (K, 2^floor(G/2), 2^ceil(G/2))


def codebook_entropy(mean: Tensor) -> Tensor:
    """H of a mean assignment: the entropies of the bits' or groups' mean distributions, summed, in nats.

    Args:
        mean: second result of :func:`bsq_statistics`, divided by the number of tokens.
    """
    padded = mean + EPSILON
    return -(padded * padded.log()).sum()


def _outer_table(logits: Tensor) -> Tensor:
    """(K, T, g) log-odds to joint probabilities (K, T, 2^g), first bit most significant."""
    table = logits.new_ones((*logits.shape[:-1], 1))
    for bit in range(logits.shape[-1]):
        pair = torch.stack((torch.sigmoid(-logits[..., bit]), torch.sigmoid(logits[..., bit])), -1)
        table = (table.unsqueeze(-1) * pair.unsqueeze(-2)).flatten(-2)
    return table
