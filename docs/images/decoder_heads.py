"""Draws decoder-heads.png for docs/decoder.md: ``python docs/images/decoder_heads.py``, where qlip is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlip.evaluation.report.drawing import COLOURS, GREY, new_figure, save

GROUPS, BITS, ROUNDS = 4, 3, 4
STATE, GROUP, INNER = "#cfe3f3", "#f9d9b0", "#d5ecd9"
COLUMN = (1.6, 4.2, 6.8, 9.4)
"""x of the groups in a panel of 11 x 8."""
TOP, MIDDLE, BOTTOM = 5.9, 3.5, 1.0


def box(axes: Any, x: float, y: float, text: str, colour: str, width: float = 1.3, height: float = 0.9) -> None:
    """A labelled box around (x, y)."""
    under = {"facecolor": colour, "linewidth": 0, "pad": 1}  # the text stays readable where an arrow crosses it
    axes.text(x, y, text, ha="center", va="center", fontsize=9, zorder=5, bbox=under if text else None)
    corner, edge = (x - width / 2, y - height / 2), {"edgecolor": GREY, "linewidth": 0.8}
    axes.add_patch(axes.rectangle(corner, width, height, facecolor=colour, zorder=2, **edge))


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], back: bool = False) -> None:
    """An arrow; dashed for a value that was drawn and is read by what follows."""
    look = {"color": COLOURS[1], "linestyle": (0, (3, 2))} if back else {"color": GREY}
    style = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "linewidth": 1}
    axes.annotate("", end, start, arrowprops={**style, **look}, zorder=4)


def groups(axes: Any) -> None:
    """The groups of a token, at the top."""
    for number, x in enumerate(COLUMN):
        box(axes, x, TOP, f"$g_{number}$", GROUP)


def flat(axes: Any) -> None:
    """A step of the transformer per group."""
    groups(axes)
    box(axes, 5.5, BOTTOM + 0.6, "", STATE, 10.6, 2.2)
    axes.text(5.5, BOTTOM - 0.15, "transformer, a step per group", ha="center", va="center", fontsize=9, zorder=3)
    for number, x in enumerate(COLUMN):
        box(axes, x, BOTTOM + 1.0, f"$h_{number}$", "white")
        arrow(axes, (x, BOTTOM + 1.5), (x, TOP - 0.5))
        if number + 1 < GROUPS:
            arrow(axes, (x + 0.65, TOP - 0.4), (COLUMN[number + 1] - 0.65, BOTTOM + 1.3), back=True)


def parallel(axes: Any) -> None:
    """Independent softmaxes."""
    groups(axes)
    box(axes, 5.5, BOTTOM, "state $h$", STATE, 3)
    for x in COLUMN:
        box(axes, x, MIDDLE, "softmax", INNER, 2.0)
        arrow(axes, (5.5, BOTTOM + 0.5), (x, MIDDLE - 0.5))
        arrow(axes, (x, MIDDLE + 0.5), (x, TOP - 0.5))


def chain(axes: Any) -> None:
    """A hidden layer per group, over the state and the sum of earlier groups."""
    groups(axes)
    for number, x in enumerate(COLUMN):
        box(axes, x, BOTTOM, "+" if number else "$h$", "white" if number else STATE, 0.9 if number else 1.3)
        box(axes, x, MIDDLE, "layer", INNER, 1.5)
        arrow(axes, (x, BOTTOM + 0.5), (x, MIDDLE - 0.5))
        arrow(axes, (x, MIDDLE + 0.5), (x, TOP - 0.5))
        if number + 1 < GROUPS:
            after = COLUMN[number + 1]
            arrow(axes, (x + (0.45 if number else 0.65), BOTTOM), (after - 0.45, BOTTOM))
            arrow(axes, (x + 0.65, TOP - 0.4), (after - 0.4, BOTTOM + 0.5), back=True)


def depth(axes: Any) -> None:
    """A small transformer over the groups."""
    groups(axes)
    box(axes, (COLUMN[1] + COLUMN[3]) / 2, MIDDLE, "small transformer", INNER, 6.9)
    box(axes, COLUMN[0], MIDDLE, "linear", INNER, 1.5)
    for number, x in enumerate(COLUMN):
        box(axes, x, BOTTOM, f"$e(g_{number - 1})$" if number else "$h$", "white" if number else STATE, 1.5)
        arrow(axes, (x, BOTTOM + 0.5), (x, MIDDLE - 0.5))
        arrow(axes, (x, MIDDLE + 0.5), (x, TOP - 0.5))
        if number + 1 < GROUPS:
            arrow(axes, (x + 0.65, TOP - 0.4), (COLUMN[number + 1] - 0.5, BOTTOM + 0.5), back=True)
    arrow(axes, (COLUMN[0] + 0.65, BOTTOM + 0.3), (COLUMN[1] - 0.3, MIDDLE - 0.5))


def bit_row(axes: Any, y: float, colours: list[str]) -> None:
    """The bits of a token: small boxes, those of a group next to each other."""
    for number, x in enumerate(COLUMN):
        for bit in range(BITS):
            box(axes, x + (bit - 1) * 0.66, y, "", colours[number * BITS + bit], 0.6, 0.6)


def bits(axes: Any) -> None:
    """Independent bits."""
    bit_row(axes, TOP, [GROUP] * GROUPS * BITS)
    box(axes, 5.5, BOTTOM, "state $h$", STATE, 3)
    for x in COLUMN:
        for bit in range(BITS):
            arrow(axes, (5.5, BOTTOM + 0.5), (x + (bit - 1) * 0.66, TOP - 0.35))


def masked_bits(axes: Any) -> None:
    """Rounds, each over a fixed share of the bits: those drawn now are dark, those drawn before light."""
    box(axes, 5.5, BOTTOM - 0.3, "state $h$, read by each round", STATE, 7)
    heights = [1.9 + 1.33 * number for number in range(ROUNDS)]
    for number, y in enumerate(heights):
        turn = [bit % ROUNDS for bit in range(GROUPS * BITS)]
        bit_row(axes, y, [COLOURS[4] if one == number else GROUP if one < number else "white" for one in turn])
        axes.text(0.3, y, f"round {number + 1}", ha="right", va="center", fontsize=9, color=GREY)
        if number:
            arrow(axes, (5.5, heights[number - 1] + 0.35), (5.5, y - 0.35), back=True)
    arrow(axes, (5.5, BOTTOM + 0.15), (5.5, heights[0] - 0.35))


PANELS = {
    "flat: each group is a step of the transformer": flat,
    "parallel: one softmax per group, independent": parallel,
    "chain: a hidden layer per group": chain,
    "depth: a small transformer over the groups": depth,
    "bits: all bits independent": bits,
    "masked bits: some bits per round": masked_bits,
}


def draw() -> Any:
    """The figure."""
    from matplotlib.patches import Rectangle

    figure = new_figure(11, 6)
    for axes, (title, panel) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        axes.rectangle = Rectangle
        axes.set(xlim=(-1.2, 11.1), ylim=(0, 6.7))
        axes.set_axis_off()
        axes.set_title(title, fontsize=10)
        panel(axes)
    return figure


if __name__ == "__main__":
    save(draw(), Path(__file__).with_name("decoder-heads.png"), dpi=110)
