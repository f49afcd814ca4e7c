"""Rows of images with their texts, in one direction: image-to-text or text-to-image.

Row k of the stream has the documents at positions k D to (k + 1) D - 1 of an endless stream of images, so that rows
are a pure function of their number. Texts that are too long for their row together are cut at their ends, the longest
first, and the row counts what is cut. Shapes: D documents per row, T positions per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.drawn_scenes import DrawnScenes
from qlip.archive.dataset.stream import TokenBatch, TokenFeed
from qlip.data.loader.batch import SkippedSample
from qlip.data.loader.sampler import Numbers
from qlip.data.sources.base import RawSample
from qlip.data.sources.captions import draw_caption, load_templates
from qlip.errors import QLIPError
from qlip.runtime.rng import generator, hash_int
from qlip.um3.batch import DocumentKind, Row
from qlip.um3.config import UM3Config
from qlip.um3.data.config import DataSection, ImageSource
from qlip.um3.data.documents import DocumentBuilder, fit
from qlip.um3.data.images import check_fingerprint, open_tokens, size_fault

MEASURED = 256
"""Captions whose lengths say how many documents a row has."""
LONG = 0.9
"""Share of the captions for which a row has room without cutting any."""


@dataclass(frozen=True)
class ImageStream:
    """Images with captions at the positions of an endless stream.

    Attributes:
        name: for messages.
        read: positions, int64 (B,), to a batch in their order, less those in its `skipped`; it pickles.
        texts: some captions, to measure their lengths and to train a vocabulary on.
        identity: values that the stream depends on.
        templates: make captions of labels.
    """

    name: str
    read: Callable[[Numbers], TokenBatch]
    texts: Sequence[str]
    identity: dict[str, Any]
    templates: tuple[str, ...] = ()


def open_images(source: ImageSource, config: UM3Config, seed: int) -> ImageStream:
    """Open images of a recipe.

    Args:
        source: of the recipe.
        config: of the model.
        seed: of the order.

    Raises:
        QLIPError: no such dataset or split, tokens of another QLIP, or no captions.
    """
    if source.tokens is None:
        scenes = open_scenes(source, config)
        fingerprint = scenes.codec.model.code_fingerprint
        check_fingerprint(config, fingerprint, scenes.name)
        identity = {"name": scenes.name, "code_fingerprint": fingerprint}
        return ImageStream(scenes.name, scenes.batch, scenes.texts(MEASURED), identity)
    dataset, templates = open_tokens(source.tokens, config), templates_of(source)
    feed = TokenFeed(dataset, 1, seed=seed, captions=True)
    texts = dataset_texts(dataset, templates)
    if not texts:
        raise QLIPError(
            f"{source.tokens}: none of its first images has a caption{' or a label' if templates else ''}; tokenise"
            " captioned images" + ("" if templates else ", or give templates that make captions of labels")
        )
    return ImageStream(source.tokens, feed.make, texts, {"name": source.tokens} | feed.identity, templates)


def open_scenes(source: ImageSource, config: UM3Config) -> DrawnScenes:
    """Open made scenes of a recipe; see `open_images`."""
    split = source.questions or source.scenes
    assert split is not None
    scenes = DrawnScenes(split, config.vision_tower, config.group_size, source.questions is not None)
    scenes.check()
    return scenes


def dataset_texts(dataset: TokenDataset, templates: tuple[str, ...] = ()) -> list[str]:
    """First captions, or labels in the first template, of evenly spaced rows of a token dataset."""
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(MEASURED, len(dataset))).astype(np.int64))
    found = list[str]()
    for captions, label in zip(*dataset.captions_and_labels(rows), strict=True):
        if captions:
            found.append(captions[0])
        elif templates and label is not None:
            found.append(templates[0].replace("{}", label))
    return found


def templates_of(source: ImageSource) -> tuple[str, ...]:
    """Templates that make captions of labels."""
    return () if source.templates is None else load_templates(source.templates)


@dataclass(frozen=True)
class PairRows:
    """Rows of images with their texts, a `qlip.um3.data.feed.RowSource` without an end; pickles into workers.

    Attributes:
        kind: "image-to-text" or "text-to-image".
        stream: images and captions.
        builder: makes documents.
        length: T.
        documents: D.
        dropout: share of the documents without their text.
        seed: of the choice among captions, and of the dropout.
    """

    kind: DocumentKind
    stream: ImageStream
    builder: DocumentBuilder
    length: int
    documents: int
    dropout: float
    seed: int

    size = None

    @property
    def name(self) -> str:
        """Name of the source, for messages."""
        return self.stream.name

    @property
    def identity(self) -> dict[str, Any]:
        """Values that the rows depend on."""
        return self.stream.identity | {"documents": self.documents}

    def rows(self, epochs: Numbers, indices: Numbers) -> tuple[list[Row], list[SkippedSample]]:
        """Read rows by their numbers."""
        del epochs
        positions = indices[:, None] * self.documents + np.arange(self.documents)  # (rows, D)
        batch = self.stream.read(positions.ravel())
        if batch.skipped:  # then it does not say which document belongs to which row
            batches = [self.stream.read(one) for one in positions]
        else:
            batches = batch.split(len(indices))
        found = [self._row(one) for one in batches]
        return [row for row, _ in found], [one for _, skipped in found for one in skipped]

    def _row(self, batch: TokenBatch) -> tuple[Row, list[SkippedSample]]:
        """Put the images of a batch into a row."""
        texts, images, skipped, lost = list[list[int]](), list[Tensor](), list(batch.skipped), 0
        assert batch.captions is not None and batch.labels is not None
        for indices, captions, label, key, epoch, number in zip(
            batch.indices,
            batch.captions,
            batch.labels,
            batch.keys,
            batch.epochs.tolist(),
            batch.rows.tolist(),
            strict=True,
        ):
            rng = generator(self.seed, self.kind, epoch, number)
            text = draw_caption(RawSample(b"", captions, label, key), self.stream.templates, rng)
            ids = self.builder.text_ids(self.kind, text or "")
            fault = "has no caption" if text is None or not text.strip() else size_fault(indices, self.builder.config)
            if fault is not None:
                skipped.append(SkippedSample(key, self.name, fault))
                lost += len(ids) + indices.numel()
                continue
            texts.append([] if rng.random() < self.dropout else ids)
            images.append(indices)
        lengths = [len(one) for one in texts]
        kept = fit(lengths, self.length - len(images) * self.builder.cost)
        pairs = zip(texts, kept, images, strict=True)
        documents = [self.builder.pair(self.kind, text[:length], one) for text, length, one in pairs]
        return Row(self.kind, documents, lost + sum(lengths) - sum(kept)), skipped


def open_pairs(
    kind: DocumentKind, source: ImageSource, section: DataSection, builder: DocumentBuilder, seed: int
) -> PairRows:
    """Open images of a recipe in one direction.

    Args:
        kind: "image-to-text" or "text-to-image".
        source: of the recipe.
        section: that has it.
        builder: of the model's documents.
        seed: of the run; each direction has an order of its own.

    Raises:
        QLIPError: as `open_images`, or a row cannot hold an image.
    """
    stream = open_images(source, builder.config, hash_int(seed, kind) % 2**31)
    room = section.text_room
    if room is None:
        lengths = [len(builder.text_ids(kind, text)) for text in stream.texts]
        room = max(1, round(float(np.quantile(lengths, LONG))))
    check_room(section.length, builder)
    documents = max(1, section.length // (builder.cost + room))
    dropout = section.text_dropout if kind == "text-to-image" else 0.0
    return PairRows(kind, stream, builder, section.length, documents, dropout, seed)


def check_room(length: int, builder: DocumentBuilder) -> None:
    """Refuse rows that cannot hold an image and a token of text. Raises QLIPError."""
    if length <= builder.cost:
        raise QLIPError(
            f"length {length:,}: a row cannot hold an image, which takes {builder.cost:,} positions without its text;"
            f" give {builder.cost + 1:,} or more"
        )
