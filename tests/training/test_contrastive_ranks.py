"""Processes with unequal shares of a batch give the losses, counts and gradients of one process with all of it.

Three gloo processes, one of them without a row, and then two of these; everything in one spawn.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

from qlip.errors import QLIPError
from qlip.training.losses import info_nce, siglip
from qlip.training.losses.balance import GradientNormBalance, term_gradients
from qlip.training.parallel.collectives import gather_rows, scatter_sum, shares_of
from qlip.training.tasks.codebook_usage import UsageMonitor
from tests.training.test_contrastive import literal_info_nce, literal_siglip

SHARES = {3: (2, 0, 5), 2: (4, 3)}
"""Rows of each rank, by number of ranks."""
ROWS = 7
IDS = torch.tensor([4, 1, 4, 2, 1, 4, 9])  # twins on one rank and on several
Found = dict[str, list[float]]


class Towers(nn.Module):
    """Two linear towers and the scalars."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(5, 4), nn.Linear(3, 4)
        self.logit_scale, self.bias = nn.Parameter(torch.tensor(1.2)), nn.Parameter(torch.tensor(-1.0))
        self.double()

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)


def inputs() -> tuple[Tensor, Tensor]:
    drawn = torch.randn(ROWS, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return drawn[:, :5], drawn[:, 5:]


def losses_of(towers: Towers, images: Tensor, texts: Tensor, start: int, chunk_size: int | None) -> dict[str, Tensor]:
    ids = IDS[start : start + len(images)]
    image, text = towers(images, texts)
    scale, bias = towers.logit_scale, towers.bias
    return {
        "infonce": info_nce(image, text, scale, chunk_size=chunk_size),
        "infonce twins": info_nce(image, text, scale, ids, chunk_size=chunk_size),
        "siglip": siglip(image, text, scale, bias, chunk_size=chunk_size),
        "siglip twins": siglip(image, text, scale, bias, ids, chunk_size=chunk_size),
    }


def literal_losses(towers: Towers) -> dict[str, Tensor]:
    image, text = towers(*inputs())
    alone, twins = list(range(ROWS)), IDS.tolist()
    scale, bias = towers.logit_scale, towers.bias
    return {
        "infonce": literal_info_nce(image, text, scale, alone),
        "infonce twins": literal_info_nce(image, text, scale, twins),
        "siglip": literal_siglip(image, text, scale, bias, alone),
        "siglip twins": literal_siglip(image, text, scale, bias, twins),
    }


def values_and_gradients(towers: Towers, losses: dict[str, Tensor]) -> Found:
    found = {}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(3 * loss, list(towers.parameters()), retain_graph=True, materialize_grads=True)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        if dist.is_initialized():  # what data-parallel training does
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        found[name] = [loss.item(), *flat.tolist()]
    return found


def codes() -> Tensor:
    return torch.randint(0, 16, (ROWS, 6, 2), generator=torch.Generator().manual_seed(2))


def counted(indices: Tensor) -> Found:
    monitor = UsageMonitor(8, 4)
    monitor.update(indices)
    monitor.update(indices[:1])
    saved = {name: counts.flatten().tolist() for name, counts in monitor.state_dict().items()}
    return saved | {name: [value.item()] for name, value in monitor.summary().items()}


def balanced(towers: Towers, losses: dict[str, Tensor]) -> Found:
    probe = term_gradients(losses, towers.image.weight)
    weights = dict.fromkeys(losses, 1.0) | {"siglip": 5.0}
    _, factors = GradientNormBalance(weights)(losses, towers.image.weight)
    return {name: [value] for name, value in probe.items()} | {n: [f.item()] for n, f in factors.items()}


def share_of_the_work(world: int, rank: int) -> dict[str, Any]:
    counts = SHARES[world]
    start = sum(counts[:rank])
    mine = slice(start, start + counts[rank])
    towers = Towers()
    images, texts = (rows[mine] for rows in inputs())
    found: dict[str, Any] = {}
    for chunk_size in (None, 2):
        losses = losses_of(towers, images, texts, start, chunk_size)
        found[f"losses in chunks of {chunk_size}"] = values_and_gradients(towers, losses)
        with torch.no_grad():
            again = losses_of(towers, images, texts, start, chunk_size)
        assert {name: loss.item() for name, loss in again.items()} == {n: loss.item() for n, loss in losses.items()}
    found["balance"] = balanced(towers, losses)
    nothing = losses_of(towers, images[:0], texts[:0], start, None)
    found["nothing"] = values_and_gradients(towers, nothing)
    found["usage"] = counted(codes()[mine])
    rows_move(mine, counts)
    return found


def rows_move(mine: slice, counts: tuple[int, ...]) -> None:
    """Any dtypes in one message; sums go home."""
    shares = shares_of(mine.stop - mine.start, torch.device("cpu"))
    assert (shares.counts, shares.start, shares.total) == (counts, mine.start, ROWS)
    whole = (codes()[:, 0], IDS, torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(3)).bfloat16(), IDS > 3)
    for gathered, expected in zip(gather_rows([tensor[mine] for tensor in whole], shares), whole, strict=True):
        assert gathered.dtype == expected.dtype and gathered.equal(expected)
    table = torch.arange(ROWS * 2.0).view(ROWS, 2)
    assert scatter_sum(table * (shares.rank + 1), shares).equal(table[mine] * sum(range(1, shares.world + 1)))


def sharded_layers_are_refused() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parameter = nn.Parameter(distribute_tensor(torch.ones(3, 2), mesh, [Shard(0)]))
    with pytest.raises(QLIPError, match=r"parallel\.kind=ddp"):
        term_gradients({"a": torch.ones((), requires_grad=True)}, parameter)


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for world in SHARES:
        if rank >= world:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
        found = share_of_the_work(world, rank)
        if world == 2:
            sharded_layers_are_refused()
        dist.destroy_process_group()
        (Path(folder) / f"{world}-{rank}.json").write_text(json.dumps(found))


def test_unequal_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # a new process must find this module
    mp.spawn(process, args=(str(tmp_path),), nprocs=max(SHARES))  # type: ignore[no-untyped-call]
    towers = Towers()
    losses = literal_losses(towers)
    expected: dict[str, Found] = {
        "losses in chunks of None": values_and_gradients(towers, losses),
        "losses in chunks of 2": values_and_gradients(towers, losses),
        "balance": balanced(towers, losses),
        "nothing": {name: [0.0] * (1 + sum(p.numel() for p in towers.parameters())) for name in losses},
    }
    for world, counts in SHARES.items():
        starts = [sum(counts[:rank]) for rank in range(world)]
        # the second update of a rank is its first image
        firsts = [codes()[start : start + 1] for start, count in zip(starts, counts, strict=True) if count]
        monitor = UsageMonitor(8, 4)
        for indices in (codes(), *firsts):
            monitor.update(indices)
        expected["usage"] = {name: value.flatten().tolist() for name, value in monitor.state_dict().items()}
        expected["usage"] |= {name: [value.item()] for name, value in monitor.summary().items()}
        for rank in range(world):
            found = json.loads((tmp_path / f"{world}-{rank}.json").read_text())
            assert found.keys() == expected.keys()
            for kind, wanted in expected.items():
                assert found[kind].keys() == wanted.keys()
                for name, values in wanted.items():
                    where = f"{kind}, {name}, rank {rank} of {world}"
                    digits = 1e-10 if kind.startswith("losses") else 1e-5  # float64, and what is kept in float32
                    assert found[kind][name] == pytest.approx(values, rel=digits, abs=1e-9), where
