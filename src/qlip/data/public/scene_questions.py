"""Questions about made scenes, each with one right answer of one word.

Question `index` of a split is a function of the split's name and the index: its kind is ``KINDS[index % 7]``, its text
and answer are sampled first, and then a scene that they fit, so that answers are balanced and a text says little about
its answer. No question is ambiguous: a thing that is named in the singular is there once, and centres of things keep a
distance from the borders of rows and columns and from the diagonals between relations.

    exists     Is there a red circle?                              yes, no
    count      How many circles are there?                         one, two, three, four, five
    colour     What colour is the cross?                           red, ...
    shape      What shape is red?                                  circle, ...
    row        Which row is the red circle in?                     top, middle, bottom
    column     Which column is the cross in?                       left, middle, right
    relation   Where is the cross relative to the red circle?      left, right, above, below

Scenes and questions of ``train`` and ``seen`` never show or name the pairs of colour and shape in `HELD_OUT_PAIRS`;
every question of ``unseen_pair`` is about one of them, beside other things.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from PIL import Image

from qlip.data.public.builder import encode
from qlip.data.public.scene_captions import CLEARLY, HELD_OUT_PAIRS, RELATIONS, CaptionedScenes, holds, plural
from qlip.data.public.scenes import BACKGROUNDS, COLOURS, SIDE, STANDARD, Scene, Thing, choose, draw, placed
from qlip.errors import QLIPError
from qlip.files import write_bytes, write_text
from qlip.runtime.progress import OnProgress, no_progress
from qlip.runtime.rng import generator

Kind = Literal["exists", "count", "colour", "shape", "row", "column", "relation"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NUMBERS = ("one", "two", "three", "four", "five")
THIRDS: dict[Kind, tuple[str, str, str]] = {"row": ("top", "middle", "bottom"), "column": ("left", "middle", "right")}
ANSWERS: dict[Kind, tuple[str, ...]] = {
    "exists": ("yes", "no"),
    "count": NUMBERS,
    "colour": tuple(COLOURS),
    "shape": STANDARD.shapes,
    "row": THIRDS["row"],
    "column": THIRDS["column"],
    "relation": tuple(RELATIONS),
}
"""All answers of a kind; at most one is right."""
FROM_BORDER = 3.0
"""Minimum distance of a centre from the borders of rows and columns, pixels, where it is asked for."""

LENGTHS = {"train": 1_400_000, "seen": 14_000, "unseen_pair": 14_000}
"""Questions of each split, as many of each kind."""

FORMS: dict[Kind, tuple[str, ...]] = {
    "exists": ("Is there {a}?", "Do you see {a}?", "Does the image show {a}?"),
    "count": ("How many {many} are there?", "How many {many} do you see?", "Count the {many}."),
    "colour": ("What colour is the {one}?", "Which colour does the {one} have?", "Name the colour of the {one}."),
    "shape": ("What shape is {one}?", "Which shape is {one}?", "Name the {one} shape."),
    "row": (
        "Which row is the {one} in?",
        "Is the {one} in the top, middle or bottom row?",
        "Name the row of the {one}: top, middle or bottom.",
    ),
    "column": (
        "Which column is the {one} in?",
        "Is the {one} in the left, middle or right column?",
        "Name the column of the {one}: left, middle or right.",
    ),
    "relation": (
        "Where is the {one} relative to the {other}?",
        "Is the {one} left, right, above or below the {other}?",
        "Relative to the {other}, where is the {one}?",
    ),
}
"""Wordings of a question; the first is the plainest."""
DESCRIBE = ("Describe the image.", "What does the image show?", "What do you see?")

Pair = tuple[str, str]
"""Colour and shape."""
TRAINED_PAIRS: tuple[Pair, ...] = tuple(
    pair for pair in itertools.product(COLOURS, STANDARD.shapes) if pair not in HELD_OUT_PAIRS
)
UNSEEN_PAIRS: tuple[Pair, ...] = tuple(
    pair for pair in itertools.product(COLOURS, STANDARD.shapes) if pair in HELD_OUT_PAIRS
)


@dataclass(frozen=True)
class Question:
    """A question about a scene, and its answer.

    Attributes:
        kind: one of `KINDS`, or "caption".
        text: the question.
        answer: right answer, lower case without punctuation.
        scene: what the image shows.
        split, index: what the question is a function of.
    """

    kind: str
    text: str
    answer: str
    scene: Scene
    split: str
    index: int

    @property
    def key(self) -> str:
        """Name of the question and its image."""
        return f"{self.split}-{self.index:07d}"

    def image(self) -> Image.Image:
        """Draw the scene, RGB, 64 x 64."""
        return draw(self.scene)

    def record(self, image: str) -> dict[str, Any]:
        """Return the question as an item of a LLaVA JSON.

        Args:
            image: path of the image's file, as the JSON names it.
        """
        turns = [{"from": "human", "value": f"<image>\n{self.text}"}, {"from": "gpt", "value": self.answer}]
        return {"id": self.key, "image": image, "conversations": turns}


class Subject(NamedTuple):
    """Things that a question names; None stands for any colour or shape."""

    colour: str | None
    shape: str | None

    def matches(self, pair: Pair) -> bool:
        """Return whether it names a thing of a colour and shape."""
        return self.colour in (None, pair[0]) and self.shape in (None, pair[1])

    def __str__(self) -> str:
        return " ".join(word for word in (self.colour, self.shape or "shape") if word)

    @property
    def some(self) -> str:
        """With its article."""
        return f"{'an' if str(self)[0] in 'aeiou' else 'a'} {self}"

    @property
    def many(self) -> str:
        """In the plural."""
        return " ".join(word for word in (self.colour, plural(self.shape or "shape")) if word)


def parse_question(text: str) -> tuple[Kind, tuple[Subject, ...]]:
    """Read the kind of a question, and what it names: the first thing, and that which it is relative to.

    Raises:
        QLIPError: it has none of the wordings in `FORMS`.
    """
    for kind, pattern in _PATTERNS:
        if found := pattern.fullmatch(text):
            named = found.groupdict()
            return kind, tuple(_subject(named[name]) for name in ("a", "many", "one", "other") if named.get(name))
    raise QLIPError(f"question {text!r}: is about no made scene; one reads like 'Is there a red circle?'")


def _subject(words: str) -> Subject:
    """Read a name in the singular or plural, such as "red circles", "shape" or "red"."""
    found = words.split()
    shape = next((one for one in STANDARD.shapes if found[-1] in (one, plural(one))), None)
    return Subject(next((one for one in COLOURS if one in found), None), shape)


_SHAPES = (*STANDARD.shapes, "shape")
_COLOUR = "|".join(COLOURS)
_NAME = f"(?:(?:{_COLOUR}) )?(?:{'|'.join(_SHAPES)})|{_COLOUR}"
_NAMES = f"(?:(?:{_COLOUR}) )?(?:{'|'.join(map(plural, _SHAPES))})"
_PATTERNS = [
    (
        kind,
        re.compile(
            re.escape(form)
            .replace(r"\{a\}", f"an? (?P<a>{_NAME})")
            .replace(r"\{many\}", f"(?P<many>{_NAMES})")
            .replace(r"\{one\}", f"(?P<one>{_NAME})")
            .replace(r"\{other\}", f"(?P<other>{_NAME})")
        ),
    )
    for kind, forms in FORMS.items()
    for form in forms
]


class SceneQuestions:
    """All questions of a split, made when they are read.

    Args:
        split: one of `LENGTHS`.

    Raises:
        QLIPError: no such split.
    """

    def __init__(self, split: str) -> None:
        if split not in LENGTHS:
            raise QLIPError(f"questions about scenes have the splits {', '.join(LENGTHS)}; got {split!r}")
        self.split = split

    def __len__(self) -> int:
        return LENGTHS[self.split]

    def __getitem__(self, index: int) -> Question:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return ask(KINDS[index % len(KINDS)], self.split, index)

    def of_kind(self, kind: Kind, count: int) -> Iterator[Question]:
        """Yield the first questions of a kind."""
        return (self[len(KINDS) * number + KINDS.index(kind)] for number in range(count))


def caption_question(split: str, index: int) -> Question:
    """A captioned scene as a question: "Describe the image.", with the caption as its answer.

    Args:
        split: one of :data:`qlip.data.public.scene_captions.SPLITS`.
        index: of the scene.
    """
    description, scene = CaptionedScenes(split).scene(index)
    text = choose(generator("scene descriptions", split, index), DESCRIBE)
    return Question("caption", text, description.caption, scene, split, index)


def write_llava(folder: Path, questions: Iterable[Question], on_progress: OnProgress = no_progress) -> Path:
    """Write questions in the layout that LLaVA trains on: ``questions.json`` and PNG files below ``images``.

    Args:
        folder: for the files; ``--image_folder`` of LLaVA.
        questions: of any splits.
        on_progress: called after each question.

    Returns:
        Path of the JSON.
    """
    records = []
    for question in questions:
        name = f"images/{question.index // 1000:04d}/{question.key}.png"
        write_bytes(folder / name, encode(question.image(), "png"), durable=False)
        records.append(question.record(name))
        on_progress(1)
    path = folder / "questions.json"
    write_text(path, json.dumps(records, indent=1))
    return path


# ---------------------------------------------------------------- making


@dataclass(frozen=True)
class _Plan:
    """A question without its scene.

    Attributes:
        words: for the placeholders of the wordings.
        answer: right answer.
        subjects: pairs of the things that are asked for, which are placed first.
        others: pairs of the other things.
        fits: says of the subjects' things whether the answer holds clearly.
    """

    words: dict[str, str]
    answer: str
    subjects: Sequence[Pair]
    others: Sequence[Pair]
    fits: Callable[[Sequence[Thing]], bool] = lambda things: True


def ask(kind: Kind, split: str, index: int) -> Question:
    """Make question `index` of a split, of any kind."""
    rng, plan, text = _planned(kind, split, index)
    return Question(kind, text, plan.answer, _scene(rng, plan), split, index)


def text_and_answer(kind: Kind, split: str, index: int) -> tuple[str, str]:
    """Text and answer of question `index` of a split; its scene, which takes ten times as long, is not made."""
    _, plan, text = _planned(kind, split, index)
    return text, plan.answer


def _planned(kind: Kind, split: str, index: int) -> tuple[np.random.Generator, _Plan, str]:
    rng = generator("scene questions", split, index)
    plan = _PLANS[kind](rng, split == "unseen_pair")
    return rng, plan, choose(rng, FORMS[kind]).format(**plan.words)


def _scene(rng: np.random.Generator, plan: _Plan) -> Scene:
    background = choose(rng, tuple(BACKGROUNDS))
    while True:  # with new sizes and places
        things: list[Thing] = []
        for number, (colour, shape) in enumerate((*plan.subjects, *plan.others)):
            if number == len(plan.subjects) and not plan.fits(things):
                break
            thing = placed(rng, shape, colour, choose(rng, tuple(STANDARD.sizes)), things, STANDARD)
            if thing is None:
                break
            things.append(thing)
        else:
            if plan.fits(things):
                return Scene(background, tuple(things), STANDARD)


def _pair(rng: np.random.Generator, unseen: bool) -> Pair:
    return choose(rng, UNSEEN_PAIRS if unseen else TRAINED_PAIRS)


def _others(rng: np.random.Generator, most: int, *subjects: Subject) -> list[Pair]:
    """Up to `most` things that none of the subjects names."""
    free = [pair for pair in TRAINED_PAIRS if not any(one.matches(pair) for one in subjects)]
    return [choose(rng, free) for _ in range(int(rng.random() * (most + 1)))]


def _named(rng: np.random.Generator, pair: Pair, unseen: bool) -> Subject:
    """A thing by colour and shape, or by one of them; an unseen pair by both."""
    colour, shape = pair
    names = [Subject(colour, shape), Subject(None, shape), Subject(colour, None)]
    return choose(rng, names[:1] if unseen else names)


def _exists(rng: np.random.Generator, unseen: bool) -> _Plan:
    """Half of the scenes without a named pair show its colour and its shape on two things."""
    subject = _named(rng, pair := _pair(rng, unseen), unseen)
    free = [one for one in TRAINED_PAIRS if not subject.matches(one)]
    alike = [[one for one in free if one[part] == pair[part]] for part in (0, 1)]
    others = [choose(rng, some) for some in alike if some] if rng.random() < 0.5 else [choose(rng, free)]
    others += _others(rng, 2, subject)
    if rng.random() < 0.5:
        return _Plan({"a": subject.some}, "no", (), others)
    shown = choose(rng, [one for one in (UNSEEN_PAIRS if unseen else TRAINED_PAIRS) if subject.matches(one)])
    return _Plan({"a": subject.some}, "yes", (shown,), others[1:])


def _count(rng: np.random.Generator, unseen: bool) -> _Plan:
    subject = _named(rng, _pair(rng, unseen), unseen)
    if not unseen and rng.random() < 0.25:
        subject = Subject(None, None)
    count = choose(rng, range(1, STANDARD.max_things + 1))
    matching = [one for one in (UNSEEN_PAIRS if unseen else TRAINED_PAIRS) if subject.matches(one)]
    others = _others(rng, STANDARD.max_things - count, subject) if subject.colour or subject.shape else []
    return _Plan({"many": subject.many}, NUMBERS[count - 1], [choose(rng, matching) for _ in range(count)], others)


def _colour(rng: np.random.Generator, unseen: bool) -> _Plan:
    colour, shape = _pair(rng, unseen)
    return _Plan({"one": shape}, colour, ((colour, shape),), _others(rng, 4, Subject(None, shape)))


def _shape(rng: np.random.Generator, unseen: bool) -> _Plan:
    colour, shape = _pair(rng, unseen)
    return _Plan({"one": colour}, shape, ((colour, shape),), _others(rng, 4, Subject(colour, None)))


def _third(rng: np.random.Generator, unseen: bool, kind: Kind) -> _Plan:
    subject = _named(rng, pair := _pair(rng, unseen), unseen)
    number = choose(rng, range(3))

    def fits(things: Sequence[Thing]) -> bool:
        centre = things[0].y if kind == "row" else things[0].x
        return all(int(3 * (centre + off) / SIDE) == number for off in (-FROM_BORDER, FROM_BORDER))

    return _Plan({"one": str(subject)}, THIRDS[kind][number], (pair,), _others(rng, 4, subject), fits)


def _relation(rng: np.random.Generator, unseen: bool) -> _Plan:
    while True:
        pairs = [_pair(rng, unseen), _pair(rng, False)]
        subjects = [_named(rng, pairs[0], unseen), _named(rng, pairs[1], False)]
        if not subjects[0].matches(pairs[1]) and not subjects[1].matches(pairs[0]):
            break
    if rng.random() < 0.5:
        pairs.reverse()
        subjects.reverse()
    relation = choose(rng, tuple(RELATIONS))

    def fits(things: Sequence[Thing]) -> bool:
        first, second = things[:2]
        return holds(relation, second.x - first.x, second.y - first.y, CLEARLY)

    words = {"one": str(subjects[0]), "other": str(subjects[1])}
    return _Plan(words, relation, pairs, _others(rng, 3, *subjects), fits)


_PLANS: dict[Kind, Callable[[np.random.Generator, bool], _Plan]] = {
    "exists": _exists,
    "count": _count,
    "colour": _colour,
    "shape": _shape,
    "row": lambda rng, unseen: _third(rng, unseen, "row"),
    "column": lambda rng, unseen: _third(rng, unseen, "column"),
    "relation": _relation,
}
