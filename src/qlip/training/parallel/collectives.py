"""Rows of all ranks, where ranks hold unequal numbers of them, none included: gathered, summed back, passed round.

Nothing here has a graph; the losses that use it know their gradients themselves. In a single process every function
is the identity, without a copy.
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
    """How the rows of a global batch lie on ranks, in the order of ranks.

    Attributes:
        counts: rows of each rank.
        rank: this one.
    """

    counts: tuple[int, ...]
    rank: int

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.counts)

    @property
    def total(self) -> int:
        """Rows of the global batch."""
        return sum(self.counts)

    @property
    def start(self) -> int:
        """Where this rank's rows begin in the global batch."""
        return sum(self.counts[: self.rank])


def shares_of(rows: int, device: torch.device) -> Shares:
    """Ask every rank how many rows it holds; all ranks call it."""
    if not is_distributed():
        return Shares((rows,), 0)
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, counts.new_full((1,), rows))
    return Shares(tuple(counts.tolist()), dist.get_rank())


def ids_of(match_ids: Tensor | None, shares: Shares, device: torch.device) -> Tensor:
    """(b,) int64 given, or else the rows' places in the global batch, so that every row is its own."""
    if match_ids is not None:
        return match_ids
    return torch.arange(shares.start, shares.start + shares.counts[shares.rank], device=device)


def gather_rows(tensors: Sequence[Tensor], shares: Shares) -> list[Tensor]:
    """The rows of all ranks, in one collective however many tensors there are.

    Args:
        tensors: (b,) or (b, D) each, of any dtypes, b this rank's count; D and dtypes are the same on all ranks.
        shares: of the rows.

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
    """Sum over ranks of what each has for all rows; every rank receives its own rows.

    Args:
        tensor: (B, D) floating, B = ``shares.total``.
        shares: of the rows.

    Returns:
        (b, D).
    """
    if shares.world == 1:
        return tensor
    most = max(shares.counts)
    padded = torch.cat([_padded(part, most) for part in tensor.split(list(shares.counts))])
    own = tensor.new_empty((most, *tensor.shape[1:]))
    dist.reduce_scatter_tensor(own, padded)
    return own[: shares.counts[shares.rank]]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum, in place."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """(b,) or (b, D) tensors of any dtypes as one (b, bytes) uint8, for messages of bytes."""
    return torch.cat([_columns(tensor).contiguous().view(torch.uint8) for tensor in tensors], 1)


def unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`pack`; of ``like`` only dtypes and widths matter, not the number of rows."""
    widths = [_columns(tensor).shape[1] * tensor.element_size() for tensor in like]
    parts = packed.split(widths, 1)
    return [
        part.contiguous().view(tensor.dtype).flatten(tensor.dim() - 1) for part, tensor in zip(parts, like, strict=True)
    ]


def hand_on(outgoing: Tensor, rows: int, tag: int) -> Callable[[], Tensor]:
    """Start to send a tensor to the next rank of the ring and to receive one from the previous rank.

    Args:
        outgoing: (b, D), contiguous; unchanged until the handover is waited for.
        rows: of the tensor that arrives; both sides of a link know them, and an empty message is not sent.
        tag: keeps handovers of different kinds apart that are under way at the same time.

    Returns:
        Call it to wait for both; it gives the (rows, D) that arrived.
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
    return tensor if tensor.dim() == 2 else tensor.unsqueeze(1)


def _padded(tensor: Tensor, rows: int) -> Tensor:
    """At least ``rows`` rows; what is added is never read."""
    if len(tensor) == rows:
        return tensor.contiguous()
    return torch.cat([tensor, tensor.new_zeros((rows - len(tensor), *tensor.shape[1:]))])


def _compact(padded: Tensor, shares: Shares) -> Tensor:
    if min(shares.counts) == padded.shape[1]:
        return padded.flatten(0, 1)
    return torch.cat([rows[:count] for rows, count in zip(padded, shares.counts, strict=True)])
