"""Draws heads.png of docs/decoder.md, how each head models the groups of a token: ``python docs/images/heads.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

matplotlib.use("Agg")
BLUE, ORANGE, GREY, GREEN = "#c9dcf5", "#fbe0b8", "#e6e6e6", "#d2ecd0"


def box(axes: plt.Axes, x: float, y: float, text: str, colour: str, width: float = 0.9, height: float = 0.55) -> None:
    """A box with text, centred."""
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0.02,rounding_size=0.1",
        fc=colour,
        ec="#555",
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(axes: plt.Axes, start: tuple[float, float], end: tuple[float, float], dashed: bool = False) -> None:
    """An arrow; dashed for what was drawn and is read again."""
    style = {"arrowstyle": "-|>", "color": "#a33" if dashed else "#333", "shrinkA": 0, "shrinkB": 0, "lw": 1.1}
    axes.annotate("", end, start, arrowprops=style | {"linestyle": "--" if dashed else "-"})


def flat(axes: plt.Axes) -> None:
    """A step of the transformer per group."""
    for k in range(3):
        x = 1 + 1.6 * k
        box(axes, x, 0.6, "transformer\nstep", BLUE, 1.25, 0.75)
        box(axes, x, 2.6, f"group {k}", ORANGE)
        arrow(axes, (x, 1.0), (x, 2.3))
        if k < 2:
            arrow(axes, (x + 0.35, 2.3), (x + 1.35, 1.02), dashed=True)


def state(axes: plt.Axes) -> None:
    """The transformer's only step for the token."""
    box(axes, 2.6, 0.6, "transformer step: state of the token", BLUE, 4.4)


def parallel(axes: plt.Axes) -> None:
    """A softmax per group."""
    state(axes)
    for k in range(3):
        x = 1 + 1.6 * k
        box(axes, x, 2.6, f"group {k}", ORANGE)
        arrow(axes, (x, 0.9), (x, 2.3))


def chain(axes: plt.Axes) -> None:
    """A hidden layer per group, which reads the groups before."""
    state(axes)
    for k in range(3):
        x = 1 + 1.6 * k
        box(axes, x, 1.6, f"hidden {k}", GREY)
        box(axes, x, 2.6, f"group {k}", ORANGE)
        arrow(axes, (x, 0.9), (x, 1.3))
        arrow(axes, (x, 1.9), (x, 2.3))
        for later in range(k + 1, 3):
            arrow(axes, (x + 0.3, 2.3), (0.55 + 1.6 * later, 1.75), dashed=True)


def depth(axes: plt.Axes) -> None:
    """A small transformer over the groups."""
    state(axes)
    box(axes, 3.4, 1.6, "small transformer", GREEN, 2.8)
    for k in range(3):
        x = 1 + 1.6 * k
        box(axes, x, 2.6, f"group {k}", ORANGE)
        if k == 0:
            arrow(axes, (x, 0.9), (x, 2.3))
        else:
            arrow(axes, (x, 1.9), (x, 2.3))
    arrow(axes, (3.4, 0.9), (3.4, 1.3))
    for k in range(2):
        arrow(axes, (1.3 + 1.6 * k, 2.3), (2.2 + 1.3 * k, 1.9), dashed=True)


def bits(axes: plt.Axes) -> None:
    """Independent bits."""
    state(axes)
    for k in range(6):
        x = 0.6 + 0.8 * k
        box(axes, x, 2.6, f"bit {k}", ORANGE, 0.66)
        arrow(axes, (x, 0.9), (x, 2.3))


def masked_bits(axes: plt.Axes) -> None:
    """Bits in rounds."""
    state(axes)
    box(axes, 2.6, 1.6, "the same layers, round by round", GREEN, 4.4)
    arrow(axes, (2.6, 0.9), (2.6, 1.3))
    for k in range(6):
        x = 0.6 + 0.8 * k
        box(axes, x, 2.6, f"bit {k}", ORANGE if k % 2 == 0 else "#f7c89b", 0.66)
        arrow(axes, (x + 0.1, 1.9), (x + 0.1, 2.3))
        if k % 2 == 0:
            arrow(axes, (x - 0.12, 2.3), (x - 0.12, 1.9), dashed=True)
    axes.text(2.6, 3.08, "bits 0, 2, 4 in round 1; bits 1, 3, 5 in round 2", ha="center", fontsize=8, color="#555")


def main() -> None:
    """Draw all panels."""
    panels = {
        "flat": flat,
        "parallel": parallel,
        "chain": chain,
        "depth": depth,
        "bits": bits,
        "masked bits": masked_bits,
    }
    figure, grid = plt.subplots(2, 3, figsize=(11, 5.4))
    for axes, (name, draw) in zip(grid.flat, panels.items(), strict=True):
        draw(axes)
        axes.set_title(name, fontsize=11, fontweight="bold")
        axes.set_xlim(0, 5.2)
        axes.set_ylim(0.1, 3.3)
        axes.axis("off")
    figure.text(
        0.5,
        0.02,
        "dashed: a value that was drawn is read for the next; a token of 3 groups, or of 6 bits",
        ha="center",
        fontsize=9,
        color="#a33",
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(Path(__file__).with_name("heads.png"), dpi=100)


if __name__ == "__main__":
    main()
