"""Collectives over rows, with any number of rows per rank, including 0: gather, reduce-scatter, ring exchange.

No function here is differentiable; the losses that use them compute their own gradients. In a single process the gather
and the sums return their input, without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from qlip.modeling.reduce import is_distributed


@dataclass(frozen=True)
class Shares:
    """Distribution of the rows of a global batch over ranks, in the order of ranks.

    Attributes:
        counts: number of rows of each rank.
        rank: this rank.
    """

    counts: tuple[int, ...]
    rank: int

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.counts)

    @property
    def total(self) -> int:
        """Number of rows of the global batch."""
        return sum(self.counts)

    @property
    def start(self) -> int:
        """Index of this rank's first row in the global batch."""
        return sum(self.counts[: self.rank])


def shares_of(rows: int, device: torch.device) -> Shares:
    """Exchange the number of rows per rank; a collective, which all ranks call."""
    if not is_distributed():
        return Shares((rows,), 0)
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, counts.new_full((1,), rows))
    return Shares(tuple(counts.tolist()), dist.get_rank())


def ids_of(match_ids: Tensor | None, shares: Shares, device: torch.device) -> Tensor:
    """The given ids, (b,) int64, or the rows' indices in the global batch, which makes every row unique."""
    if match_ids is not None:
        return match_ids
    return torch.arange(shares.start, shares.start + shares.counts[shares.rank], device=device)


def gather_rows(tensors: Sequence[Tensor], shares: Shares) -> list[Tensor]:
    """Gather the rows of all ranks, in one collective for all tensors.

    Args:
        tensors: (b,) or (b, D) each, of any dtype, with b this rank's count; D and dtypes are equal on all ranks.
        shares: distribution of the rows.

    Returns:
        (B,) or (B, D) each, B = ``shares.total``, ordered by rank.
    """
    if shares.world == 1:
        return list(tensors)
    packed, most = pack(tensors), max(shares.counts)
    padded = packed.new_empty((shares.world, most, packed.shape[1]))
    dist.all_gather_into_tensor(padded.flatten(0, 1), _padded(packed, most))
    return unpack(_compact(padded, shares), tensors)


def scatter_sum(tensor: Tensor, shares: Shares) -> Tensor:
    """Sum a tensor over ranks, and scatter the rows of the sum (reduce-scatter).

    Args:
        tensor: (B, D) floating, B = ``shares.total``.
        shares: distribution of the rows.

    Returns:
        (b, D), the summed rows of this rank.
    """
    if shares.world == 1:
        return tensor
    most = max(shares.counts)
    padded = torch.cat([_padded(part, most) for part in tensor.split(list(shares.counts))])
    own = tensor.new_empty((most, *tensor.shape[1:]))
    dist.reduce_scatter_tensor(own, padded)
    return own[: shares.counts[shares.rank]]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over ranks, in place, and return it."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate (b,) or (b, D) tensors of any dtypes to one (b, bytes) uint8 message."""
    return torch.cat([_columns(tensor).contiguous().view(torch.uint8) for tensor in tensors], 1)


def unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Inverse of :func:`pack`; only the dtypes and widths of ``like`` are used, not its number of rows."""
    widths = [_columns(tensor).shape[1] * tensor.element_size() for tensor in like]
    parts = packed.split(widths, 1)
    return [
        part.contiguous().view(tensor.dtype).flatten(tensor.dim() - 1) for part, tensor in zip(parts, like, strict=True)
    ]


def hand_on(outgoing: Tensor, rows: int, tag: int) -> Callable[[], Tensor]:
    """Start sending a tensor to the next rank of the ring and receiving one from the previous rank.

    Args:
        outgoing: (b, D), contiguous; must not change until both transfers are complete.
        rows: number of rows to receive, known to both sides; empty messages are not sent.
        tag: message tag that distinguishes concurrent exchanges.

    Returns:
        A function that waits for both transfers and returns the received (rows, D).
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    incoming = outgoing.new_empty((rows, *outgoing.shape[1:]))
    operations = []
    if outgoing.numel():
        operations.append(dist.P2POp(dist.isend, outgoing, (rank + 1) % world, tag=tag))
    if incoming.numel():
        operations.append(dist.P2POp(dist.irecv, incoming, (rank - 1) % world, tag=tag))
    works = dist.batch_isend_irecv(operations) if operations else []

    def arrived() -> Tensor:
        for work in works:
            work.wait()
        return incoming

    return arrived


def _columns(tensor: Tensor) -> Tensor:
    """View a (b,) tensor as (b, 1)."""
    return tensor if tensor.dim() == 2 else tensor.unsqueeze(1)


def _padded(tensor: Tensor, rows: int) -> Tensor:
    """Pad with zeros to ``rows`` rows; the padding is never read."""
    if len(tensor) == rows:
        return tensor.contiguous()
    return torch.cat([tensor, tensor.new_zeros((rows - len(tensor), *tensor.shape[1:]))])


def _compact(padded: Tensor, shares: Shares) -> Tensor:
    """Remove the padding of each rank: (world, most, D) to (B, D)."""
    if min(shares.counts) == padded.shape[1]:
        return padded.flatten(0, 1)
    return torch.cat([rows[:count] for rows, count in zip(padded, shares.counts, strict=True)])
