"""Functions of the tasks `qlip_scenes_*`: questions about made scenes, see `qlip.data.public.scene_questions`.

A task's table has one row with the split's name; `questions` replaces it by the first `PER_KIND` questions of each
kind. Images are drawn when they are asked for. The tasks come three times: with their images, with those of other
questions (`shuffled`), and without (`blind`), since only the distance between them shows that a model looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from qlip.data.public.scene_questions import SceneQuestions
from qlip.evaluation.run.scene_answers import PER_KIND, is_right, questions_of
from qlip.evaluation.run.scene_answers import shuffled as others_of

Document = Mapping[str, Any]


def questions(table: Any) -> Any:
    """Return a table of questions for a table (of the package ``datasets``) that names their split."""
    every = questions_of(str(table[0]["split"]), PER_KIND)
    return type(table).from_list(
        [
            {"split": one.split, "index": one.index, "other": other.index}
            | {"kind": one.kind, "question": one.text, "answer": one.answer}
            for one, other in zip(every, others_of(every), strict=True)
        ]
    )


def text_of(document: Document, lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    """Return the question, with the text behind it that a model's settings ask for."""
    return f"{document['question']}{(lmms_eval_specific_kwargs or {}).get('post_prompt', '')}"


def images_of(document: Document) -> list[Image.Image]:
    """Return the question's image, in a list."""
    return [SceneQuestions(document["split"])[document["index"]].image()]


def shuffled_images_of(document: Document) -> list[Image.Image]:
    """Return the image of another question of the kind, in a list."""
    return [SceneQuestions(document["split"])[document["other"]].image()]


def no_images_of(document: Document) -> list[Image.Image]:
    """Return no image."""
    return []


def results_of(document: Document, answers: Sequence[str]) -> dict[str, float]:
    """Return 1 for a right answer, else 0: over all kinds, and for the question's kind."""
    right = float(is_right(SceneQuestions(document["split"])[document["index"]], answers[0]))
    return {"right": right, f"right_{document['kind']}": right}
