"""A confusion matrix as an image that can be read with ten classes as with a thousand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from qlip.errors import QLIPError
from qlip.evaluation.report import drawing

FEW = 40
"""Classes up to which every cell says its share."""
LABELLED = 400
"""Classes up to which every line has its name."""
LISTED = 30
OTHERS = "another name"


def draw(matrix: Tensor, names: Sequence[str], path: Path) -> None:
    """Write a PNG: rows are what images show, columns what they were called, cells shares of the row.

    Few classes have their percentages written in; many have a list of the commonest confusions beside them.

    Args:
        matrix: (C, C) or, with a last column for names outside of the C, (C, C + 1): counts.
        names: C.
        path: of the image.

    Raises:
        QLIPError: matrix and names do not fit, or it cannot be written.
    """
    if matrix.dim() != 2 or len(matrix) != len(names) or matrix.shape[1] - len(names) not in (0, 1):
        raise QLIPError(f"a confusion matrix {tuple(matrix.shape)} does not fit {len(names)} names")
    counts = matrix.double().numpy()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    columns = [*names, OTHERS][: matrix.shape[1]]
    count = len(names)
    inches = max(4.0, 0.45 * count) if count <= FEW else min(0.105 * count, 40.0)
    margin = 0.25 + 0.085 * min(28, max(map(len, columns)))
    grown = max(1.0, inches / 16)  # words beside a large image are read from as far away as the image is
    wide = 0.0 if count <= FEW else 5.5 * grown
    figure = drawing.new_figure(inches + margin + wide + 0.3, inches + margin + 0.3 + 0.3 * grown, layout=None)
    axes = figure.add_axes(_box(figure, margin, 0.2, inches, inches))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    _name_lines(axes, names, columns, count)
    axes.set_ylabel("shown", fontsize=10 * grown)
    axes.set_title("called", fontsize=10 * grown)
    if count <= FEW:
        _write_cells(axes, shares)
    else:
        _list_worst(
            figure, counts, names, columns, _box(figure, margin + inches + 0.4, 0.2, wide - 0.5, inches), 9 * grown
        )
    drawing.save(figure, path, dpi=110)


def _box(figure: Any, left: float, bottom: float, width: float, height: float) -> tuple[float, float, float, float]:
    """Inches to shares of the figure."""
    across, up = figure.get_size_inches()
    return left / across, bottom / up, width / across, height / up


def _name_lines(axes: Any, names: Sequence[str], columns: Sequence[str], count: int) -> None:
    step = max(1, -(-count // LABELLED))
    size = 9 if count <= FEW else 6
    axes.set_yticks(range(0, count, step), [_short(name) for name in names[::step]], fontsize=size)
    axes.set_xticks(
        range(0, len(columns), step), [_short(name) for name in columns[::step]], fontsize=size, rotation=90
    )
    axes.xaxis.tick_top()
    axes.tick_params(length=0)


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}\u2026"


def _write_cells(axes: Any, shares: np.ndarray) -> None:
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.005:
            colour = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)


def _list_worst(
    figure: Any,
    counts: np.ndarray,
    names: Sequence[str],
    columns: Sequence[str],
    box: tuple[float, float, float, float],
    size: float,
) -> None:
    """The commonest confusions, most frequent first, in letters of so many points."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:LISTED]
    pairs = [divmod(int(one), wrong.shape[1]) for one in order]
    lines = [
        f"{wrong[row, column]:5.0f}  {_short(names[row])}  \u2192  {_short(columns[column])}"
        for row, column in pairs
        if wrong[row, column]
    ]
    axes = figure.add_axes(box)
    axes.axis("off")
    text = "\n".join(["commonest confusions (images, shown \u2192 called)", "", *lines])
    axes.text(0, 1, text, ha="left", va="top", fontsize=size, family="monospace", transform=axes.transAxes)
