"""The task ``vlm``: a text decoder learns to see, in LLaVA's two stages, by the likelihood of the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlip.data.loader.feed import PositionFeed
from qlip.errors import QLIPError
from qlip.training.costs import without_memory
from qlip.training.job import Hook, Job
from qlip.training.linear_task import LinearTask
from qlip.training.parallel.distributed import Parallel
from qlip.training.parallel.global_sums import global_sums
from qlip.training.plan import SAMPLES, Plan
from qlip.training.task import Frozen, Losses, LossInputs, Report, Wrap, unwrapped
from qlip.vlm.batch import Row, VLMBatch, stack
from qlip.vlm.config import IGNORED, IMAGE_ID
from qlip.vlm.conversations import ConversationFile
from qlip.vlm.data import ConversationData, open_feed
from qlip.vlm.model import param_groups
from qlip.vlm.training.question_feed import READ_FOR_VOCABULARY, first_texts, open_questions
from qlip.vlm.training.recipe import VLMRecipe
from qlip.vlm.training.start import Start, open_start, without_weights
from qlip.vlm.training.validation import AnswersHook


class SomeParameters(nn.Module):
    """A model reduced to the parameters that train, or to the others: its state is theirs alone.

    Args:
        model: with ``requires_grad`` set, and sharded if it is to be.
        training: take those that train.
    """

    def __init__(self, model: nn.Module, training: bool) -> None:
        super().__init__()
        self.model, self._wanted = model, training

    def named_parameters(self, *args: Any, **options: Any) -> Any:
        """Names in the model, and parameters."""
        named = self.model.named_parameters(*args, **options)
        return ((name, one) for name, one in named if one.requires_grad == self._wanted)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """Tensors of `named_parameters`, in place."""
        return {name: one.detach() for name, one in self.named_parameters()}


class VLMTask(LinearTask[VLMBatch]):
    """Mean negative log-likelihood of the labelled tokens of the global batch.

    Args:
        start: model, tokenizer and preprocessing.
        recipe: of the run.
        wrap: wraps the network for distributed training.
    """

    terms: ClassVar[Mapping[str, str]] = {"nats": "labels"}

    def __init__(self, start: Start, recipe: VLMRecipe, wrap: Wrap = unwrapped) -> None:
        self.vlm, self.start = start.model, start
        untrained = [one for one in start.model.parameters() if not one.requires_grad]
        super().__init__(
            start.model,
            recipe.optimizer,
            param_groups(start.model),
            lambda module, ignored=(): wrap(module, [*ignored, *untrained]),
            {str(part): rate for part, rate in recipe.optimizer.parts.items()},
        )
        self._trained = SomeParameters(start.model, training=True)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The parameters that train."""
        return {"model": self._trained}

    @property
    def frozen(self) -> Mapping[str, Frozen]:
        """Tower and text decoder, as far as they do not train."""
        parts = {name: SomeParameters(getattr(self.vlm, name), training=False) for name in self.start.sources}
        return {
            name: Frozen(part, self.start.sources[name]) for name, part in parts.items() if any(part.named_parameters())
        }

    def counts(self, batch: VLMBatch) -> Mapping[str, int]:
        """Number of labelled tokens, and of samples that were dropped or lost labels because they are too long."""
        cut = 0 if batch.cut_per_row is None else int(batch.cut_per_row.sum())
        return {"labels": batch.num_labels, "dropped": len(batch.skipped), "cut": cut}

    def sums(self, batch: VLMBatch) -> Mapping[str, Tensor]:
        """Summed nats of the labels."""
        if not len(batch):
            words = torch.zeros(2, dtype=torch.int64)
            batch = stack([Row([words], [words], 0)]).to(self.vlm.device)
            return {"nats": 0 * self.network(batch).sum()}
        return {"nats": self.network(batch).sum()}

    def loss(self, inputs: LossInputs) -> tuple[Losses, Report]:
        """See :class:`LinearTask`; the report has the counts of the global batch."""
        sums, counts = global_sums(inputs, self.vlm.device)
        mean = sums["nats"] / max(1.0, counts["labels"])
        return {"nats": mean}, {name: torch.tensor(count) for name, count in counts.items()}

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the model's folder, with its tokenizer, preprocessing and settings."""
        self.vlm.save_pretrained(folder, state=weights)
        self.start.save(folder)


class VLMKind:
    """The entry point ``vlm`` of the group ``qlip.tasks``."""

    Recipe = VLMRecipe
    folders: ClassVar = ()

    def build(self, recipe: VLMRecipe, parallel: Parallel, folder: Path) -> Job[Any]:
        """See :class:`qlip.training.job.Kind`."""
        if recipe.validation is not None and parallel.world > 1 and recipe.parallel.kind == "fsdp":
            raise QLIPError(f"{recipe.name}: validation answers on one rank's weights, which fsdp shards; remove it")
        start = parallel.all_or_none(lambda: open_start(recipe, partial(_texts, recipe)))
        if (adapters := start.model.config.lora) is not None:
            parallel.say(f"lora: {len(adapters.modules)} adapted layers: {', '.join(adapters.modules)}")
        feed = parallel.all_or_none(
            lambda: _feed(recipe, start, features=parallel.device.type == "cpu" and "tower" not in recipe.train)
        )
        start.model.to(parallel.device)
        task = VLMTask(start, recipe, parallel.wrap)
        hooks: list[Hook] = []
        if (section := recipe.validation) is not None:
            hooks.append(AnswersHook(start, section.questions, section.per_kind, section.every))
        trained = ", ".join(recipe.train)
        return Job(task, feed, hooks, describe=f"{feed.name}; trains {trained}")

    def plan(self, recipe: VLMRecipe) -> Plan:
        """See :class:`qlip.training.plan.Planned`; the samples are of full length, with one image each."""
        with without_memory():
            model, size = without_weights(recipe)
            start = Start(model, None, None, {"tower": "", "llm": ""})  # type: ignore[arg-type]
            task = VLMTask(start, recipe)
        image, length = model.config.num_image_tokens(size), recipe.data.max_length
        ids = torch.zeros(max(length, image + 2), dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        ids[:image], labels[image:] = IMAGE_ID, 1
        batch: Any = stack([Row([ids], [labels], 1)] * min(SAMPLES, recipe.batch_size))
        batch.images = torch.zeros(len(batch), 3, *size)
        return Plan(
            task,
            batch,
            {"tokens": float(len(ids)), "image tokens": float(image)},
            part=lambda name: name.partition(".")[0],
            config=model.config.to_dict(),
        )


def _feed(recipe: VLMRecipe, start: Start, features: bool) -> PositionFeed[VLMBatch]:
    """Open the feed of a recipe; with `features` its batches hold those of the frozen tower instead of pixels."""
    data = recipe.data
    dtype = next(start.model.tower.parameters()).dtype if features else None
    if data.questions is not None:
        return open_questions(recipe, start, dtype)
    assert data.conversations is not None
    conversations = ConversationData(
        ConversationFile(data.conversations),
        Path(data.conversations).parent if data.images is None else Path(data.images),
        Path(data.conversations).name,
        start.model.config,
        start.tokenizer,
        start.preprocessing,
        data.max_length,
        dtype,
    )
    return open_feed(
        conversations,
        recipe.batch_size,
        seed=recipe.seed,
        packing=data.packing,
        group_by_length=data.group_by_length,
        num_workers=data.num_workers,
    )


def _texts(recipe: VLMRecipe) -> Iterator[str]:
    """Texts of the first samples of a recipe, to train a vocabulary on."""
    if recipe.data.conversations is None:
        yield from first_texts(recipe)
        return
    conversations = ConversationFile(recipe.data.conversations)
    for number in range(min(READ_FOR_VOCABULARY, len(conversations))):
        yield from (turn.text for turn in conversations[number].turns)
