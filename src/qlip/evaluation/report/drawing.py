"""Plots by one hand: one set of colours, thin grids, and files that are written whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from qlip.errors import require
from qlip.files import write_bytes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Told apart by people who are blind to some colours (Wong, Nature Methods 2011)."""
GREY = "#666666"


def new_figure(width: float, height: float, *, extra: str = "eval", layout: str | None = "constrained") -> Any:
    """An empty matplotlib figure, in inches.

    Args:
        width, height: inches.
        extra: of this package that brings matplotlib, as the error names it.
        layout: matplotlib's engine; None places axes by hand.

    Raises:
        QLIPError: no matplotlib.
    """
    return require("matplotlib.figure", extra=extra).Figure(figsize=(width, height), layout=layout)


def add_grid(axes: Any) -> None:
    """Thin lines behind what is drawn."""
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def add_legend_beside(axes: Any) -> None:
    """To the right of the axes, where it hides nothing."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False, fontsize=9)


def png(figure: Any, dpi: int = 150) -> bytes:
    """A figure as the content of a PNG file of so many pixels an inch."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi)
    return data.getvalue()


def save(figure: Any, path: Path, dpi: int = 150) -> None:
    """Write a figure as a PNG. Raises QLIPError where the path cannot be written."""
    write_bytes(path, png(figure, dpi))
