"""Retrieval of images by captions and of captions by images: recall at 1, 5 and 10.

Shapes: N images, T different texts, E dimensions of the shared space.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import PER_IMAGE, Columns, Evaluator, MetricResult, MetricValue, Rows
from qlip.evaluation.evaluators.text_embeddings import text_vectors
from qlip.evaluation.metrics.intervals import proportion_interval
from qlip.evaluation.models.base import ENCODE_IMAGE, ENCODE_TEXT, EvalModel
from qlip.evaluation.models.batch import ModelBatch

AT = (1, 5, 10)
TEXTS_AT_ONCE = 8192
"""Texts compared with a chunk of images together: what bounds memory, at any number of both."""


class Retrieval(Evaluator):
    """Recall of captions by images (``image_to_text_r*``) and of images by captions (``text_to_image_r*``).

    As on Flickr30k and COCO (Karpathy & Fei-Fei, arXiv 1412.2306): every caption of an image is a right answer, and
    an image counts as found where one of them is among the first K of all captions; every caption is a query, with
    its own image as the right answer. A caption that several images share is one answer, right for all of them,
    and as a query all of them are right. Where a wrong answer scores exactly as the best right one, it comes first.

    Args:
        captions: the first so many of each image; COCO's usual count is 5. None takes all.
        template: what is read of a caption, with ``{}`` where it goes.
        repeated: ``merged``, as above; or ``clip_benchmark``, as that package counts: every caption of an image is a
            text of its own that is right for this image alone, also where others have the same caption; of equal
            texts the earlier image's comes first.
    """

    name: ClassVar[str] = "retrieval"
    needs: ClassVar[frozenset[str]] = frozenset({ENCODE_IMAGE, ENCODE_TEXT})

    def __init__(
        self,
        captions: int | None = None,
        template: str = "{}",
        repeated: Literal["merged", "clip_benchmark"] = "merged",
    ) -> None:
        if captions is not None and captions < 1:
            raise QLIPError(f"captions {captions}: at least one of each image, or None for all")
        if template.count("{}") != 1:
            raise QLIPError(f"template {template!r}: should hold one '{{}}', where the caption goes")
        self.captions, self.template, self.repeated = captions, template, repeated

    def settings(self) -> Mapping[str, object]:
        """Captions per image, the template, and how repeated captions count if not as in version 0.1."""
        repeated = {} if self.repeated == "merged" else {"repeated": self.repeated}
        return {"captions": self.captions, "template": self.template, **repeated}

    def rows(self, batch: ModelBatch) -> Columns:
        """``embedding`` (B, E) float32."""
        return {"embedding": batch.embeddings.float()}

    def summarize(self, model: EvalModel, rows: Rows) -> MetricResult:
        """Recalls in percent with intervals over images, median ranks, and what chance gives.

        Raises:
            QLIPError: fewer than two images have a caption.
        """
        merged = self.repeated == "merged"
        captions = [(tuple(dict.fromkeys(some)) if merged else some)[: self.captions] for some in rows.captions]
        pairs = _Pairs.of(captions)
        if pairs.num_images < 2:
            raise QLIPError(f"{self.name}: {pairs.num_images} images have a caption; it needs two or more")
        vectors = text_vectors(model, [self.template.replace("{}", text) for text in pairs.texts])
        to_text, to_image = (_ranks if merged else _separate_ranks)(rows, pairs, vectors)
        found = MetricResult({}, _notes(pairs, len(rows), merged))
        for k in AT:
            found.add_mean(f"image_to_text_r{k}", to_text < k, unit="%", better="higher", scale=100)
        _add_by_caption(found, pairs, to_image)
        found.keep_keys([rows.keys[row] for row in pairs.rows.tolist()])
        values = found.values
        values["image_to_text_median_rank"] = _count(float(to_text.double().quantile(0.5)) + 1, pairs, "lower")
        values["text_to_image_median_rank"] = _count(float(to_image.double().quantile(0.5)) + 1, pairs, "lower")
        values["text_to_image_r1_chance"] = _count(100 / pairs.num_images, pairs, "", "%")
        values["texts"] = _count(float(len(pairs.texts)), pairs, "")
        values["captions"] = _count(float(len(pairs.text)), pairs, "")
        return found


@dataclass(frozen=True)
class _Pairs:
    """Pairs of image and text.

    Attributes:
        texts: all different ones, as they first come.
        image, text: (P,) int64: image ``image[p]`` has text ``text[p]``; sorted by image.
        rows: (N,) int64, the row of each image that has a caption.
    """

    texts: list[str]
    image: Tensor
    text: Tensor
    rows: Tensor

    @classmethod
    def of(cls, captions: Sequence[tuple[str, ...]]) -> _Pairs:
        number = {text: at for at, text in enumerate(dict.fromkeys(text for some in captions for text in some))}
        rows = [row for row, some in enumerate(captions) if some]
        pairs = [(at, number[text]) for at, row in enumerate(rows) for text in captions[row]]
        both = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        return cls(
            list(number), both[:, 0].contiguous(), both[:, 1].contiguous(), torch.tensor(rows, dtype=torch.int64)
        )

    @property
    def num_images(self) -> int:
        return len(self.rows)

    def images_of_texts(self) -> Tensor:
        """(T,) how many images have each text."""
        return torch.bincount(self.text, minlength=len(self.texts))


def _ranks(rows: Rows, pairs: _Pairs, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Count the wrong answers before the best right one: (N,) for images, (P,) for the captions of all pairs, int64.

    Two passes over the images' chunks: the scores of right answers, then counts of wrong ones that are as high.
    """
    right = torch.cat([(e[p] * vectors[t]).sum(1) for _, e, p, t in _chunks(rows, pairs)])
    best_of_image = torch.full((pairs.num_images,), -torch.inf).scatter_reduce(0, pairs.image, right, "amax")
    best_of_text = torch.full((len(pairs.texts),), -torch.inf).scatter_reduce(0, pairs.text, right, "amax")
    to_text = torch.zeros(pairs.num_images, dtype=torch.int64)
    to_image = torch.zeros(len(pairs.texts), dtype=torch.int64)
    for first, embeddings, own, text in _chunks(rows, pairs):
        here = slice(first, first + len(embeddings))
        for these, scores in _wrong_scores(embeddings, vectors, own, text):
            to_text[here] += (scores >= best_of_image[here, None]).sum(1)
            to_image[these] += (scores >= best_of_text[None, these]).sum(0)
    return to_text, to_image[pairs.text]


def _separate_ranks(rows: Rows, pairs: _Pairs, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks as :func:`_ranks` returns them, with every pair as a text of its own that is right for its image alone."""
    right = torch.cat([(e[p] * vectors[t]).sum(1) for _, e, p, t in _chunks(rows, pairs)])
    best_of_image = torch.full((pairs.num_images,), -torch.inf).scatter_reduce(0, pairs.image, right, "amax")
    copies = pairs.images_of_texts()
    # of an image's best text, the copies of earlier images come first
    order = pairs.text.argsort(stable=True)
    earlier = torch.empty_like(order)
    earlier[order] = torch.arange(len(order)) - (copies.cumsum(0) - copies)[pairs.text[order]]
    best = torch.where(right == best_of_image[pairs.image], earlier, len(order))
    to_text = torch.full((pairs.num_images,), len(order)).scatter_reduce(0, pairs.image, best, "amin")
    to_image = torch.zeros(len(order), dtype=torch.int64)
    for first, embeddings, own, text in _chunks(rows, pairs):
        here = slice(first, first + len(embeddings))
        for these, scores in _wrong_scores(embeddings, vectors, own, text):  # other copies of right ones are no better
            to_text[here] += ((scores >= best_of_image[here, None]) * copies[these]).sum(1)
        for start in range(0, len(order), TEXTS_AT_ONCE):
            these = slice(start, start + TEXTS_AT_ONCE)
            scores, owner = embeddings @ vectors[pairs.text[these]].t(), pairs.image[these] - first
            inside = (owner >= 0) & (owner < len(embeddings))
            scores[owner[inside], inside.nonzero()[:, 0]] = -torch.inf
            to_image[these] += (scores >= right[None, these]).sum(0)
    return to_text, to_image


def _wrong_scores(embeddings: Tensor, vectors: Tensor, own: Tensor, text: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Scores (n, t) of a chunk's images with blocks of texts, and the block; right answers score -inf."""
    for start in range(0, len(vectors), TEXTS_AT_ONCE):
        these = slice(start, min(start + TEXTS_AT_ONCE, len(vectors)))
        scores = embeddings @ vectors[these].t()
        inside = (text >= start) & (text < these.stop)
        scores[own[inside], text[inside] - start] = -torch.inf
        yield these, scores


def _chunks(rows: Rows, pairs: _Pairs) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(number of the first image, embeddings (n, E), and of its pairs: image within the chunk, text), in order."""
    row = first = 0
    for embeddings in rows.finite("embedding"):
        inside = pairs.rows[(pairs.rows >= row) & (pairs.rows < row + len(embeddings))] - row
        row += len(embeddings)
        if not len(inside):
            continue
        low, high = torch.searchsorted(pairs.image, torch.tensor([first, first + len(inside)])).tolist()
        yield first, embeddings[inside].float(), pairs.image[low:high] - first, pairs.text[low:high]
        first += len(inside)


def _add_by_caption(found: MetricResult, pairs: _Pairs, ranks: Tensor) -> None:
    """Add recalls over all captions; intervals allow for captions of an image that stand or fall together."""
    sizes = torch.bincount(pairs.image, minlength=pairs.num_images).double().numpy()
    for k in AT:
        hits = torch.zeros(pairs.num_images, dtype=torch.float64)
        hits.scatter_add_(0, pairs.image, (ranks < k).double())
        low, high = (None if bound is None else 100 * bound for bound in proportion_interval(hits.numpy(), sizes))
        value = 100 * float(hits.sum()) / len(pairs.text)
        found.values[f"text_to_image_r{k}"] = MetricValue(value, low, high, pairs.num_images, "%", "higher")
        if (sizes == sizes[0]).all():  # else the mean over images is not the recall over captions
            found.arrays[f"{PER_IMAGE}text_to_image_r{k}"] = (100 * hits / sizes[0]).float()


def _count(value: float, pairs: _Pairs, better: str, unit: str = "") -> MetricValue:
    return MetricValue(value, count=pairs.num_images, unit=unit, better=better)


def _notes(pairs: _Pairs, num_rows: int, merged: bool) -> dict[str, str]:
    notes = {}
    shared = int((pairs.images_of_texts() > 1).sum())
    if shared:
        right = "all of these count as right" if merged else "each counts as right for its own image alone"
        notes["shared captions"] = f"{shared:,} texts are captions of several images; {right}"
    if left_out := num_rows - pairs.num_images:
        notes["left out"] = f"{left_out:,} images without a caption"
    return notes
