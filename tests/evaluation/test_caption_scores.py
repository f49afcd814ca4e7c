"""BLEU, CIDEr and METEOR by the reference scorers, and what is said where they are not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qlip.errors import QLIPError
from qlip.evaluation.metrics import captions
from qlip.evaluation.metrics.captions import caption_scores

PYTHON = os.environ.get("QLIP_LMMS_PYTHON")
PROGRAM = """
import json
from qlip.evaluation.metrics import captions
given = ["A red circle on a black background.", "a blue square", "three green crosses", "a red circle"]
wanted = [["a red circle on a black background"], ["a red circle"], ["three green crosses"], ["A small red circle."]]
found = {"all": captions.caption_scores(given, wanted), "own": captions.caption_scores(given, [[one] for one in given])}
captions.shutil.which = lambda name: None
found["without Java"] = captions.caption_scores(given, wanted)
print(json.dumps(found))
"""


def test_caption_scores__says_in_one_line_that_the_package_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(captions.importlib, "import_module", absent)
    found = caption_scores(["a red circle"], [["a red circle"]])
    assert not found.values
    assert found.notes == {"bleu_4": "BLEU, CIDEr and METEOR are left out: pip install pycocoevalcap"}


def test_caption_scores__refuses_an_image_without_reference() -> None:
    with pytest.raises(QLIPError, match="2 captions, 1 lists of references; give one or more each"):
        caption_scores(["a", "b"], [["a"]])
    with pytest.raises(QLIPError, match="give one or more each"):
        caption_scores(["a"], [[]])


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="QLIP_LMMS_PYTHON names no Python with pycocoevalcap; run make test-lmms")
def test_caption_scores__are_those_of_the_reference_scorers() -> None:
    assert PYTHON is not None
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    ran = subprocess.run([PYTHON, "-c", PROGRAM], capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    values, notes = found["all"]
    assert found["own"][0]["bleu_4"] == pytest.approx(100, abs=1e-3)
    assert 0 < values["bleu_4"] < 100 and values["cider"] > 100
    if shutil.which("java"):
        assert found["own"][0]["meteor"] == pytest.approx(100) and 0 < values["meteor"] < 100 and not notes
    # without Java the words of such captions are the same, and so are the scores
    plain, said = found["without Java"]
    assert plain["bleu_4"] == pytest.approx(values["bleu_4"]) and plain["cider"] == pytest.approx(values["cider"])
    assert list(said) == ["meteor"] and "meteor" not in plain
