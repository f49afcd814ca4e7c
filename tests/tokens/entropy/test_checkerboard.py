"""Order of coding of a grid and the neighbours of its tokens."""

from __future__ import annotations

from qlip.tokens.entropy.checkerboard import checkerboard


def test_checkerboard__order_and_neighbours() -> None:
    tokens = checkerboard(2, 3)
    assert tokens.order.tolist() == [0, 2, 4, 1, 3, 5]
    assert tokens.num_black == 3
    outside = 6
    assert tokens.neighbours[0].tolist() == [outside, outside, outside, outside, 0, 3, outside, 4, 2]
