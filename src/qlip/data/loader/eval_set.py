"""Evaluation data: each sample of a source once, or a random sample of them that is always the same, in order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from qlip.data.loader.batch import PerSample, SampleBatch, Shared, SkippedSample, TextFaults, read_or_skip
from qlip.data.loader.transforms import EvalTransform
from qlip.data.loader.workers import loader
from qlip.data.sources.base import CaptionedImages, RawSample
from qlip.errors import QLIPError


@dataclass
class EvalBatch(SampleBatch):
    """Images in the source's order, with their captions, labels and keys.

    Attributes:
        pixel_values: float32 (B, 3, H, W), normalised.
        captions: all captions of each image; may be empty.
        labels: the class names, or None.
        keys: the keys inside the source.
        text_faults: why captions or labels were left out or repaired, a line for each such sample.
        digests: SHA-256 of the key and file of each sample, skipped ones included; of a skipped sample's key alone if
            its file cannot be read.
    """

    pixel_values: PerSample[Tensor]
    captions: PerSample[list[tuple[str, ...]]]
    labels: PerSample[list[str | None]]
    keys: PerSample[list[str]]
    text_faults: Shared[list[str]] = field(default_factory=list)
    digests: Shared[list[bytes]] = field(default_factory=list)


Item = tuple[Tensor | SkippedSample, RawSample, bytes]
"""Pixels, or the reason to skip the sample; its captions and label; its digest."""


class EvalSet(Dataset[Item]):
    """Batches of all samples of a source, in order.

    Args:
        source: the images.
        transform: the model's preprocessing.
        limit: use only this many images.
        drawn: draw them by :func:`draw_positions`; False takes the first ones, as version 0.1 did.

    Attributes:
        positions: of the images in the source, ascending.
    """

    def __init__(
        self, source: CaptionedImages, transform: EvalTransform, limit: int | None = None, drawn: bool = True
    ) -> None:
        self.source, self.transform = source, transform
        self.positions: Sequence[int] = range(len(source))
        if limit is not None and limit < len(source):
            self.positions = draw_positions(source, limit) if drawn else range(limit)

    def __len__(self) -> int:
        return len(self.positions)

    def key(self, index: int) -> str:
        """Key of an image, known without reading it."""
        return self.source.key(self.positions[index])

    def __getitem__(self, index: int) -> Item:
        raw = read_or_skip(self.source, self.positions[index])
        if isinstance(raw, SkippedSample):
            return raw, RawSample(b"", (), None, raw.key), hashlib.sha256(raw.key.encode()).digest()
        digest = hashlib.sha256(raw.key.encode() + b"\0" + raw.image).digest()
        text = replace(raw, image=b"")
        try:
            return self.transform(self.transform.load(raw.image)), text, digest
        except QLIPError as error:
            return SkippedSample(raw.key, self.source.name, str(error)), text, digest

    def stamp(self, part: range) -> str:
        """Hash (hex) that changes if images at these positions, or their text, are replaced; "" if that is unknown.

        It reads no image, see `CaptionedImages.stamp`.
        """
        digest = hashlib.sha256()
        for index in part:
            if not (one := self.source.stamp(self.positions[index])):
                return ""
            digest.update(f"{self.key(index)}\0{one}\0".encode(errors="surrogatepass"))
        return digest.hexdigest()

    def batches(
        self, batch_size: int, num_workers: int = 0, prefetch: int = 4, parts: Sequence[range] | None = None
    ) -> Iterator[EvalBatch]:
        """Iterate over all batches once; the last may be smaller.

        Args:
            batch_size: greatest number of samples per batch.
            num_workers: processes; 0 reads in this one.
            prefetch: batches that each worker keeps ready.
            parts: only these positions, in this order; no batch crosses a part's border.
        """
        parts = [range(len(self))] if parts is None else parts
        positions = [list(part[i : i + batch_size]) for part in parts for i in range(0, len(part), batch_size)]
        with closing(TextFaults()) as faults:
            for batch in loader(self, positions, self.collate, num_workers, prefetch):
                faults.add(batch.text_faults)
                yield batch

    def collate(self, items: Sequence[Item]) -> EvalBatch:
        """Make one batch; B is 0 if every sample is skipped."""
        read = [(pixels, raw) for pixels, raw, _ in items if not isinstance(pixels, SkippedSample)]
        height, width = self.transform.size
        return EvalBatch(
            pixel_values=torch.stack([pixels for pixels, _ in read]) if read else torch.empty(0, 3, height, width),
            captions=[raw.captions for _, raw in read],
            labels=[raw.label for _, raw in read],
            keys=[raw.key for _, raw in read],
            skipped=[pixels for pixels, _, _ in items if isinstance(pixels, SkippedSample)],
            text_faults=[raw.text_fault for _, raw in read if raw.text_fault is not None],
            digests=[digest for _, _, digest in items],
        )


def draw_positions(source: CaptionedImages, count: int, seed: int = 0) -> list[int]:
    """Draw a random sample of a source that has all its classes in proportion, by a seed.

    Where labels are known without reading images, each class gives its share of the images, rounded up or down.
    Elsewhere one image is drawn from each of `count` equal parts of the source: in a source that is sorted by class,
    classes then have about their shares.

    Returns:
        ``count`` different positions, ascending.
    """
    rng, size = np.random.default_rng(seed), len(source)
    labels = [_label(source, index) for index in range(size)]
    if any(label is not None for label in labels):
        shuffled = rng.permutation(size)
        by_label = sorted(shuffled.tolist(), key=lambda index: labels[index] or "")
        start = rng.random()
        return sorted(by_label[int((number + start) * size / count)] for number in range(count))
    edges = [number * size // count for number in range(count + 1)]
    return [int(rng.integers(low, high)) for low, high in zip(edges, edges[1:], strict=False)]


def _label(source: CaptionedImages, index: int) -> str | None:
    try:
        return source.label(index)
    except QLIPError:
        return None  # reading the sample will say what is wrong
