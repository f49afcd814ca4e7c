"""The task ``um3``: one decoder learns to read, to describe and to draw, by the likelihood of text and image tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlip.training.costs import without_memory
from qlip.training.job import Hook, Job
from qlip.training.linear_task import LinearTask
from qlip.training.parallel.distributed import Parallel
from qlip.training.parallel.global_sums import global_sums
from qlip.training.plan import SAMPLES, Plan
from qlip.training.task import Losses, LossInputs, Report, Wrap, unwrapped
from qlip.um3.batch import Row, UM3Batch, stack
from qlip.um3.config import UM3Config
from qlip.um3.data.documents import DocumentBuilder
from qlip.um3.data.feed import first_texts, open_feed
from qlip.um3.model import UM3, param_groups, z_loss
from qlip.um3.sequence import whole_image
from qlip.um3.training.measures import PARTS, Measures
from qlip.um3.training.norms import norms
from qlip.um3.training.recipe import UM3Recipe
from qlip.um3.training.start import Start, make_vocabulary, open_start, without_weights
from qlip.um3.training.validation import LikelihoodHook, held_out_sets

VOCABULARY = "vocabulary"
"""Folder of a run's own vocabulary."""


class UM3Task(LinearTask[UM3Batch]):
    """Mean negative log-likelihood of all targets of the global batch (eq. 6), weighted by the recipe.

    Args:
        model: in training mode.
        recipe: of the run.
        start: saves what stands beside the model; None for a dry run.
        wrap: wraps the network for distributed training.
    """

    terms: ClassVar[Mapping[str, str]] = {f"{kind}/{one}": f"{kind}/{one}" for kind, one in PARTS} | {"z": "z"}

    def __init__(self, model: UM3, recipe: UM3Recipe, start: Start | None, wrap: Wrap = unwrapped) -> None:
        super().__init__(model, recipe.optimizer, param_groups(model), wrap)
        self.um3, self.start, self.weights = model, start, recipe.losses
        self.measures = Measures(model.config, [] if start is None else start.tokenizer.token_texts())

    def counts(self, batch: UM3Batch) -> Mapping[str, int]:
        """Targets by kind and modality, bytes, words, and tokens that did not fit into the rows."""
        return self.measures.counts(batch)

    def sums(self, batch: UM3Batch) -> Mapping[str, Tensor]:
        """Summed nats by kind and modality, and the summed z-loss."""
        weight = 1.0
        if not len(batch):
            batch, weight = _dummy(self.um3.device), 0.0
        nats, norms = self.network(batch, norms=True)  # (B, T) each, 0 where there is no target
        found = self.measures.sums(batch, nats) | {"z": z_loss(norms).sum()}
        return {name: weight * one for name, one in found.items()}

    def loss(self, inputs: LossInputs) -> tuple[Losses, Report]:
        """See :class:`LinearTask`; the report has figures per byte, word and image, and the tokens dropped."""
        sums, counts = global_sums(inputs, self.um3.device)
        parts = [(f"{kind}/{one}", self._weight(kind, one)) for kind, one in PARTS]
        count = sum(weight * counts[name] for name, weight in parts)
        total = torch.stack([weight * sums[name] for name, weight in parts]).sum()
        losses = {"nats": total / max(count, 1.0)}
        report = self.measures.figures(sums, counts)
        if self.weights.z_loss:
            mean = sums["z"] / max(sum(counts[name] for name, _ in parts), 1.0)
            losses["z_loss"] = self.weights.z_loss * mean
            report["z"] = mean.detach()
        return losses, report | {"dropped": torch.tensor(counts["dropped"])}

    def _weight(self, kind: str, modality: str) -> float:
        """Weight of a target."""
        if modality == "visual":
            return self.weights.visual_weight
        return self.weights.caption_weight if (kind, modality) == ("image-to-text", "text") else 1.0

    def summary(self) -> Report:
        """Norms that drift first."""
        return norms(self.um3)

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the model's folder, with its tokenizer, preprocessing and settings."""
        assert self.start is not None
        self.um3.save_pretrained(folder, state=weights)
        self.start.save(folder)


def _dummy(device: torch.device) -> UM3Batch:
    """A row with one target of text, for a rank without samples."""
    return stack([Row("text", [torch.zeros(2, dtype=torch.int64)])], 2).to(device)


class UM3Kind:
    """The entry point ``um3`` of the group ``qlip.tasks``."""

    Recipe = UM3Recipe
    folders: ClassVar = (VOCABULARY,)

    def build(self, recipe: UM3Recipe, parallel: Parallel, folder: Path) -> Job[Any]:
        """See :class:`qlip.training.job.Kind`."""
        data, vocabulary = recipe.data, folder / VOCABULARY
        parallel.on_rank0(lambda: make_vocabulary(recipe.model, first_texts(data), vocabulary))
        start = parallel.all_or_none(lambda: open_start(recipe, vocabulary))
        model, tokenizer = start.model, start.tokenizer
        feed = parallel.all_or_none(lambda: open_feed(data, model.config, tokenizer, recipe.batch_size, recipe.seed))
        model.to(parallel.device)
        task = UM3Task(model, recipe, start, parallel.wrap)
        hooks: list[Hook] = []
        if (section := recipe.validation) is not None:
            builder = DocumentBuilder(model.config, tokenizer)
            sets = parallel.all_or_none(lambda: held_out_sets(section, data, builder))
            hooks.append(LikelihoodHook(task.network, model, task.measures, sets, section.every))
        kinds = ", ".join(data.kinds)
        return Job(task, feed, hooks, unit="tokens", units_per_sample=float(data.length), describe=f"rows of {kinds}")

    def plan(self, recipe: UM3Recipe) -> Plan:
        """See :class:`qlip.training.plan.Planned`; all rows are full, half of them of images, without their data."""
        with without_memory():
            model = without_weights(recipe)
            task = UM3Task(model, recipe, None)
        rows = _full_rows(model.config, recipe.data.length, recipe.data.has_images)
        batch: Any = stack((rows * SAMPLES)[: min(SAMPLES, recipe.batch_size)], recipe.data.length)
        units = {"tokens": float(recipe.data.length)}
        return Plan(task, batch, units, config=model.config.decoder.to_dict())


def _full_rows(config: UM3Config, length: int, images: bool) -> list[Row]:
    """A row of text, and with `images` one of an image with text behind it, both full, for a dry run."""
    text = torch.zeros(length, dtype=torch.int64)
    rows = [Row("text", [text])]
    if images:
        image = whole_image(config, torch.zeros(config.num_tokens, config.num_groups, dtype=torch.int64))
        rows.append(Row("image-to-text", [torch.cat([image, text[: length - len(image)]])]))
    return rows
