"""`qlip demo`: every file that it writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from qlip import assets
from tests.cli.conftest import Command


def test_demo__writes_every_result(qlip: Command, model: Path) -> None:
    ran = qlip("demo", "-m", model)
    assert (ran.code, ran.err) == (0, "")
    folder = assets.path("images")
    names = {path.stem for path in folder.glob("*.jpg")} | {
        f"{path.stem}-drawn" for path in folder.glob("drawings/*.png")
    }
    assert {path.stem for path in Path("demo").glob("*.qlip")} == names
    assert Image.open("demo/demo.png").width > 500
    assert ran.out.splitlines()[-1].startswith("Open demo/demo.png, then try your own image: ")
    assert qlip("decode", "demo", "-o", "again", "-m", model).code == 0
    rebuilt, again = (np.asarray(Image.open(Path(folder) / "cat.png"), int) for folder in ("demo", "again"))
    assert np.abs(rebuilt - again).max() <= 1
