"""The decoder's benchmark: equal models draw equal tokens, and others are refused."""

from __future__ import annotations

import pytest
import torch

from benchmarks import decoder

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def ways() -> decoder.Ways:
    return decoder.Ways(decoder.shape("tiny"))


@pytest.mark.parametrize(("batch", "guided"), [(2, False), (1, True)])
def test_measured__all_ways_draw_the_tokens_of_qlip_in_equally_many_turns(
    ways: decoder.Ways, batch: int, guided: bool
) -> None:
    row = ways.measured(batch, guided)
    assert {len(times) for times in row.seconds.values()} == {ways.shape.turns - decoder.WARM_UP}


def test_measured__refuses_other_weights() -> None:
    ways = decoder.Ways(decoder.shape("tiny"))
    with torch.no_grad():
        ways.llama.model.norm.weight.mul_(1 + 1e-4)
    with pytest.raises(RuntimeError, match="transformers: logits differ"):
        ways.measured(1, False)


def test_ratio__is_the_median_of_pairs() -> None:
    row = decoder.Row(1, False, {decoder.OURS: [1.0, 2.0, 10.0], decoder.TRANSFORMERS: [2.0, 8.0, 10.0]})
    assert row.ratio(decoder.OURS) == 2.0


def test_stepped__hands_on_errors() -> None:
    def broken(pause: decoder.Pause) -> None:
        pause(torch.zeros(1, 1))
        raise ValueError("broken")

    run = decoder.Stepped(broken)
    assert run.step() >= 0
    with pytest.raises(ValueError, match="broken"):
        run.step()
