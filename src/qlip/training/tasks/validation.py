"""Held-out figures during training, by the evaluators that ``qlip eval`` runs."""

from __future__ import annotations

from contextlib import nullcontext
from uuid import uuid4

from rich.console import Console

from qlip.data.loader.eval_set import EvalSet
from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import Evaluator
from qlip.evaluation.evaluators.codebook import Codebook
from qlip.evaluation.evaluators.reconstruction import Reconstruction
from qlip.evaluation.evaluators.zero_shot import ZeroShot
from qlip.evaluation.models.base import QLIPEvalModel
from qlip.evaluation.run.datasets import open_evaluation
from qlip.evaluation.run.evaluate_dataset import evaluate_dataset
from qlip.modeling import QLIPModel, QLIPProcessor
from qlip.runtime.progress import print_line
from qlip.training.log.eval_context import Applied, evaluating
from qlip.training.log.runlog import RunLog
from qlip.training.tasks.recipe_schema import ValidationSection

BATCH_SIZE = 64


class ValidationHook:
    """Measures each set every so many steps: reconstruction, codes, and naming where the set has two labels or more.

    The model is in eval mode and computes in float32, as in ``qlip eval``; the training takes the same steps, to the
    bit, as one that is never measured. Every rank measures the whole of each set and the first writes: with sharded
    weights all ranks must run each forward pass together, and with copies the others would only wait.

    Args:
        settings: of the recipe.
        model: that trains, whose own methods run on all ranks together where its weights are sharded.
        processor: saved beside it.
        console: says what will be measured.
        aligned: the text tower is part of what trains; without it (stage 2) images are not named.

    Raises:
        QLIPError: no such set or templates, or a set without images.
    """

    def __init__(
        self,
        settings: ValidationSection,
        model: QLIPModel,
        processor: QLIPProcessor,
        console: Console,
        aligned: bool = True,
    ) -> None:
        self.every, self.model, self.processor = settings.every, model, processor
        self.naming = ZeroShot(templates=settings.templates)
        names_them = aligned and processor.tokenizer is not None
        self.sets: dict[str, tuple[EvalSet, bool]] = {}
        for name in settings.sets:
            data = open_evaluation(name, processor, settings.limit)
            if not len(data):
                raise QLIPError(f"validation.sets: {name} has no images")
            self.sets[name] = data, names_them and _has_labels(data)
        described = [
            f"{name} ({len(data):,} images{', classification too' if named else ''})"
            for name, (data, named) in self.sets.items()
        ]
        print_line(console, f"validation every {self.every} steps: {', '.join(described)}")

    def __call__(self, step: int, log: RunLog, applied: Applied = nullcontext) -> None:
        """Measure if it is due; all ranks call it."""
        if step % self.every:
            return
        with evaluating(self.model.device, log.clock, applied, self.model):
            for name in self.sets:
                log.validation(step, name, self.measure(name))

    def measure(self, name: str) -> dict[str, float]:
        """All figures of ``qlip eval`` for one of the sets, by name; the model is in eval mode."""
        data, named = self.sets[name]
        subject = QLIPEvalModel(self.model, self.processor, "in training", fingerprint=uuid4().hex)
        evaluators: list[Evaluator] = [Reconstruction(shrink=False), Codebook(), *([self.naming] if named else [])]
        found = evaluate_dataset(subject, data, evaluators, batch_size=BATCH_SIZE)
        assert found is not None
        return {key: one.value for finding in found.metric_results.values() for key, one in finding.values.items()}


def _has_labels(data: EvalSet) -> bool:
    """Two labels or more among its images, which are not decoded for it."""
    labels: set[str] = set()
    for index in range(len(data)):
        try:
            label = data.source.read(data.positions[index]).label
        except QLIPError:
            continue  # broken; the measurement counts it
        if label is not None:
            labels.add(label)
        if len(labels) > 1:
            return True
    return False
