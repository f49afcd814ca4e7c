"""Scores of public benchmarks from answers, by the rules of their scorers.

POPE (arXiv 2305.10355) by two rules, MME (arXiv 2306.13394), and MM-Vet's answers (arXiv 2308.02490) in the layout
that its scorer reads. None of them needs a judge model. Answers are texts as a model gave them; labels are "yes" or
"no".
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from qlip.errors import QLIPError
from qlip.files import write_text

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


class Pope(NamedTuple):
    """Scores of POPE in percent.

    Attributes:
        accuracy: answers that are the label.
        precision, recall, f1: of "yes"; 0 where they are undefined.
        yes_ratio: answers that are "yes".
        unread: answers that are neither "yes" nor "no".
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    unread: float


def read_as_llava(answer: str) -> str:
    """Read an answer as LLaVA's ``eval_pope.py``: "no" if the first sentence has the word No, no or not, else "yes"."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def read_as_lmms(answer: str) -> str:
    """Read an answer as lmms-eval's task ``pope``: it must be "yes" or "no", but for case and surrounding spaces."""
    return answer.lower().strip()


POPE_RULES: dict[str, Callable[[str], str]] = {"llava": read_as_llava, "lmms-eval": read_as_lmms}


def pope(answers: Sequence[str], labels: Sequence[str]) -> dict[str, Pope]:
    """Score answers to POPE's questions by both rules; figures of different rules are not comparable.

    lmms-eval leaves answers that are neither "yes" nor "no" out of the recall, and so does its row here; the ratio of
    "yes" that it prints is that of the labels, whereas `Pope.yes_ratio` is of the answers.

    Args:
        answers: N texts.
        labels: N of "yes" and "no".

    Returns:
        Scores by rule, "llava" and "lmms-eval".

    Raises:
        QLIPError: no answers, not one label per answer, or another label.
    """
    _check(answers, labels)
    return {name: _pope([read(one) for one in answers], labels) for name, read in POPE_RULES.items()}


def _pope(answers: Sequence[str], labels: Sequence[str]) -> Pope:
    count = dict.fromkeys((("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no")), 0)
    for pair in zip(answers, labels, strict=True):
        if pair in count:
            count[pair] += 1
    total, hits = len(answers), count["yes", "yes"]
    precision = _percent(hits, hits + count["yes", "no"])
    recall = _percent(hits, hits + count["no", "yes"])
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return Pope(
        _percent(hits + count["no", "no"], total),
        precision,
        recall,
        f1,
        _percent(sum(one == "yes" for one in answers), total),
        _percent(sum(one not in ("yes", "no") for one in answers), total),
    )


class Mme(NamedTuple):
    """Scores of a category of MME in percent.

    Attributes:
        accuracy: questions answered right.
        accuracy_plus: images of whose two questions both are answered right.
    """

    accuracy: float
    accuracy_plus: float

    @property
    def score(self) -> float:
        """Sum of both, at most 200."""
        return self.accuracy + self.accuracy_plus


def read_as_mme(answer: str) -> str:
    """Read an answer by MME's rule: "yes" or "no" in its first four letters, or a lone y or n; else "other"."""
    text = answer.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return "yes" if text == "y" else "no"
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def mme(
    answers: Sequence[str], labels: Sequence[str], images: Sequence[str], categories: Sequence[str]
) -> dict[str, Mme]:
    """Score answers to MME's questions by category; see :func:`mme_total`.

    Args:
        answers: N texts.
        labels: N of "yes" and "no".
        images: N names; each has two questions in its category.
        categories: N names.

    Raises:
        QLIPError: no answers, lists of different lengths, another label, or an image without its two questions.
    """
    _check(answers, labels, images, categories)
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for answer, label, image, category in zip(answers, labels, images, categories, strict=True):
        right[category][image].append(read_as_mme(answer) == label)
    found = {}
    for category, by_image in right.items():
        for image, several in by_image.items():
            if len(several) != 2:
                raise QLIPError(f"MME asks two questions about an image; {category} has {len(several)} about {image}")
        pairs = list(by_image.values())
        both = _percent(sum(all(one) for one in pairs), len(pairs))
        found[category] = Mme(_percent(sum(map(sum, pairs)), 2 * len(pairs)), both)
    return found


def mme_total(scores: Mapping[str, Mme], categories: Iterable[str] = PERCEPTION) -> float:
    """Sum of the scores of categories, at most 2,000 of `PERCEPTION` and 800 of `COGNITION`; absent ones count 0."""
    return sum(scores[name].score for name in categories if name in scores)


def write_mmvet(path: Path, answers: Mapping[str, str]) -> None:
    """Write answers as MM-Vet's scorer reads them: one JSON object from ids such as ``v1_0`` to texts.

    Args:
        path: of the file.
        answers: by id, with or without the prefix ``v1_``.
    """
    named = {name if name.startswith("v1_") else f"v1_{name}": text for name, text in answers.items()}
    write_text(path, json.dumps(named, indent=2))


def _check(answers: Sequence[str], labels: Sequence[str], *others: Sequence[str]) -> None:
    if not answers or any(len(one) != len(answers) for one in (labels, *others)):
        lengths = ", ".join(str(len(one)) for one in (answers, labels, *others))
        raise QLIPError(f"lists of {lengths} entries; give one label for each answer, and at least one")
    if wrong := set(labels) - {"yes", "no"}:
        raise QLIPError(f"label {min(wrong)!r}: labels are 'yes' and 'no'")


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0
