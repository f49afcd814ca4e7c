"""Plots are whole PNG files, or one line that says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from qlip import QLIPError
from qlip.evaluation.report import drawing


def test_drawing__a_metric_becomes_a_file_of_its_size(tmp_path: Path) -> None:
    figure = drawing.new_figure(3, 2)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=drawing.COLOURS[0], label="a")
    drawing.add_grid(axes)
    drawing.add_legend_beside(axes)
    drawing.save(figure, tmp_path / "sub" / "a.png", dpi=50)
    with Image.open(tmp_path / "sub" / "a.png") as image:
        assert image.format == "PNG" and image.size == (150, 100)
    (tmp_path / "file").write_text("")
    with pytest.raises(QLIPError, match=r"a\.png: cannot write"):
        drawing.save(figure, tmp_path / "file" / "a.png")
