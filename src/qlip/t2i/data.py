"""Batches of tokens with their conditions, and all that is random about them.

All that is drawn for an image (its caption, dropout of the condition, noise, order) is a function of the seed, the
epoch and the row, so a resumed run draws the same.

Shapes: B images, N tokens, K groups, T ids per caption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.labelled import LabelledTokens
from qlip.archive.dataset.mirrored import true_texts
from qlip.archive.dataset.stream import TokenBatch
from qlip.data.loader.batch import PerSample, SampleBatch, SkippedSample
from qlip.data.loader.feed import PositionFeed
from qlip.data.sources.base import RawSample
from qlip.data.sources.captions import draw_caption, first_sentence
from qlip.errors import QLIPError, require
from qlip.lm.conditions import Condition
from qlip.lm.text_encoders import TextEncoder
from qlip.modeling.tokenizer import CLIPTokenizer
from qlip.runtime.rng import generator
from qlip.t2i.recipe import InputNoiseSection, T2IRecipe
from qlip.t2i.token_source import ConditionKind, TokenSource

ReadCaptions = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""B captions to ids (B, T) or features (B, T, C), and their mask (B, T)."""
LOOKED_AT = 256
"""First rows that say what condition a dataset has."""
MAX_CLASSES = 1000
"""Largest number of classes whose captions are written beside a decoder."""


@dataclass
class T2IBatch(SampleBatch):
    """B images.

    Attributes:
        indices: int64 (B, N, K), the targets.
        inputs: int64 (B, N, K), what the decoder reads: with noise, if the recipe has any.
        values: int64 (B,) classes, int64 (B, T) ids of captions, or float32 (B, T, C) features of captions.
        mask: int64 or bool (B, T), 0 at padding; None for classes.
        dropped: bool (B,), True where the null condition replaces the condition.
        order: int64 (B, N), a random order of the places; None if all images are in raster order.
        turn: float64 (B,) in [0, 1); with a smaller share of images in random order, fewer of them are.
    """

    indices: PerSample[Tensor]
    inputs: PerSample[Tensor]
    values: PerSample[Tensor]
    mask: PerSample[Tensor | None]
    dropped: PerSample[Tensor]
    order: PerSample[Tensor | None]
    turn: PerSample[Tensor]

    @property
    def condition(self) -> Condition:
        """Condition of the images."""
        return Condition(self.values, self.mask)


@dataclass(frozen=True)
class MakeBatch:
    """Makes batches of the rows at positions of a dataset; pickles into workers."""

    rows: Any  # of TokenFeed: positions to a TokenBatch
    name: str
    kind: ConditionKind
    read: ReadCaptions | None
    templates: tuple[str, ...]
    short_caption: float
    seed: int
    dropout: float
    noise: InputNoiseSection | None
    random_order: bool
    codebook_size: int

    def __call__(self, positions: Any) -> T2IBatch:
        """Read, and draw what is random."""
        batch: TokenBatch = self.rows(positions)
        assert isinstance(batch.indices, Tensor)
        keys = list(zip(batch.epochs.tolist(), batch.rows.tolist(), strict=True))
        draws = [generator(self.seed, "decoder", *key) for key in keys]
        conditions, faults = self._conditions(batch, draws)
        kept = [place for place, fault in enumerate(faults) if fault is None]
        skipped = [
            SkippedSample(batch.keys[place], self.name, fault)
            for place, fault in enumerate(faults)
            if fault is not None
        ]
        indices = batch.indices[kept]  # (B, N, K)
        draws = [draws[place] for place in kept]
        values, mask = self._encoded([conditions[place] for place in kept])
        dropped = torch.tensor([rng.random() < self.dropout for rng in draws], dtype=torch.bool)
        tokens = indices.shape[1]
        order = None
        if self.random_order:
            orders = [torch.from_numpy(rng.random(tokens).argsort(kind="stable")) for rng in draws]
            order = torch.stack(orders) if orders else indices.new_zeros(0, tokens)
        turn = torch.tensor([rng.random() for rng in draws], dtype=torch.float64)
        return T2IBatch(
            indices,
            self._noisy(indices, draws),
            values,
            mask,
            dropped,
            order,
            turn,
            skipped=[*batch.skipped, *skipped],
        )

    def _conditions(
        self, batch: TokenBatch, draws: list[np.random.Generator]
    ) -> tuple[list[str | int], list[str | None]]:
        """Return the condition of each row, and why it has none."""
        if self.kind == "none":
            return [0] * len(draws), [None] * len(draws)
        if self.kind == "class":
            assert batch.class_ids is not None
            ids = batch.class_ids.tolist()
            return ids, [None if one >= 0 else "has no label" for one in ids]
        assert batch.captions is not None
        assert batch.labels is not None
        captions = [
            draw_caption(RawSample(b"", given, label, ""), self.templates, rng)
            for given, label, rng in zip(batch.captions, batch.labels, draws, strict=True)
        ]
        if self.short_caption:
            for place, (one, rng) in enumerate(zip(captions, draws, strict=True)):
                if rng.random() < self.short_caption and one is not None:
                    captions[place] = first_sentence(one)
        missing = "has neither a caption nor a label" if self.templates else "has no caption"
        return [one or "" for one in captions], [None if one is not None else missing for one in captions]

    def _encoded(self, conditions: list[Any]) -> tuple[Tensor, Tensor | None]:
        if self.read is None:
            return torch.tensor(conditions, dtype=torch.int64), None
        return self.read(conditions)

    def _noisy(self, indices: Tensor, draws: list[np.random.Generator]) -> Tensor:
        if self.noise is None or not len(indices):
            return indices
        shape, group_size = tuple(indices.shape[1:]), (self.codebook_size - 1).bit_length()
        found = []
        for one, rng in zip(indices, draws, strict=True):
            if self.noise.unit == "group":
                hit = torch.from_numpy(rng.random(shape) < self.noise.share)
                random = torch.from_numpy(np.floor(rng.random(shape) * self.codebook_size)).long()
                found.append(torch.where(hit, random, one))
            else:
                # half of the bits that are replaced by random ones change
                flips = torch.from_numpy(rng.random((*shape, group_size)) < self.noise.share / 2).long()
                found.append(one ^ (flips << torch.arange(group_size)).sum(-1))
        return torch.stack(found)


def open_feed(
    recipe: T2IRecipe,
    tokens: TokenSource,
    kind: ConditionKind,
    read: ReadCaptions | None,
    templates: tuple[str, ...],
    dropout: float,
) -> PositionFeed[T2IBatch]:
    """Open the feed of a recipe's batches.

    Args:
        recipe: of the run.
        tokens: to train on.
        kind: of the condition.
        read: reads captions.
        templates: make captions of labels.
        dropout: share of the conditions that are dropped.

    Raises:
        QLIPError: noise on the bits of codes that are no bits.
    """
    noise, size = recipe.input_noise, tokens.codebook_size
    if noise is not None and noise.unit == "bit" and size & (size - 1):
        raise QLIPError(f"input_noise.unit bit: {tokens.name} has {size:,} values, no power of two; take group")
    feed: Any = tokens.open(kind)
    feed.make = MakeBatch(
        feed.make,
        tokens.name,
        kind,
        read,
        templates,
        recipe.data.short_caption,
        recipe.seed,
        dropout,
        noise,
        recipe.random_order is not None,
        size,
    )
    opened: PositionFeed[T2IBatch] = feed
    return opened


def read_rows(
    dataset: TokenDataset,
    count: int,
    kind: ConditionKind,
    read: ReadCaptions | None,
    templates: tuple[str, ...],
    classes: list[str] | None,
) -> tuple[Tensor, Condition]:
    """Read evenly spaced rows that have a condition, with their first captions or templates, without noise.

    Args:
        dataset: with the training's kind of condition.
        count: rows, at most.
        kind: of the condition.
        read: reads captions.
        templates: the first one makes captions of labels.
        classes: names of the training's classes.

    Returns:
        int64 (B, N, K) indices and the condition of as many images.

    Raises:
        QLIPError: no row has the condition.
    """
    rows = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(np.int64)
    where = dataset.layout.address
    if kind == "none":
        return dataset.batch(rows), Condition(torch.zeros(len(rows), dtype=torch.int64))
    if kind == "class":
        found = true_texts(dataset, rows, by_label=True)
        rows = found.rows[found.usable]
        ids = LabelledTokens(dataset, classes).class_ids(rows)
        if not len(kept := (ids >= 0).nonzero()[:, 0]):
            raise QLIPError(f"{where}: none of its images has a label")
        return dataset.batch(rows[kept.numpy()]), Condition(ids[kept])
    assert read is not None
    found = true_texts(dataset, rows)
    texts: dict[int, str] = {}
    for place in np.flatnonzero(found.usable).tolist():
        captions, label = found.captions[place], found.labels[place]
        if captions:
            texts[place] = captions[0]
        elif templates and label is not None:
            texts[place] = templates[0].replace("{}", label)
    if not texts:
        raise QLIPError(f"{where}: none of its images has a caption{' or a label' if templates else ''}")
    return dataset.batch(found.rows[list(texts)]), Condition(*read(list(texts.values())))


def captions_of_labels(dataset: TokenDataset, templates: tuple[str, ...]) -> dict[str, str]:
    """Return the first template's caption for each label of images without captions; none if they are too many.

    Args:
        dataset: to read all labels of.
        templates: each with ``{}``; without any there is no caption.
    """
    if not templates or not dataset.info.captions:
        return {}
    compute = require("pyarrow.compute", extra="tables")
    found: set[str | None] = set()
    for part in range(len(dataset.groups.parts)):
        for group in range(len(dataset.groups.group_ends(part))):
            table = dataset.groups.table(part, group, ["captions", "label"])
            counts = compute.fill_null(compute.list_value_length(table.column("captions")), 0)
            found |= set(table.filter(compute.equal(counts, 0)).column("label").unique().to_pylist())
    labels = sorted(label for label in found if label is not None)
    return {label: templates[0].replace("{}", label) for label in labels} if len(labels) <= MAX_CLASSES else {}


def unread_captions(dataset: TokenDataset, source: CLIPTokenizer | TextEncoder) -> str | None:
    """Return how many of the first captions are not read whole, and why the first of them is not; None if all are.

    A prompt like these is refused when it is to be drawn, so a training should not learn them unnoticed.
    """
    found = dataset.captions_and_labels(range(min(LOOKED_AT, len(dataset))))[0]
    texts = [captions[0] for captions in found if captions]
    faults = [fault for text in texts if (fault := source.unread(text))]
    return f"{len(faults)} of the first {len(texts)} captions: {faults[0]}" if faults else None


def condition_kind(dataset: TokenDataset, wanted: ConditionKind | None, templates: bool = False) -> ConditionKind:
    """Decide what the images of a dataset are drawn from, by its first rows; with templates, labels are captions too.

    Raises:
        QLIPError: captions or labels are wanted, but the first rows have none.
    """
    if wanted == "none":
        return wanted
    captions, labels = False, False
    if dataset.info.captions:
        found = dataset.captions_and_labels(range(min(LOOKED_AT, len(dataset))))
        labels = any(one is not None for one in found[1])
        captions = any(map(bool, found[0])) or (templates and labels)
    has: dict[ConditionKind, bool] = {"caption": captions, "class": labels, "none": True}
    if wanted is None:
        return next(kind for kind, there in has.items() if there)
    if not has[wanted]:
        name = "captions" if wanted == "caption" else "labels"
        others = ", ".join(f"data.condition: {kind}" for kind, there in has.items() if there)
        if labels:
            others = f"data.templates, which make captions of labels, or {others}"
        raise QLIPError(
            f"{dataset.layout.address}: its first images have no {name}; tokenize images with {name}, or use {others}"
            " (without model.init)"
        )
    return wanted
