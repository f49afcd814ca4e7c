"""Two gloo processes with unequal batches give the loss and gradients of one process with the whole batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from qlip.modeling.config import QuantizerConfig
from qlip.modeling.quantizer import BinarySphericalQuantizer, QuantizerOutput

TOKENS = 6
SHARES = (1, 3)
"""Images on each rank."""

LOSSES = ("loss", "persample_entropy", "codebook_entropy", "commitment")


def _run(estimator: str, images: torch.Tensor) -> tuple[nn.Linear, QuantizerOutput]:
    torch.manual_seed(0)
    projection = nn.Linear(5, 12)
    config = QuantizerConfig(
        embed_dim=12,
        group_size=6,
        input_format="blc",
        beta=0.5,
        gamma_1=0.7,
        persample_entropy_compute=estimator,  # type: ignore[arg-type]
        inv_temperature=20.0,
    )
    quantizer = BinarySphericalQuantizer(config).train()
    return projection, quantizer(nn.functional.normalize(projection(images), dim=-1))


def _images() -> torch.Tensor:
    return torch.randn(sum(SHARES), TOKENS, 5, generator=torch.Generator().manual_seed(1))


def _values_and_gradients(projection: nn.Linear, output: QuantizerOutput) -> dict[str, list[float]]:
    found = {}
    for name in LOSSES:
        value = getattr(output, name)
        gradients = torch.autograd.grad(value, list(projection.parameters()), retain_graph=True)
        if dist.is_initialized():
            for gradient in gradients:  # what data-parallel training does
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
        found[name] = [value.item(), *torch.cat([g.flatten() for g in gradients]).tolist()]
    return found


def _process(rank: int, folder: str, estimator: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=len(SHARES))
    start = sum(SHARES[:rank])
    projection, output = _run(estimator, _images()[start : start + SHARES[rank]])
    found = _values_and_gradients(projection, output)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.parametrize("estimator", ["group", "analytical"])
def test_entropies__two_unequal_processes_equal_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # a new process must find this module
    mp.spawn(_process, args=(str(tmp_path), estimator), nprocs=len(SHARES))  # type: ignore[no-untyped-call]
    expected = _values_and_gradients(*_run(estimator, _images()))
    for rank in range(len(SHARES)):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for name in LOSSES:
            actual, wanted = torch.tensor(found[name]), torch.tensor(expected[name])
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_entropies__plain_average_of_ranks_would_differ() -> None:
    """The check above can fail: the mean of the two shares' own losses is not the loss of the whole."""
    whole = _run("group", _images())[1].codebook_entropy
    parts = [_run("group", part)[1].codebook_entropy for part in _images().split(list(SHARES))]
    assert whole is not None
    assert parts[0] is not None
    assert parts[1] is not None
    assert abs((parts[0] + parts[1]).item() / 2 - whole.item()) > 1e-2
