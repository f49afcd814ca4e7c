"""Share of exactly right answers to questions about made scenes, with the controls that show whether a model looks.

`collect` asks any model, given as an `Answer` function, the questions of `qlip.data.public.scene_questions` with
their scenes ("right"), with other scenes ("shuffled") and without an image ("blind"). `score` makes metrics of the
answers, with the majority's answer of each kind in training as the last row, and `result` a result that ``qlip
compare`` takes. A model that does not look scores the same with its scenes and with others.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qlip.data.public.scene_questions import KINDS, LENGTHS, NUMBERS, Question, SceneQuestions, text_and_answer
from qlip.data.public.scenes import SIDE
from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import MetricResult, mean, share_difference
from qlip.evaluation.report.result import EvalResult, Result
from qlip.evaluation.run.evaluate import new_result
from qlip.runtime.progress import OnProgress, no_progress
from qlip.runtime.workspace import Workspace

Answer = Callable[[Sequence[Image.Image] | None, Sequence[str]], Sequence[str]]
"""From an image per question, or None for none at all, and B questions, to B answers."""
Row = Literal["right", "shuffled", "blind"]
ROWS: tuple[Row, ...] = get_args(Row)
SPLITS = ("seen", "unseen_pair")
PER_KIND = 1000
TRAINED = 5000
"""Questions of each kind in training whose commonest answer the row majority gives."""
AT_ONCE = 64
MAX_TOKENS = 12
"""Longest answer to a question, in tokens."""
KEPT = 4
"""Batches of answers in one file of a resumable folder."""
TALKER = "VisionLanguageModel"
"""Kind of model in a result of answers."""
UM3 = "UM3"
"""Kind of a model that also draws."""
TITLES = {
    "right": "right, with their scenes",
    "shuffled": "control: right with other scenes",
    "blind": "control: right without an image",
    "majority": "control: the commonest answer of each kind in training",
}


class BatchChat(Protocol):
    """A model that answers batches, such as :class:`qlip.vlm.chat.VisionChat`."""

    def answer_batch(
        self, images: Sequence[Image.Image | None], questions: Sequence[str], *, max_tokens: int | None
    ) -> Sequence[str]:
        """Answer one question about each image, or without an image where it is None."""
        ...


def answer_of(chat: BatchChat, max_tokens: int = MAX_TOKENS) -> Answer:
    """Make the function that `collect` takes.

    Args:
        chat: model.
        max_tokens: of an answer; the right ones are single words.
    """

    def answer(images: Sequence[Image.Image] | None, questions: Sequence[str]) -> Sequence[str]:
        shown = [None] * len(questions) if images is None else images
        return chat.answer_batch(shown, questions, max_tokens=max_tokens)

    return answer


@dataclass(frozen=True)
class Answers:
    """Questions of a split and what a model answered.

    Attributes:
        split: of the questions.
        questions: N, kind by kind in turn.
        given: by row, N answers.
    """

    split: str
    questions: Sequence[Question]
    given: Mapping[Row, Sequence[str]]

    def right(self, row: Row) -> Tensor:
        """Answers of a row that are exactly right, (N,) bool."""
        pairs = zip(self.questions, self.given[row], strict=True)
        return torch.tensor([is_right(question, given) for question, given in pairs])


def is_right(question: Question, given: str) -> bool:
    """Return whether an answer is exactly right; case, spaces, a final period and digits for numbers do not matter."""
    return normalised(given) == question.answer


def normalised(answer: str) -> str:
    """Lower case, single spaces, no final period, and numbers of things as words."""
    text = " ".join(answer.lower().split()).removesuffix(".").rstrip()
    return NUMBERS[int(text) - 1] if text.isascii() and text.isdigit() and 0 < int(text) <= len(NUMBERS) else text


@cache
def questions_of(split: str, per_kind: int = PER_KIND) -> tuple[Question, ...]:
    """The first questions of a split, kind by kind in turn.

    Args:
        split: of :class:`SceneQuestions`.
        per_kind: questions of each kind, at least two.

    Raises:
        QLIPError: no such split, or it has not so many questions.
    """
    source, most = SceneQuestions(split), LENGTHS[split] // len(KINDS)
    if not 2 <= per_kind <= most:
        raise QLIPError(f"{per_kind:,} questions of each kind: {split} has 2 to {most:,}")
    return tuple(source[index] for index in range(per_kind * len(KINDS)))


def shuffled(questions: Sequence[Question]) -> list[Question]:
    """For each question the next one of its kind about another scene, which lends its image."""

    def other(at: int) -> Question:
        own, steps = questions[at], range(len(KINDS), len(questions), len(KINDS))
        return next(one for step in steps if (one := questions[(at + step) % len(questions)]).scene != own.scene)

    return [other(at) for at in range(len(questions))]


def collect(
    answer: Answer,
    split: str = "seen",
    per_kind: int = PER_KIND,
    *,
    rows: Sequence[Row] = ROWS,
    batch_size: int = AT_ONCE,
    work: Workspace | None = None,
    on_progress: OnProgress = no_progress,
) -> Answers:
    """Ask a model the questions of a split.

    Args:
        answer: the model; it takes PIL images, RGB, 64 x 64.
        split: of :class:`SceneQuestions`.
        per_kind: questions of each kind.
        rows: what to ask; blind asks each text once.
        batch_size: questions per call.
        work: folder that keeps finished answers, claimed by the caller; the next call continues there.
        on_progress: called with the number of questions asked since the last call.

    Raises:
        QLIPError: a wrong split or number, or a model that does not give one answer per question.
    """
    questions = questions_of(split, per_kind)
    given: dict[Row, list[str]] = {}
    for row in rows:
        texts, images = [one.text for one in questions], None
        if row == "blind":
            texts = list(dict.fromkeys(texts))
        else:
            images = questions if row == "right" else shuffled(questions)
        found: list[str] = []
        for start in range(0, len(texts), KEPT * batch_size):
            part = slice(start, start + KEPT * batch_size)
            name = f"answers/{split}-{row}-{start:06d}.json"
            if work is not None and work.done(name):
                kept = json.loads(work.read(name))
                on_progress(len(kept))
            else:
                shown = None if images is None else images[part]
                kept = _ask(answer, texts[part], shown, batch_size, on_progress)
                if work is not None:
                    work.write(name, json.dumps(kept).encode())
            found += kept
        by_text = dict(zip(texts, found, strict=True))
        given[row] = [by_text[one.text] for one in questions] if row == "blind" else found
    return Answers(split, questions, given)


def _ask(
    answer: Answer, texts: Sequence[str], shown: Sequence[Question] | None, batch_size: int, on_progress: OnProgress
) -> list[str]:
    found: list[str] = []
    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        images = None if shown is None else [one.image() for one in shown[part]]
        given = list(answer(images, texts[part]))
        if len(given) != len(texts[part]) or not all(isinstance(one, str) for one in given):
            raise QLIPError(f"the model gave {len(given)} answers to {len(texts[part])} questions; give one text each")
        found += given
        on_progress(len(given))
    return found


@cache
def majority(trained: int = TRAINED) -> dict[str, str]:
    """The commonest answer of each kind among the first questions of training.

    Args:
        trained: questions of each kind.
    """
    found = dict[str, str]()
    for place, kind in enumerate(KINDS):
        indices = range(place, trained * len(KINDS), len(KINDS))
        counts = Counter(text_and_answer(kind, "train", index)[1] for index in indices)
        found[kind] = counts.most_common(1)[0][0]
    return found


def score(answers: Answers) -> MetricResult:
    """Make metrics of answers, in percent with Wilson's 95% intervals, of all questions and of each kind.

    Returns:
        ``right``, ``shuffled``, ``blind`` (the rows that were asked) and ``majority``, each also as ``<row>_<kind>``,
        and ``above_shuffled``, right minus shuffled in points with the interval of paired answers, also by kind.
    """
    common = majority()
    columns: dict[str, Tensor] = {row: answers.right(row) for row in answers.given}
    columns["majority"] = torch.tensor([common[one.kind] == one.answer for one in answers.questions])
    kinds = np.array([one.kind for one in answers.questions])
    result = MetricResult({})
    for name, column in columns.items():
        better = "higher" if name == "right" else ""
        if name == "right":
            result.add_mean("right", column, unit="%", better=better, scale=100)
        for kind, picked in _parts(kinds):
            result.values[_metric(name, kind)] = mean(column[picked], unit="%", better=better, scale=100)
    if {"right", "shuffled"} <= columns.keys():
        for kind, picked in _parts(kinds):
            if (above := share_difference(columns["right"][picked], columns["shuffled"][picked])) is not None:
                result.values[_metric("above_shuffled", kind)] = above
    result.notes = {name: title for name, title in TITLES.items() if name in columns}
    result.keep_keys([one.key for one in answers.questions])
    return result


def result(
    subject: Mapping[str, str],
    answers: Sequence[Answers],
    scores: Sequence[MetricResult],
    device: torch.device,
    options: Mapping[str, object] | None = None,
) -> Result:
    """Make a result that ``qlip compare`` takes, with a row for each split.

    Args:
        subject: ``name`` of the model in tables and its ``fingerprint``.
        answers: of each split.
        scores: :func:`score` of each.
        device: that answered.
        options: JSON of all that the answers depend on besides the model.
    """
    rows = [answers_row(one, found, options) for one, found in zip(answers, scores, strict=True)]
    return result_of({"kind": TALKER, **subject}, rows, device)


def result_of(subject: Mapping[str, str], rows: Sequence[EvalResult], device: torch.device) -> Result:
    """Make a result of rows.

    Args:
        subject: ``kind`` and ``name`` of the model in tables, and its ``fingerprint``.
        rows: of this module and its neighbours.
        device: that answered.
    """
    return new_result({"device": device.type, **subject}, list(rows), device)


def answers_row(answers: Answers, found: MetricResult, options: Mapping[str, object] | None = None) -> EvalResult:
    """Make a row of a result.

    Args:
        answers: of a split.
        found: :func:`score` of them.
        options: JSON of all that the answers depend on besides the model.
    """
    return EvalResult(
        evaluator="scene_questions",
        options=dict(options or {}),
        settings={"split": answers.split, "per_kind": len(answers.questions) // len(KINDS)},
        title=f"questions about made scenes, {answers.split.replace('_', ' ')}",
        data=f"scene questions:{answers.split}",
        count=len(answers.questions),
        limit=len(answers.questions),
        broken=[],
        preparation=f"{SIDE}x{SIDE}",
        as_shipped=True,
        digest=_digest(answers.questions),
        values=found.values,
        notes=found.notes,
    )


def _parts(kinds: np.ndarray) -> list[tuple[str, Tensor]]:
    """All questions under "", then those of each kind: (N,) bool."""
    every = torch.ones(len(kinds), dtype=torch.bool)
    return [("", every), *((kind, torch.from_numpy(kinds == kind)) for kind in KINDS)]


def _metric(row: str, kind: str) -> str:
    return f"{row}_{kind}" if kind else row


def _digest(questions: Sequence[Question]) -> str:
    text = "".join(f"{one.key}\0{one.text}\0{one.answer}\0{one.scene}\n" for one in questions)
    return hashlib.sha256(text.encode()).hexdigest()
