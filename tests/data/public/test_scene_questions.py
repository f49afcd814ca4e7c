"""Questions about made scenes: one right answer each, balanced, nothing held out in training, no leak from the text."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qlip.data.public.scene_captions import HELD_OUT_PAIRS, parse_caption
from qlip.data.public.scene_questions import (
    ANSWERS,
    KINDS,
    LENGTHS,
    Question,
    SceneQuestions,
    Subject,
    caption_question,
    parse_question,
    text_and_answer,
    write_llava,
)
from qlip.data.public.scenes import Thing
from qlip.errors import QLIPError
from qlip.evaluation.metrics.scenes import answer_question


@cache
def questions(split: str, count: int = 1400) -> list[Question]:
    source = SceneQuestions(split)
    return [source[index] for index in range(count)]


def seen(question: Question, subject: Subject) -> list[Thing]:
    return [one for one in question.scene.things if subject.matches((one.colour, one.shape))]


@pytest.mark.parametrize("split", LENGTHS)
def test_question__has_the_one_right_answer_that_text_and_scene_give(split: str) -> None:
    for question in questions(split):
        assert question.answer == answer_question(question.text, question.scene.things), question
        assert question.answer in ANSWERS[question.kind]  # type: ignore[index]
        assert len(question.text.split()) <= 14


@pytest.mark.parametrize("split", LENGTHS)
def test_question__borders_and_diagonals_are_never_asked(split: str) -> None:
    for question in questions(split):
        if question.kind not in ("row", "column", "relation"):
            continue
        things = [seen(question, one)[0] for one in parse_question(question.text)[1]]
        if question.kind in ("row", "column"):
            centre = things[0].y if question.kind == "row" else things[0].x
            assert min(abs(centre - 64 / 3), abs(centre - 128 / 3)) >= 3
        else:
            right, down = abs(things[0].x - things[1].x), abs(things[0].y - things[1].y)
            assert abs(right - down) > 4


def test_split__training_neither_shows_nor_names_a_held_out_pair() -> None:
    for question in (*questions("train"), *questions("seen")):
        assert not HELD_OUT_PAIRS & {(one.colour, one.shape) for one in question.scene.things}
        assert not any(f"{colour} {shape}" in question.text for colour, shape in HELD_OUT_PAIRS)


def test_unseen_pair__every_question_is_about_a_held_out_pair() -> None:
    for question in questions("unseen_pair"):
        shown = [(one.colour, one.shape) for one in question.scene.things if (one.colour, one.shape) in HELD_OUT_PAIRS]
        if question.kind in ("colour", "shape"):
            assert len(shown) == 1 and question.answer in shown[0]
        else:
            assert any(f"{colour} {shape}" in question.text for colour, shape in HELD_OUT_PAIRS)
        assert len(shown) == {"exists": int(question.answer == "yes"), "count": len(shown)}.get(question.kind, 1)


@pytest.mark.parametrize("split", LENGTHS)
def test_answers__of_a_kind_are_balanced(split: str) -> None:
    for kind in KINDS:
        counts = Counter(one.answer for one in questions(split) if one.kind == kind)
        expected = set(ANSWERS[kind]) - ({"purple"} if split == "unseen_pair" else set())
        assert set(counts) == expected
        share = max(counts.values()) / counts.total()
        assert share <= 1 / len(expected) + (0.16 if (split, kind) == ("unseen_pair", "shape") else 0.09)


def test_text__says_little_about_the_answer() -> None:
    """The commonest answer of each exact text in training, against that of its kind."""
    by_text, by_kind = defaultdict[str, Counter[str]](Counter), defaultdict[str, Counter[str]](Counter)
    for question in questions("train", 4200):
        by_text[question.text][question.answer] += 1
        by_kind[question.kind][question.answer] += 1
    right: tuple[list[bool], list[bool]] = ([], [])
    for question in questions("seen"):
        majority = by_kind[question.kind].most_common(1)[0][0]
        blind = by_text[question.text].most_common(1)[0][0] if question.text in by_text else majority
        right[0].append(majority == question.answer)
        right[1].append(blind == question.answer)
    assert np.mean(right[1]) < np.mean(right[0]) + 0.03


def test_exists__half_of_the_scenes_without_a_pair_show_its_colour_and_its_shape() -> None:
    both, absent = 0, 0
    for question in questions("train"):
        if question.kind == "exists" and question.answer == "no":
            colour, shape = parse_question(question.text)[1][0]
            if colour and shape:
                absent += 1
                both += bool(seen(question, Subject(colour, None)) and seen(question, Subject(None, shape)))
    assert 0.4 < both / absent < 0.9


def test_source__each_question_is_a_function_of_split_and_index() -> None:
    source = SceneQuestions("seen")
    assert source[12] == SceneQuestions("seen")[12] != SceneQuestions("train")[12]
    assert source[12].key == "seen-0000012" and source[12].kind == KINDS[5]
    assert [one.index for one in source.of_kind("colour", 3)] == [2, 9, 16]
    assert all(one.kind == "colour" for one in source.of_kind("colour", 3))
    with pytest.raises(IndexError):
        source[LENGTHS["seen"]]
    with pytest.raises(QLIPError, match=r"splits train, seen, unseen_pair; got 'test'"):
        SceneQuestions("test")


def test_text_and_answer__are_those_of_the_question() -> None:
    for question in questions("unseen_pair")[:70]:
        assert text_and_answer(question.kind, "unseen_pair", question.index) == (question.text, question.answer)


def test_source__keeps_its_questions() -> None:
    """Results of two versions are comparable."""
    texts = [f"{one.text} {one.answer}" for one in questions("seen")[:7]]
    assert texts == [
        "Is there a square? no",
        "Count the squares. four",
        "What colour is the circle? red",
        "Which shape is green? square",
        "Which row is the cyan shape in? top",
        "Name the column of the orange shape: left, middle or right. right",
        "Where is the green shape relative to the cross? below",
    ]


def test_source__asks_as_many_of_each_kind() -> None:
    assert Counter(one.kind for one in questions("seen")) == dict.fromkeys(KINDS, 200)


def test_caption_question__asks_for_the_caption_of_a_captioned_scene() -> None:
    question = caption_question("seen", 3)
    described = parse_caption(question.answer)
    assert question.kind == "caption" and question.text.rstrip(".?").split()[0] in ("Describe", "What")
    assert [(one.colour, one.shape) for one in described.items] == [
        (one.colour, one.shape) for one in question.scene.things
    ]


@pytest.mark.parametrize("text", ["", "Is there a dog?", "What colour is it?", "How many red circle are there?"])
def test_parse_question__refuses_other_questions(text: str) -> None:
    with pytest.raises(QLIPError, match="is about no made scene"):
        parse_question(text)


def test_write_llava__is_read_as_llava_reads_it(tmp_path: Path) -> None:
    made = [*questions("train")[:3], caption_question("seen", 3)]
    steps: list[int] = []
    path = write_llava(tmp_path, made, steps.append)
    records = json.loads(path.read_text(encoding="utf-8"))
    assert steps == [1] * 4 and len(records) == 4
    for question, record in zip(made, records, strict=True):
        human, answer = record["conversations"]
        assert human == {"from": "human", "value": f"<image>\n{question.text}"}
        assert answer == {"from": "gpt", "value": question.answer}
        with Image.open(tmp_path / record["image"]) as image:
            np.testing.assert_array_equal(np.array(image), np.array(question.image()))
