"""Feed of rows of packed documents from the sources of a recipe.

`open_feed` opens it. The row at a position depends on the seed and the position alone: the mixture says which source's
row stands there, and a `RowSource` makes its row by number. So a state is a position, and the stream is the same for
any number of workers and ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.drawn_scenes import DrawnScenes
from qlip.archive.dataset.layout import digest
from qlip.data.loader.batch import SkippedSample
from qlip.data.loader.feed import PositionFeed
from qlip.data.loader.sampler import Numbers, ScheduledMixture
from qlip.data.storage.storage import Storage, is_remote, local_path
from qlip.errors import QLIPError
from qlip.lm.tokenizer import LLMTokenizer
from qlip.um3.batch import DocumentKind, Row, UM3Batch, stack
from qlip.um3.config import UM3Config
from qlip.um3.data.config import DataSection, InterleavedSource, TextSource
from qlip.um3.data.documents import DocumentBuilder
from qlip.um3.data.images import FileImages, TokenImages, open_tokens
from qlip.um3.data.interleaved import SUFFIXES, read_interleaved, texts_of
from qlip.um3.data.mixture import SourceWeights
from qlip.um3.data.pairs import check_room, dataset_texts, open_pairs, templates_of
from qlip.um3.data.stored import Documents, StoredRows, store
from qlip.um3.data.texts import PLAIN, Broken, files_of, read_file, read_texts

AT_ONCE = 256
"""Texts that are turned into ids at once."""
SCENES_READ = 1000
"""Texts of made scenes that a vocabulary is trained on; they have all words."""


class RowSource(Protocol):
    """Rows of one kind of documents by number; pickles into workers."""

    @property
    def kind(self) -> DocumentKind:
        """Kind of the documents."""

    @property
    def name(self) -> str:
        """Name of the source, for messages."""

    @property
    def size(self) -> int | None:
        """Number of rows per epoch; None is endless."""

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that the rows depend on."""

    def rows(self, epochs: Numbers, indices: Numbers) -> tuple[list[Row], list[SkippedSample]]:
        """Read rows.

        Args:
            epochs: int64 (B,), of each row.
            indices: int64 (B,), number of each row in its epoch.

        Returns:
            B rows, and the documents that could not be read.
        """


@dataclass(frozen=True)
class MakeBatch:
    """Makes batches of the rows at positions; pickles into workers.

    Attributes:
        sources: of the rows.
        weights: of the sources.
        seed: of the order.
        length: T.
        document_masks: see :func:`qlip.um3.batch.stack`.
    """

    sources: Sequence[RowSource]
    weights: SourceWeights
    seed: int
    length: int
    document_masks: bool

    @cached_property
    def mixture(self) -> ScheduledMixture:
        """Which row of which source stands at a position."""
        names = [f"{one.kind}: {one.name}" for one in self.sources]
        return ScheduledMixture(names, [one.size for one in self.sources], self.weights, self.seed)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "mixture"}

    def __call__(self, positions: Numbers) -> UM3Batch:
        """Make the batch of the rows at positions, int64 (B,)."""
        places = self.mixture.places(positions)
        rows, skipped = [Row("text")] * len(positions), list[SkippedSample]()
        for number in np.unique(places.sources).tolist():
            mine = np.flatnonzero(places.sources == number)
            found, faults = self.sources[number].rows(places.epochs[mine], places.indices[mine])
            for place, row in zip(mine.tolist(), found, strict=True):
                rows[place] = row
            skipped += faults
        batch = stack(rows, self.length, self.document_masks)
        batch.skipped = skipped
        return batch


def open_feed(
    section: DataSection, config: UM3Config, tokenizer: LLMTokenizer, batch_size: int, seed: int
) -> PositionFeed[UM3Batch]:
    """Open the feed of a recipe's rows.

    Args:
        section: of the recipe.
        config: of the model.
        tokenizer: of the model.
        batch_size: rows per step, of all ranks together.
        seed: of the order and of all that is drawn.

    Raises:
        QLIPError: a source that cannot be opened, tokens of another QLIP, two sources of one name, or rows that cannot
            hold an image.
    """
    sources = open_sources(section, config, tokenizer, seed)
    names = [(one.kind, one.name) for one in sources]
    twice = next((name for kind, name in names if names.count((kind, name)) > 1), None)
    if twice is not None:
        raise QLIPError(f"data: two sources are {twice}; name each once, with its weight")
    weights = SourceWeights(section, batch_size, tuple(one.kind for one in sources), _weights(section))
    make = MakeBatch(sources, weights, seed, section.length, section.document_masks)
    identity = {
        "seed": seed,
        "length": section.length,
        "document_masks": section.document_masks,
        "mixture": [batch_size, *section.mixture.text, section.mixture.calm_down_steps, *_weights(section)],
        "sources": [{"kind": one.kind} | one.identity for one in sources],
    }
    return PositionFeed(make, identity, batch_size, section.num_workers, section.prefetch, name="data")


def _weights(section: DataSection) -> tuple[float, ...]:
    """Weights of the sources in the order of `open_sources`, each among those of its kind."""
    return tuple(
        one.weight
        for sources in (section.text, section.images, section.drawn_images, section.interleaved)
        for one in sources
    )


def open_sources(section: DataSection, config: UM3Config, tokenizer: LLMTokenizer, seed: int) -> list[RowSource]:
    """Open all sources of a recipe: texts, images to text, texts to image, interleaved documents.

    Raises:
        QLIPError: see `open_feed`.
    """
    if tokenizer.size > config.text_vocab_size:
        raise QLIPError(
            f"the tokenizer has {tokenizer.size:,} ids, the model {config.text_vocab_size:,} text rows; give the"
            " model's own tokenizer"
        )
    builder = DocumentBuilder(config, tokenizer)
    return [
        *(_open_texts(one, section.length, builder) for one in section.text),
        *(open_pairs("image-to-text", one, section, builder, seed) for one in section.images),
        *(open_pairs("text-to-image", one, section, builder, seed) for one in section.drawn_images),
        *(_open_interleaved(one, section.length, builder) for one in section.interleaved),
    ]


def _open_texts(source: TextSource, length: int, builder: DocumentBuilder) -> StoredRows:
    files = files_of(source.pattern)
    alone = [[file] for file in files if not file.endswith(PLAIN)]
    together = [file for file in files if file.endswith(PLAIN)]  # many small ones
    stored = store(
        source.path,
        [
            (
                ("text", source.field, *map(_stamp, some), builder.tokenizer.fingerprint),
                partial(_text_documents, some, source.field, builder),
            )
            for some in [*alone, together]
            if some
        ],
    )
    return StoredRows("text", source.path, stored, builder, length)


def _text_documents(files: Sequence[str], field: str, builder: DocumentBuilder) -> Documents:
    """Iterate over the documents of files of text."""
    for file in files:
        texts = read_file(file, field)
        while some := list(islice(texts, AT_ONCE)):
            ids = iter(builder.texts([one for one in some if isinstance(one, str)]))
            yield from (one if isinstance(one, Broken) else (next(ids), ()) for one in some)


def _open_interleaved(source: InterleavedSource, length: int, builder: DocumentBuilder) -> StoredRows:
    check_room(length, builder)
    config = builder.config
    if source.tokens is not None:
        dataset = open_tokens(source.tokens, config)
        images: TokenImages | FileImages = TokenImages(dataset, config)
        place = digest(dataset.entries)
    else:
        images, place = FileImages(Path(source.images or ""), config), ""
        images.check()
    stored = store(
        source.path,
        [
            (
                ("interleaved", place, _stamp(file), builder.tokenizer.fingerprint),
                partial(read_interleaved, file, images, builder),
            )
            for file in files_of(source.path, SUFFIXES)
        ],
    )
    return StoredRows("interleaved", source.path, stored, builder, length, images)


def _stamp(file: str) -> str:
    """Name, size and time of change of a file: equal ones hold equal documents. Raises QLIPError: it is not there."""
    size = Storage().size(file)
    return f"{file} {size} {0 if is_remote(file) else local_path(file).stat().st_mtime_ns}"


def first_texts(section: DataSection, characters: int = 1 << 24) -> Iterator[str]:
    """Iterate over texts of all sources, to train a vocabulary on.

    Args:
        section: of a recipe.
        characters: of each source of text, about; the document that exceeds them is the last.

    Raises:
        QLIPError: a source cannot be read.
    """
    for text in section.text:
        found = (one for one in read_texts(text.pattern, text.field) if isinstance(one, str))
        yield from _beginning(found, characters)
    for image in section.images:
        if image.tokens is not None:
            yield from dataset_texts(TokenDataset(image.tokens), templates_of(image))
        else:
            split, questions = image.questions or image.scenes or "", image.questions is not None
            yield from DrawnScenes(split, "bundled", None, questions).texts(SCENES_READ)
    for interleaved in section.interleaved:
        yield from _beginning(texts_of(interleaved.path), characters)


def _beginning(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return
