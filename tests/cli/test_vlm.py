"""`qlip vlm eval`: questions about made scenes by the command, its table, sheets, and continuation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from qlip.cli.main import run as qlip
from qlip.cli.model import vlm
from qlip.data.public.scene_questions import KINDS
from qlip.evaluation.report.result import Result
from qlip.evaluation.run.scene_answers import Answers, questions_of
from qlip.vlm.chat import VisionChat
from tests.vlm.conftest import talker_folder  # noqa: F401

Captured = pytest.CaptureFixture[str]


def test_vlm_eval__table_result_and_sheet(talker_folder: Path, tmp_path: Path, capsys: Captured) -> None:  # noqa: F811
    out = tmp_path / "out"
    command = ["vlm", "eval", str(talker_folder), "-o", str(out), "--per-kind", "2", "--device", "cpu"]
    assert qlip([*command, "--split", "seen"]) == 0
    said = capsys.readouterr().out
    lines = [line.split()[0] for line in said.splitlines() if line.strip()]
    assert lines[:9] == ["seen", "all", *KINDS]
    assert "shuffled  blind  majority  right less shuffled" in said and str(out) in said
    (row,) = Result.load(out / "result.json").measured
    assert row.data == "scene questions:seen" and row.count == 14 and row.options["max_tokens"] == 12
    with Image.open(out / "sheet-seen.png") as sheet:
        assert sheet.width > 6 * 256
    answers = {path: path.stat().st_mtime_ns for path in out.glob("answers/*.json")}
    assert len(answers) == 3
    assert qlip([*command, "--json"]) == 0  # the other split too
    both = Result.model_validate(json.loads(capsys.readouterr().out)).measured
    assert [one.data for one in both] == ["scene questions:seen", "scene questions:unseen_pair"]
    assert both[0].values == row.values
    assert {path: path.stat().st_mtime_ns for path in answers} == answers
    assert qlip(["compare", str(out)]) == 0
    assert qlip(["eval", "--verify", str(out)]) == 2
    assert "measure them again with qlip vlm eval" in capsys.readouterr().err
    capsys.readouterr()
    assert qlip([*command, "--per-kind", "3"]) == 1
    assert "holds another measurement (per_kind differ)" in capsys.readouterr().err


def test_vlm_eval__a_stopped_command_keeps_answers(
    talker_folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    def stop(*args: object, **options: object) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(VisionChat, "answer_batch", stop)
    assert qlip(["vlm", "eval", str(talker_folder), "-o", str(tmp_path / "out"), "--per-kind", "2"]) == 130
    assert "finished answers are kept; run the same command to continue" in capsys.readouterr().err
    assert not (tmp_path / "out/result.json").exists()


def test_sheet__answers_are_green_or_red() -> None:
    questions = questions_of("seen", 2)[:2]
    given = {"right": [questions[0].answer.title() + ".", "an answer that is far too long to be shown in one line"]}
    sheet = vlm.sheet(Answers("seen", questions, given))  # type: ignore[arg-type]
    colours = {colour for _, colour in sheet.getcolors(1 << 24) or []}
    assert {(0, 158, 115), (213, 94, 0)} <= colours
