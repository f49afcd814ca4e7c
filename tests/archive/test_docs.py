"""The Python blocks of docs/tokens.md run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from qlip.archive import TokenDataset
from tests.archive.made import bundled_dataset

GUIDE = Path(__file__).parents[2] / "docs" / "tokens.md"


def test_tokens_page__python_blocks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    bundled_dataset(Path("tokens"))
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
    printed = capsys.readouterr().out
    assert "130 32128 32129" in printed and "torch.Size([258])" in printed
    assert names["ids"].shape == (18 * 256,)  # type: ignore[attr-defined]
    assert np.array_equal(names["groups"], TokenDataset("tokens")[0])  # type: ignore[arg-type]
