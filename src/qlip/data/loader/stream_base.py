"""Sources and their mixture: what streams of indexed sources and of sources read from front to back have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from qlip.data.loader.batch import BatchBuilder, SkippedSample, Tokenize, Treatment, read_or_skip
from qlip.data.loader.sampler import BlockOrder, Mixture, Numbers, OpenOrder
from qlip.data.loader.transforms import TrainTransform
from qlip.data.shards.streaming import TarLanes
from qlip.data.sources.base import CaptionedImages, RawSample
from qlip.errors import QLIPError
from qlip.runtime.rng import generator


@dataclass(frozen=True)
class Blocks:
    """An order of blocks instead of single samples; see `qlip.data.loader.sampler.BlockOrder`.

    Attributes:
        size: samples a block; None: a block is what a source reads at once, one of its `CaptionedImages.runs`.
        window: blocks mixed with each other.
    """

    size: int | None
    window: int


@dataclass(frozen=True)
class AnySource:
    """Captioned images and how a stream treats them, in whichever way they are read."""

    images: CaptionedImages | TarLanes
    transform: TrainTransform
    weight: float = 1.0
    templates: tuple[str, ...] = ()
    captions: bool = True  # False: its words are ignored, its images train reconstruction alone

    @property
    def treatment(self) -> Treatment:
        """What is made of its samples."""
        return Treatment(self.transform, self.templates, self.captions)


@dataclass(frozen=True)
class Source(AnySource):
    """A set of captioned images, read in any order."""

    images: CaptionedImages
    blocks: Blocks | None = None

    def open_order(self, seed: int) -> OpenOrder | None:
        """Its order by epochs, where it is not the usual one."""
        if self.blocks is None:
            return None
        name, runs = self.images.name, self.images.chunk_sizes()
        size, window = self.blocks.size or max(runs), self.blocks.window
        return lambda epoch: BlockOrder(runs, size, window, seed, "order", name, epoch)


@dataclass(frozen=True)
class StreamedSource(AnySource):
    """Shards that are read from front to back."""

    images: TarLanes


One = TypeVar("One", bound=Source | StreamedSource)


class Mixing(Generic[One]):
    """Sources in their shares of every block of positions, as `Mixture` has it, and how their samples get into a batch.

    Pickles without the mixture, whose orders are functions, and makes it again.

    Args:
        sources: at least one, of different names.
        seed: of order, augmentation and captions.
        tokenize: see `Tokenize`.

    Raises:
        QLIPError: no source, two of one name, or transforms to different sizes.
    """

    def __init__(self, sources: Sequence[One], seed: int, tokenize: Tokenize) -> None:
        _check(sources)
        self.sources, self.seed, self.tokenize = list(sources), seed, tokenize
        self.mixture = self._mixture()
        self._how = [source.treatment for source in sources]

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "mixture"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self.mixture = self._mixture()

    def builder(self, capacity: int) -> BatchBuilder:
        """Of a batch of at most so many samples."""
        return BatchBuilder(capacity, self.sources[0].transform.size, self.tokenize)

    def read(self, number: int, index: int) -> RawSample | SkippedSample:
        """Sample `index` of source `number`, which is indexed."""
        images = self.sources[number].images
        assert not isinstance(images, TarLanes)
        return read_or_skip(images, index)

    def add(self, builder: BatchBuilder, number: int, raw: RawSample | SkippedSample, *identity: int) -> None:
        """Decode, augment and word a sample of source `number`; what is drawn depends on seed, source and identity."""
        if isinstance(raw, SkippedSample):
            builder.skip(raw)
            return
        name = self.sources[number].images.name
        builder.add(raw, name, self._how[number], self._generator(name, *identity))

    def prepare(self, positions: Numbers) -> None:
        """These come soon: indexed sources that are far away begin to fetch theirs."""
        far = [(n, s.images) for n, s in enumerate(self.sources) if isinstance(s, Source) and s.images.remote]
        if far:
            sources, _, indices = self.mixture.places(positions)
            for number, images in far:
                images.prefetch(indices[sources == number].tolist())

    def close(self) -> None:
        """Nothing more will be read."""
        for source in self.sources:
            if isinstance(source, Source):
                source.images.close()

    def _mixture(self) -> Mixture:
        names, weights = [s.images.name for s in self.sources], [s.weight for s in self.sources]
        sizes = [len(s.images) if isinstance(s, Source) else None for s in self.sources]
        orders = [s.open_order(self.seed) if isinstance(s, Source) else None for s in self.sources]
        return Mixture(names, sizes, weights, self.seed, orders)

    def _generator(self, name: str, *identity: int) -> np.random.Generator:
        return generator(self.seed, "sample", name, *identity)


def _check(sources: Sequence[AnySource]) -> None:
    """Raises QLIPError where sources do not go together."""
    names = [source.images.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not names:
        raise QLIPError("data: no source; name at least one")
    if twice is not None:
        raise QLIPError(f"data: two sources are called {twice!r}; name each once, or give one a name of its own")
    if len({source.transform.size for source in sources}) > 1:
        raise QLIPError("data: the sources' transforms differ in size; a batch needs one")
