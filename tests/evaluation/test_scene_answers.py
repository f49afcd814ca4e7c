"""Answers about made scenes: exact scoring, controls, resumption, and a result that is compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlip.data.public.scene_questions import KINDS, SceneQuestions
from qlip.data.public.scenes import STANDARD, Thing
from qlip.errors import QLIPError
from qlip.evaluation.metrics.intervals import proportion_interval
from qlip.evaluation.metrics.scenes import answer_question, read_scene
from qlip.evaluation.report.result import Result
from qlip.evaluation.run import scene_answers
from qlip.evaluation.run.scene_answers import collect, is_right, majority, questions_of, result, score, shuffled
from qlip.runtime.workspace import Workspace

PER_KIND = 3


@cache
def things_by_image() -> dict[bytes, Sequence[Thing]]:
    questions = (*questions_of("seen", 10), *questions_of("unseen_pair", 3))
    return {one.image().tobytes(): one.scene.things for one in questions}


def looking(images: Sequence[Image.Image] | None, texts: Sequence[str]) -> list[str]:
    """Answers from the scene that an image shows, and yes without one."""
    if images is None:
        return ["yes"] * len(texts)
    seen = [things_by_image()[image.tobytes()] for image in images]
    return [answer_question(text, things) for text, things in zip(texts, seen, strict=True)]


@pytest.fixture(autouse=True)
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    known = majority(20)
    monkeypatch.setattr(scene_answers, "majority", lambda: known)


@pytest.mark.parametrize(
    ("given", "right"),
    [("red", True), (" Red.", True), ("RED\n", True), ("red..", False), ("red circle", False), ("", False)],
)  # fmt: skip
def test_is_right__case_spaces_and_a_final_period_do_not_matter(given: str, right: bool) -> None:
    question = replace(SceneQuestions("seen")[2], answer="red")
    assert is_right(question, given) == right


def test_is_right__a_digit_is_a_number() -> None:
    question = replace(SceneQuestions("seen")[1], answer="three")
    assert is_right(question, "3") and is_right(question, "Three.") and not is_right(question, "33")
    assert not is_right(question, "0") and not is_right(question, "6") and not is_right(question, "\u00b3")


def test_shuffled__lends_another_scene_of_the_same_kind() -> None:
    questions = questions_of("seen", 5)
    lent = shuffled(questions)
    assert [one.kind for one in lent] == [one.kind for one in questions]
    assert all(one.scene != other.scene for one, other in zip(questions, lent, strict=True))
    assert sorted(one.index for one in lent) == list(range(5 * len(KINDS)))


def test_collect__one_who_looks_is_right_with_the_scenes_alone() -> None:
    answers = collect(looking, "unseen_pair", PER_KIND, batch_size=8)
    assert len(answers.questions) == PER_KIND * len(KINDS)
    assert answers.right("right").all()
    assert not answers.right("shuffled").all() and set(answers.given["blind"]) == {"yes"}


def test_answer_question__reads_images_by_the_exact_checker() -> None:
    for question in questions_of("unseen_pair", 2):
        seen = read_scene(np.array(question.image()), STANDARD)
        assert answer_question(question.text, seen.things) == question.answer


def test_collect__images_and_texts_go_together() -> None:
    calls: list[tuple[int | None, int]] = []
    pixels: list[np.ndarray] = []

    def answer(images: Sequence[Image.Image] | None, texts: Sequence[str]) -> list[str]:
        calls.append((None if images is None else len(images), len(texts)))
        pixels.extend(np.array(image) for image in images or ())
        return list(texts)

    answers = collect(answer, "seen", PER_KIND, batch_size=8)
    texts = [one.text for one in answers.questions]
    assert all(list(given) == texts for given in answers.given.values())
    number = len(texts)
    assert calls[:6] == [(8, 8), (8, 8), (5, 5)] * 2 and calls[6][0] is None
    assert sum(count for images, count in calls if images is None) == len(set(texts))
    own = [np.array(one.image()) for one in answers.questions]
    lent = [np.array(one.image()) for one in shuffled(answers.questions)]
    np.testing.assert_array_equal(pixels, own + lent)
    assert number == 21


def test_collect__continues_after_a_stop(tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(images: Sequence[Image.Image] | None, texts: Sequence[str]) -> list[str]:
        if len(asked) == 40:
            raise KeyboardInterrupt
        asked.extend(texts)
        return ["yes"] * len(texts)

    def run() -> scene_answers.Answers:
        return collect(answer, "seen", 6, batch_size=2, work=work, on_progress=steps.append)

    work, steps = Workspace(tmp_path / "out", {"per_kind": 6}), list[int]()
    with pytest.raises(KeyboardInterrupt):
        run()
    asked.append("stopped")
    before, steps = len(asked), []
    answers = run()
    blind = len({one.text for one in answers.questions})
    assert sum(steps) == 2 * 42 + blind and len(asked) - before == 2 * 42 + blind - 40
    assert run().given == answers.given and len(asked) - before == 2 * 42 + blind - 40


@pytest.mark.parametrize("given", [[], ["yes"], [None] * 8])
def test_collect__refuses_a_model_that_leaves_questions_out(given: list[str]) -> None:
    with pytest.raises(QLIPError, match="answers to 8 questions; give one text each"):
        collect(lambda images, texts: given, "seen", 2, batch_size=8)


def test_questions_of__refuses_numbers_that_a_split_has_not() -> None:
    with pytest.raises(QLIPError, match=r"3,000 questions of each kind: seen has 2 to 2,000"):
        questions_of("seen", 3000)
    with pytest.raises(QLIPError, match="1 questions of each kind"):
        questions_of("seen", 1)


def test_score__shares_intervals_and_controls_by_kind() -> None:
    answers = collect(looking, "seen", 10)
    values = score(answers).values
    assert values["right"].value == 100 and values["right"].count == 70 and values["right_count"].count == 10
    low, high = proportion_interval(answers.right("shuffled").numpy())
    assert low is not None and high is not None
    assert values["shuffled"].low == pytest.approx(100 * low) and values["shuffled"].high == pytest.approx(100 * high)
    yes = np.mean([one.answer == "yes" for one in answers.questions if one.kind == "exists"])
    assert values["blind_exists"].value == pytest.approx(100 * yes) and values["blind_colour"].value == 0
    common = scene_answers.majority()
    expected = np.mean([common[one.kind] == one.answer for one in answers.questions])
    assert values["majority"].value == pytest.approx(100 * expected)
    above = values["above_shuffled"]
    assert above.value == pytest.approx(100 - values["shuffled"].value)
    assert above.low is not None and above.high is not None and above.low < above.value < above.high <= 100


def test_majority__is_of_training_by_kind() -> None:
    found = majority(20)
    answers = {kind: [one.answer for one in SceneQuestions("train").of_kind(kind, 20)] for kind in KINDS}
    assert set(found) == set(KINDS)
    for kind, several in answers.items():
        assert several.count(found[kind]) == max(map(several.count, several))


def test_result__is_saved_and_read(tmp_path: Path) -> None:
    answers = [collect(looking, split, 2, rows=("right", "shuffled")) for split in scene_answers.SPLITS]
    made = result({"name": "a", "fingerprint": "b"}, answers, [score(one) for one in answers], torch.device("cpu"))
    made.save(tmp_path / "result.json")
    first, second = Result.load(tmp_path / "result.json").measured
    assert first.data == "scene questions:seen" and second.data == "scene questions:unseen_pair"
    assert first.digest != second.digest and first.values["right"].value == 100
    assert json.loads((tmp_path / "result.json").read_text())["subject"]["kind"] == "VisionLanguageModel"
    assert "blind" not in first.values and first.notes["majority"].startswith("control")


class Batches:
    """A model that repeats the questions and keeps what it was shown."""

    def __init__(self) -> None:
        self.shown: list[list[Image.Image | None]] = []

    def answer_batch(
        self, images: Sequence[Image.Image | None], questions: Sequence[str], *, max_tokens: int | None
    ) -> list[str]:
        self.shown.append(list(images))
        return [f"{text} {max_tokens}" for text in questions]


def test_answer_of__a_question_without_image_has_none() -> None:
    chat = Batches()
    image = Image.new("RGB", (64, 64))
    answer = scene_answers.answer_of(chat, 3)
    assert answer(None, ["a", "b"]) == ["a 3", "b 3"] and answer([image], ["c"]) == ["c 3"]
    assert chat.shown == [[None, None], [image]]
