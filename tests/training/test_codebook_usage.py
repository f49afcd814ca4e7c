from __future__ import annotations

import numpy as np
import pytest
import torch

from qlip.errors import QLIPError
from qlip.training.tasks.codebook_usage import UsageMonitor


def by_numpy(indices: torch.Tensor, group_size: int) -> dict[str, float]:
    """The same figures from a table of all tokens' bits and a dictionary of codes."""
    groups = indices.reshape(-1, indices.shape[-1]).numpy()
    bits = np.array(
        [[int(bit) for code in token for bit in format(code, f"0{group_size}b")] for token in groups.tolist()]
    )

    def entropy(shares: np.ndarray) -> float:
        shares = shares[shares > 0]
        return float(-(shares * np.log2(shares)).sum())

    ones = bits.mean(0)
    entropies = np.array([entropy(np.array([share, 1 - share])) for share in ones])
    found = {
        "bits_dead": float((entropies < 0.05).sum()),
        "bit_entropy_min": float(entropies.min()),
        "bit_entropy_mean": float(entropies.mean()),
    }
    if group_size <= 16:
        counts = [np.unique(column, return_counts=True)[1] for column in groups.T]
        perplexities = [2 ** entropy(count / count.sum()) for count in counts]
        found["group_perplexity"] = float(np.mean(perplexities)) / 2**group_size
        found["codes_used"] = sum(len(count) for count in counts) / (len(counts) * 2**group_size)
    return found


def check(summary: dict[str, torch.Tensor], expected: dict[str, float]) -> None:
    assert summary.keys() == expected.keys()
    for name, value in summary.items():
        assert value.shape == () and value.dtype == torch.float32
        torch.testing.assert_close(
            value.item(), float(expected[name]), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("num_bits", "group_size"), [(12, 6), (16, 16), (6, 1), (20, 20)])
def test_random_codes_against_numpy(num_bits: int, group_size: int) -> None:
    generator = torch.Generator().manual_seed(num_bits)
    shape = (3, 16, num_bits // group_size)
    # squared, so that low codes are common
    drawn = [(torch.rand(shape, generator=generator) ** 2 * 2**group_size).long() for _ in range(3)]
    monitor = UsageMonitor(num_bits, group_size)
    for indices in drawn[:2]:
        monitor.update(indices)
    check(monitor.summary(), by_numpy(torch.cat(drawn[:2]), group_size))
    monitor.update(drawn[2])  # a new window remembers nothing
    check(monitor.summary(), by_numpy(drawn[2], group_size))


def test_collapsed_codes() -> None:
    monitor = UsageMonitor(8, 4)
    assert monitor.summary() == {}
    one_code = torch.tensor([3, 12]).expand(2, 50, 2)
    monitor.update(one_code)
    check(
        monitor.summary(),
        {"bits_dead": 8, "bit_entropy_min": 0, "bit_entropy_mean": 0, "group_perplexity": 1 / 16, "codes_used": 1 / 16},
    )
    # one token in a hundred has another first bit: 0.081 bits, which is alive; one in a thousand is not
    for tokens, dead in ((100, 7), (1000, 8)):
        rare = torch.tensor([3, 12]).repeat(1, tokens, 1)
        rare[0, 0, 0] += 8
        monitor.update(rare)
        summary = monitor.summary()
        assert summary["bits_dead"] == dead
        check(summary, by_numpy(rare, 4))


def test_all_codes_equally_often() -> None:
    monitor = UsageMonitor(6, 3)
    monitor.update(torch.arange(8).expand(2, 8).t().reshape(1, 8, 2).contiguous())
    check(
        monitor.summary(),
        {"bits_dead": 0, "bit_entropy_min": 1, "bit_entropy_mean": 1, "group_perplexity": 1, "codes_used": 1},
    )


@pytest.mark.parametrize("group_size", [4, 20])
def test_a_window_goes_on_after_saving_and_loading(group_size: int) -> None:
    torch.manual_seed(0)
    first, second = torch.randint(0, 2**group_size, (2, 3, 10, 40 // group_size))
    whole = UsageMonitor(40, group_size)
    whole.update(first)
    saved = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    whole.update(second)
    resumed = UsageMonitor(40, group_size)
    resumed.load_state_dict(saved)
    resumed.update(second)
    assert {k: v.item() for k, v in resumed.summary().items()} == {k: v.item() for k, v in whole.summary().items()}
    assert not any(counts.any() for counts in resumed.state_dict().values())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(QLIPError, match="group_size 5 does not divide num_bits 12"):
        UsageMonitor(12, 5)
    monitor = UsageMonitor(12, 6)
    for indices in (torch.zeros(1, 4, 3, dtype=torch.int64), torch.zeros(1, 4, 2, dtype=torch.int32)):
        with pytest.raises(QLIPError, match="int64 of 2 groups a token"):
            monitor.update(indices)
