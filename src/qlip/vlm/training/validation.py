"""Exact answers to held-out questions about made scenes, between the steps of a training."""

from __future__ import annotations

from contextlib import nullcontext

from qlip.data.public.scene_questions import KINDS
from qlip.evaluation.run.scene_answers import answer_of, collect
from qlip.training.log.eval_context import Applied, evaluating
from qlip.training.log.runlog import RunLog
from qlip.vlm.chat import VisionChat
from qlip.vlm.training.start import Start


class AnswersHook:
    """Logs percentages of exactly right answers: ``right``, of each kind, and ``shuffled``, with other scenes' images.

    A model that answers from the language alone has equal right and shuffled.

    Args:
        start: the model that trains, its tokenizer and preprocessing.
        split: of the questions.
        per_kind: questions of each kind.
        every: steps between two measurements.
    """

    def __init__(self, start: Start, split: str, per_kind: int, every: int) -> None:
        self.start, self.split, self.per_kind, self.every = start, split, per_kind, every

    def __call__(self, step: int, log: RunLog, applied: Applied = nullcontext) -> None:
        """Measure if it is due; all ranks call it, and all measure the same."""
        if step % self.every:
            return
        model = self.start.model
        with evaluating(model.device, log.clock, applied, model):
            answer = answer_of(VisionChat(model, self.start.tokenizer, self.start.preprocessing))
            answers = collect(answer, self.split, self.per_kind, rows=("right", "shuffled"))
        right, shuffled = (100 * answers.right(row).double() for row in ("right", "shuffled"))
        values = {"right": float(right.mean()), "shuffled": float(shuffled.mean())}
        values |= {kind: float(right[number :: len(KINDS)].mean()) for number, kind in enumerate(KINDS)}
        log.validation(step, f"questions {self.split}", values)
