"""Scores of public benchmarks by their scorers' rules, from cases that are counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlip.errors import QLIPError
from qlip.vlm.metrics import (
    COGNITION,
    PERCEPTION,
    Mme,
    mme,
    mme_total,
    pope,
    read_as_llava,
    read_as_lmms,
    read_as_mme,
    write_mmvet,
)


@pytest.mark.parametrize(
    ("answer", "llava", "lmms"),
    [
        ("yes", "yes", "yes"),
        (" Yes\n", "yes", "yes"),
        ("No", "no", "no"),
        ("Yes.", "yes", "yes."),
        ("No, there is no dog.", "no", "no, there is no dog."),
        ("There is not a dog. Yes", "no", "there is not a dog. yes"),
        ("Yes. There is no cat.", "yes", "yes. there is no cat."),
        ("NO", "yes", "no"),  # no word of LLaVA's list
        ("None of them", "yes", "none of them"),
        ("", "yes", ""),
        ("\nNo", "yes", "no"),  # LLaVA's script splits at spaces alone
    ],
)
def test_pope__an_answer_is_read_by_each_rule(answer: str, llava: str, lmms: str) -> None:
    assert read_as_llava(answer) == llava
    assert read_as_lmms(answer) == lmms


def test_pope__both_rules_are_named_and_counted() -> None:
    answers = ["yes", "yes", "no", "no", "yes", "No, none.", "It is there.", "Yes"]
    labels = ["yes", "no", "no", "yes", "yes", "no", "yes", "no"]
    found = pope(answers, labels)
    assert list(found) == ["llava", "lmms-eval"]
    # llava: yes yes no no yes no yes yes -> 3 true yes, 2 false yes, 2 true no, 1 false no
    assert found["llava"].accuracy == pytest.approx(62.5)
    assert found["llava"].precision == pytest.approx(60) and found["llava"].recall == pytest.approx(75)
    assert found["llava"].f1 == pytest.approx(200 / 3)
    assert found["llava"].yes_ratio == pytest.approx(62.5) and found["llava"].unread == 0
    # lmms-eval: two answers are neither: 2 true yes, 2 false yes, 1 true no, 1 false no
    assert found["lmms-eval"].accuracy == pytest.approx(37.5)
    assert found["lmms-eval"].precision == pytest.approx(50) and found["lmms-eval"].recall == pytest.approx(200 / 3)
    assert found["lmms-eval"].yes_ratio == pytest.approx(50) and found["lmms-eval"].unread == pytest.approx(25)


def test_pope__scores_that_are_undefined_are_zero() -> None:
    found = pope(["no", "no"], ["no", "yes"])["llava"]
    assert found[:5] == (50, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("answers", "labels", "message"),
    [
        ([], [], "lists of 0, 0 entries"),
        (["yes"], ["yes", "no"], "lists of 1, 2 entries"),
        (["yes"], ["Yes"], "label 'Yes': labels are 'yes' and 'no'"),
    ],
)
def test_pope__refuses_lists_that_do_not_fit(answers: list[str], labels: list[str], message: str) -> None:
    with pytest.raises(QLIPError, match=message):
        pope(answers, labels)


@pytest.mark.parametrize(
    ("answer", "read"),
    [("Yes.", "yes"), ("no", "no"), ("Y", "yes"), ("n", "no"), ("x", "other"), ("Not here", "no"), ("The yes", "other"),
     ("Maybe", "other"), ("", "other"), (" Yes, it is", "yes")],
)  # fmt: skip
def test_mme__an_answer_is_read_from_its_beginning(answer: str, read: str) -> None:
    assert read_as_mme(answer) == read


def test_mme__accuracy_plus_needs_both_questions_of_an_image() -> None:
    answers = ["yes", "no", "yes", "yes", "no", "no", "yes", "No."]
    labels = ["yes", "no"] * 4
    images = ["1", "1", "2", "2", "3", "3", "1", "1"]
    categories = ["color"] * 6 + ["code_reasoning"] * 2
    found = mme(answers, labels, images, categories)
    assert found["color"].accuracy == pytest.approx(400 / 6)  # 4 of 6
    assert found["color"].accuracy_plus == pytest.approx(100 / 3)
    assert found["code_reasoning"] == Mme(100, 100)
    assert mme_total(found) == pytest.approx(100) and mme_total(found, COGNITION) == 200
    assert len(PERCEPTION) == 10


def test_mme__refuses_an_image_without_its_second_question() -> None:
    with pytest.raises(QLIPError, match="color has 1 about 7"):
        mme(["yes"], ["yes"], ["7"], ["color"])


def test_write_mmvet__is_one_object_by_id(tmp_path: Path) -> None:
    write_mmvet(tmp_path / "answers.json", {"0": "a cat", "v1_1": "zwölf"})
    text = (tmp_path / "answers.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"v1_0": "a cat", "v1_1": "zwölf"}
