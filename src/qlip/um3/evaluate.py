"""Both directions of a UM3 measured from one checkpoint, each with controls without the right image or caption.

Captions of held-out made scenes by the exact parser, answers to questions about them, drawings of their captions by the
exact checker, and bits per byte of texts. `answer_of` and `drawing_of` make the functions that the scorers of
`qlip.evaluation` take; `measure` runs all of them and returns rows of one result. A control is "shuffled", against
another scene, or "blind", without the image or the caption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from qlip.data.public.scenes import SIDE
from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import MetricResult, MetricValue, mean
from qlip.evaluation.prompt_suites import Suite, draw_suite, scenes, score_scenes
from qlip.evaluation.prompt_suites.run import Draw
from qlip.evaluation.prompt_suites.scenes import scenes_row
from qlip.evaluation.report.result import EvalResult
from qlip.evaluation.run.scene_answers import SPLITS, Answer, answers_row, collect, score
from qlip.evaluation.run.scene_captions import ONE_OBJECT, captions_row, collect_captions, score_captions
from qlip.lm.causal import CausalModel
from qlip.lm.guidance import Guidance
from qlip.lm.sampling import Sampling
from qlip.lm.tokenizer import LLMTokenizer
from qlip.runtime.progress import OnProgress, no_progress
from qlip.runtime.workspace import Workspace
from qlip.um3.data.config import TextSource
from qlip.um3.data.texts import Broken, read_texts
from qlip.um3.drawing import UM3Drawing
from qlip.um3.generate import generate
from qlip.um3.session import Part, UM3Chat
from qlip.um3.text_eval import measure_texts

MAX_TOKENS = 48
"""Longest caption or answer, in ids."""
GREEDY = Sampling(temperature=0.0)
GREY = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
"""Shown where nothing else begins a document: for a caption without an image."""
Measured = tuple[EvalResult, MetricResult]


@dataclass(frozen=True)
class DrawSettings:
    """How scenes are drawn.

    Attributes:
        seed: of the noise.
        guidance, sampling: instead of the model's; None takes those.
    """

    seed: int = 0
    guidance: Guidance | None = None
    sampling: Sampling | None = None


def answer_of(chat: UM3Chat, max_tokens: int = MAX_TOKENS) -> Answer:
    """Make the function that `collect` and `collect_captions` take; an empty question asks for a caption.

    Args:
        chat: model; answers are the likeliest ids.
        max_tokens: of an answer.
    """

    def answer(images: Sequence[Image.Image] | None, texts: Sequence[str]) -> Sequence[str]:
        shown: list[list[Part]] = [[text] if text else [GREY] for text in texts]
        if images is not None:
            shown = [[image, *([text] if text else [])] for image, text in zip(images, texts, strict=True)]
        found = chat.generate(shown, generation_mode="text", max_tokens=max_tokens, sampling=GREEDY)
        return ["".join(part for part in parts if isinstance(part, str)).strip() for parts in found]

    return answer


def drawing_of(chat: UM3Chat, settings: DrawSettings, blind: bool = False) -> Draw:
    """Make the function that `draw_suite` takes.

    Args:
        chat: model.
        settings: of the drawings.
        blind: draw without the captions.
    """
    if not blind:
        return UM3Drawing(chat, settings.seed, settings.guidance, settings.sampling)

    def draw(captions: Sequence[str], numbers: Sequence[int]) -> list[Image.Image]:
        first = [] if chat.tokenizer.bos is None else [chat.tokenizer.bos]
        sampling = chat.settings.sampling() if settings.sampling is None else settings.sampling
        ids = generate(
            chat.model,
            [first for _ in captions],
            generation_mode="image",
            sampling=sampling,
            seed=settings.seed,
            numbers=numbers,
        )
        return chat.decode_image_tokens(torch.tensor([one[:-1] for one in ids]))

    return draw


def measure(
    chat: UM3Chat,
    work: Workspace,
    *,
    splits: Sequence[str] = SPLITS,
    per_kind: int = 1000,
    num_scenes: int = 400,
    drawing: DrawSettings = DrawSettings(),
    options: Mapping[str, object] | None = None,
    batch_size: int = 64,
    on_progress: OnProgress = no_progress,
) -> list[Measured]:
    """Measure captions, answers and drawings of made scenes.

    Args:
        chat: model.
        work: folder, claimed by the caller, that keeps finished answers, captions and drawings.
        splits: of the scenes.
        per_kind: questions of each kind, of each split.
        num_scenes: scenes that are described, and drawn, of each split.
        drawing: how scenes are drawn.
        options: JSON of all that the answers depend on besides the model.
        batch_size: questions, captions or drawings per batch.
        on_progress: called with the number of answers, captions and drawings since the last call; see `steps`.

    Returns:
        For each split a row of captions, of answers and of drawings, with their metrics.
    """
    answer, given = answer_of(chat), dict(options or {})
    found = list[Measured]()
    for split in splits:
        captions = collect_captions(
            answer, split, num_scenes, batch_size=batch_size, work=work, on_progress=on_progress
        )
        described = score_captions(captions)
        found.append((captions_row(captions, described, given), described))
        answers = collect(answer, split, per_kind, batch_size=batch_size, work=work, on_progress=on_progress)
        right = score(answers)
        found.append((answers_row(answers, right, given), right))
        suite = scenes(split, num_scenes)
        drawn = draw_scenes(chat, suite, work.path("drawn"), drawing, given, batch_size, on_progress)
        found.append((scenes_row(drawn, suite, given), drawn))
    return found


def draw_scenes(
    chat: UM3Chat,
    suite: Suite,
    folder: Path,
    settings: DrawSettings,
    options: Mapping[str, object],
    batch_size: int = 64,
    on_progress: OnProgress = no_progress,
) -> MetricResult:
    """Draw captions of scenes and check the drawings.

    Args:
        chat: model.
        suite: of scenes.
        folder: for the folders of drawings, with captions and without.
        settings: of the drawings.
        options: JSON of all that the drawings depend on.
        batch_size: drawings per batch.
        on_progress: called with the number of drawings since the last call.

    Returns:
        Metrics of :func:`qlip.evaluation.prompt_suites.score_scenes`, and the control ``scenes_blind``, drawings
        without a caption that are right by chance; right and blind also as ``..._one_object``. The table ``images``
        has blind verdicts too.
    """
    name = suite.name.partition(":")[2]
    places = {False: folder / name, True: folder / f"{name}-blind"}
    for blind, place in places.items():
        draw = drawing_of(chat, settings, blind)
        draw_suite(suite, draw, place, dict(options), batch_size=batch_size, on_progress=on_progress)
    found = score_scenes(suite, places[False], lambda images: chat.codec.decode(chat.codec.encode(images)))
    blind_images = score_scenes(suite, places[True], None).tables["images"]
    found.tables["images"] = [
        {**one, "blind": other["right"]} for one, other in zip(found.tables["images"], blind_images, strict=True)
    ]
    for column, part in (("blind", ""), ("right", "_one_object"), ("blind", "_one_object")):
        rows = [one for one in found.tables["images"] if not part or one["family"] in ONE_OBJECT]
        if rows:
            verdicts = torch.tensor([bool(one[column]) for one in rows])
            better = "higher" if column == "right" else ""
            found.values[f"scenes_{column}{part}"] = mean(verdicts, unit="%", better=better, scale=100)
    found.notes["scenes_blind"] = "control: drawn without the caption"
    return found


def read_documents(name: str) -> list[str]:
    """Read the documents of texts.

    Args:
        name: files, or a public dataset and its split, as a recipe's ``data.text.path``.

    Raises:
        QLIPError: no such files, one of another kind, or what is no text in them.
    """
    found = list(read_texts(TextSource(path=name).pattern))
    for one in found:
        if isinstance(one, Broken):
            raise QLIPError(f"{one.reason}; leave it out")
    return [one for one in found if isinstance(one, str)]


def steps(splits: int, questions: int, num_scenes: int) -> int:
    """Steps of `measure` that `on_progress` counts.

    Args:
        splits: number of splits.
        questions: number that `collect` asks, of all splits.
        num_scenes: of each split.
    """
    return questions + 3 * splits * num_scenes


def measure_text(
    chat: UM3Chat, name: str, texts: Iterable[str], before: tuple[CausalModel, LLMTokenizer] | None = None
) -> Measured:
    """Measure bits per byte of texts.

    Args:
        chat: model.
        name: of the texts.
        texts: documents.
        before: text decoder that the model grew from, or any other to compare with, and its tokenizer.

    Returns:
        ``bits_per_byte``; with `before` also ``bits_per_byte_before`` and their difference, ``bits_per_byte_more``.
    """
    documents = list(texts)
    found = measure_texts(chat.model, chat.tokenizer, documents)
    figures = {"bits_per_byte": found.bits_per_byte}
    if before is not None:
        other = measure_texts(*before, documents).bits_per_byte
        figures |= {"bits_per_byte_before": other, "bits_per_byte_more": found.bits_per_byte - other}
    result = MetricResult({})
    for metric, value in figures.items():
        better = "" if metric == "bits_per_byte_before" else "lower"
        result.values[metric] = MetricValue(value, count=found.num_documents, unit="bits", better=better)
    row = EvalResult(
        evaluator="text",
        settings={},
        title=f"text, {name}",
        data=name,
        count=found.num_documents,
        limit=None,
        broken=[],
        preparation="UTF-8",
        as_shipped=True,
        digest=hashlib.sha256("\0".join(documents).encode("utf-8", "surrogatepass")).hexdigest(),
        values=result.values,
        notes=result.notes,
    )
    return row, result
