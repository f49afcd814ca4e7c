"""A source in its own order, once, for measuring: nothing drawn, nothing left unsaid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset

from qlip.data.batch import BrokenSample, read_or_break
from qlip.data.loading import loader
from qlip.data.sources import CaptionedImages, RawSample
from qlip.data.transforms import EvalTransform
from qlip.errors import QLIPError
from qlip.modeling.images import load_image


@dataclass
class EvalBatch:
    """Pictures in the source's order and all that it says about them.

    Attributes:
        pixel_values: float32 (B, 3, H, W), normalised.
        captions: all captions of each picture; may be empty.
        labels: the class names, or None.
        keys: the keys inside the source.
        broken: samples left out.
    """

    pixel_values: Tensor
    captions: list[tuple[str, ...]]
    labels: list[str | None]
    keys: list[str]
    broken: list[BrokenSample] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)


Item = tuple[Tensor, RawSample] | BrokenSample


class EvalSet(Dataset[Item]):
    """Batches over all of a source, in order.

    Args:
        source: the pictures.
        transform: what the model's processor does to one.
        limit: only the first so many.
    """

    def __init__(self, source: CaptionedImages, transform: EvalTransform, limit: int | None = None) -> None:
        self.source, self.transform = source, transform
        self._len = len(source) if limit is None else min(limit, len(source))

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int) -> Item:
        raw = read_or_break(self.source, index)
        if isinstance(raw, BrokenSample):
            return raw
        try:
            return self.transform(load_image(raw.image)), RawSample(b"", raw.captions, raw.label, raw.key)
        except QLIPError as error:
            return BrokenSample(raw.key, self.source.name, str(error))

    def batches(self, batch_size: int, num_workers: int = 0, prefetch: int = 4) -> Iterator[EvalBatch]:
        """All batches once; the last may be smaller."""
        positions = [list(range(i, min(i + batch_size, len(self)))) for i in range(0, len(self), batch_size)]
        yield from loader(self, positions, self.collate, num_workers, prefetch)

    def collate(self, items: Sequence[Item]) -> EvalBatch:
        """One batch; B may be 0 where every sample is broken."""
        read = [item for item in items if not isinstance(item, BrokenSample)]
        height, width = self.transform.size
        return EvalBatch(
            pixel_values=torch.stack([pixels for pixels, _ in read]) if read else torch.empty(0, 3, height, width),
            captions=[raw.captions for _, raw in read],
            labels=[raw.label for _, raw in read],
            keys=[raw.key for _, raw in read],
            broken=[item for item in items if isinstance(item, BrokenSample)],
        )
