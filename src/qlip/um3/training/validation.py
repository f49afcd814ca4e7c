"""Held-out texts, captions and images between the steps of a training: nats per word, bits per byte, bits per image.

Captions are measured with the right image and with another scene's, images with the right caption and with another's:
only the difference says that the model uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qlip.training.log.eval_context import Applied, evaluating
from qlip.training.log.runlog import RunLog
from qlip.um3.batch import DocumentKind, Row, UM3Batch, stack
from qlip.um3.data.config import DataSection, ImageSource
from qlip.um3.data.documents import DocumentBuilder
from qlip.um3.data.feed import open_sources
from qlip.um3.data.pairs import open_scenes
from qlip.um3.model import UM3
from qlip.um3.training.measures import Measures
from qlip.um3.training.recipe import ValidationSection

AT_ONCE = 16
"""Rows per forward pass."""


@dataclass(frozen=True)
class HeldOut:
    """A set of held-out documents.

    Attributes:
        name: of the set, in the log.
        rows: batches of documents by suffix of their figures: "" as they are, "_shuffled" with another image or text.
        figures: those of `Measures` that are logged.
    """

    name: str
    rows: Mapping[str, UM3Batch]
    figures: Sequence[str]


class LikelihoodHook:
    """Logs figures of held-out documents.

    Args:
        nats: batch to nats (B, T), on all ranks together.
        model: that trains.
        measures: of the model.
        sets: of documents; all ranks measure the same.
        every: steps between two measurements.
    """

    def __init__(
        self,
        nats: Callable[[UM3Batch], Tensor],
        model: UM3,
        measures: Measures,
        sets: Sequence[HeldOut],
        every: int,
    ) -> None:
        self.nats, self.model, self.measures, self.sets, self.every = nats, model, measures, sets, every

    def __call__(self, step: int, log: RunLog, applied: Applied = nullcontext) -> None:
        """Measure if it is due; all ranks call it."""
        if step % self.every:
            return
        with evaluating(self.model.device, log.clock, applied, self.model):
            found = self.measure()
        for name, values in found.items():
            log.validation(step, name, values)

    @torch.no_grad()
    def measure(self) -> dict[str, dict[str, float]]:
        """Return the figures of each set by its name; the model is in eval mode."""
        found = dict[str, dict[str, float]]()
        for one in self.sets:
            found.setdefault(one.name, {}).update(self._measured(one))
        return found

    def _measured(self, documents: HeldOut) -> dict[str, float]:
        found = dict[str, float]()
        for suffix, rows in documents.rows.items():
            figures = self._figures(rows)
            found |= {f"{name}{suffix}": float(figures[name]) for name in documents.figures}
        return found

    def _figures(self, rows: UM3Batch) -> dict[str, Tensor]:
        sums, counts = dict[str, Tensor](), dict[str, float]()
        for piece in rows.split(-(-len(rows) // AT_ONCE)):
            batch = piece.to(self.model.device)
            for name, one in self.measures.sums(batch, self.nats(batch)).items():
                sums[name] = sums.get(name, torch.zeros_like(one)) + one
            for name, number in self.measures.counts(batch).items():
                counts[name] = counts.get(name, 0) + number
        return self.measures.figures(sums, counts)


def held_out_sets(section: ValidationSection, data: DataSection, builder: DocumentBuilder) -> list[HeldOut]:
    """Read the sets of a recipe; with other images or texts those of the next scene.

    Args:
        section: of the recipe.
        data: of the recipe; gives the length of rows of text.
        builder: of the model's documents.

    Raises:
        QLIPError: no such split, or a text cannot be read.
    """
    found = list[HeldOut]()
    if section.scenes is not None:
        scenes = open_scenes(ImageSource(scenes=section.scenes), builder.config)
        batch = scenes.batch(np.arange(section.num_scenes))
        texts = [captions[0] for captions in batch.captions or ()]
        indices = list(batch.indices)
        others = [*indices[1:], indices[0]]
        logged: dict[DocumentKind, str] = {"image-to-text": "caption_per_word", "text-to-image": "image_bits"}
        for kind, figure in logged.items():
            right, shuffled = (_rows(kind, builder, texts, images) for images in (indices, others))
            name = f"scenes {section.scenes}"
            found.append(HeldOut(name, {"": right, "_shuffled": shuffled}, (figure,)))
    for source in section.text:
        one = DataSection(length=data.length, text=(source,))
        (text,) = open_sources(one, builder.config, builder.tokenizer, seed=0)
        numbers = np.arange(min(section.num_rows, text.size or section.num_rows))
        rows, _ = text.rows(np.zeros_like(numbers), numbers)
        name = Path(source.path).parent.name or Path(source.path.partition(":")[0]).stem
        found.append(HeldOut(f"text {name}", {"": stack(rows, data.length)}, ("text", "text_bits_per_byte")))
    return found


def _rows(kind: DocumentKind, builder: DocumentBuilder, texts: Sequence[str], images: Sequence[Tensor]) -> UM3Batch:
    documents = [builder.pair(kind, builder.text_ids(kind, text), one) for text, one in zip(texts, images, strict=True)]
    return stack([Row(kind, [one]) for one in documents], max(map(len, documents)))
