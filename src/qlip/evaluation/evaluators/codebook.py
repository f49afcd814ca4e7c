"""Codebook usage: entropies, dead and tied bits, mutual information of bits, and a map over positions.

Shapes: P images of N tokens of L bits in K groups of G bits; T = P N tokens in all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import Columns, Evaluator, MetricResult, MetricValue, Rows
from qlip.evaluation.models.base import TOKENIZE, EvalModel
from qlip.evaluation.models.batch import ModelBatch
from qlip.evaluation.report import drawing
from qlip.modeling import bits_to_indices
from qlip.tokens import pack_batch

LARGEST_GROUP = 20
"""Bits of a group whose values are counted: a million counts of 8 bytes a group."""
PLAIN_TOKENS = 10
"""Tokens a value of a group that plug-in entropies want; fewer, and a note says so."""
_PIECE = 2**16
"""Tokens whose products are summed in float32 at once; their sums stay below 2^24 and so are exact."""
_SHOWN = 2**12
"""Values of a group up to which their counts are kept as an array."""


@dataclass
class Counts:
    """The integer counts that all metrics are computed from.

    Attributes:
        images: P.
        ones: (N, L) int64, images in which a token's bit is 1.
        both: (L, L) int64, tokens in which both bits are 1.
        values: (K, 2^G) int64, tokens in which a group has a value; None where G is above ``LARGEST_GROUP``.
        each: (P, L) int64, an image's tokens in which a bit is 1.
    """

    images: int
    ones: Tensor
    both: Tensor
    values: Tensor | None
    each: Tensor

    @property
    def tokens(self) -> int:
        """T."""
        return self.images * len(self.ones)


class Codebook(Evaluator):
    """Usage of a model's codes. Entropies are plug-in estimates in bits, over all tokens of all images.

    Metrics: ``bit_entropy`` and ``bit_entropy_min``, mean and least over bits; ``group_entropy`` and
    ``group_entropy_min`` over groups, ``group_entropy_corrected`` with Miller and Madow's (1955) correction, (values
    seen - 1) / (2 T ln 2), at most G; ``group_usage`` and ``group_usage_min``, the share of a group's values that
    occur; ``group_perplexity``, the mean of 2^entropy; ``dead_bits`` that never change; ``tied_bits`` whose correlation
    with an earlier bit is ``tied`` or more, either way; ``mutual_information`` and ``mutual_information_max``, mean and
    most over pairs of bits; ``position_entropy_min`` and ``position_entropy_max``, of :func:`by_position`. The interval
    of ``bit_entropy`` is a bootstrap over images, moved by its own bias.

    Tables: one record per bit in ``bits``, per group in ``groups``, per pair in ``tied``. Arrays: ``bit_entropy`` (L,),
    ``mutual_information`` (L, L) with entropies on its diagonal, ``position_entropy`` (h, w), float64; ``values``
    (K, 2^G) int64 where 2^G is 4,096 or less.

    Args:
        tied: the least absolute correlation of bits that count as one.
        seed: of the bootstrap.
    """

    name: ClassVar[str] = "codebook"
    needs: ClassVar[frozenset[str]] = frozenset({TOKENIZE})

    def __init__(self, tied: float = 0.98, seed: int = 0) -> None:
        if not 0 < tied <= 1:
            raise QLIPError(f"codebook: bits are tied at a correlation above 0 and up to 1, got {tied}")
        self.tied, self.seed = tied, seed

    def settings(self) -> Mapping[str, object]:
        """When bits count as one."""
        return {"tied": self.tied, "seed": self.seed}

    def check(self, model: EvalModel) -> None:
        """Refuse a model that does not say how many bits an index has."""
        super().check(model)
        if model.group_size is None:
            raise QLIPError(f"codebook: {model.name} does not say how many bits an index has; set its group_size")

    def rows(self, batch: ModelBatch) -> Columns:
        """``bits`` (B, bytes) uint8, packed as `qlip.tokens.pack` does; ``shape`` (B, 2) int64, N and K."""
        indices = batch.indices.cpu()
        size = batch.model.group_size or 1
        packed = np.frombuffer(b"".join(pack_batch(indices, size)), dtype=np.uint8).reshape(len(indices), -1)
        shape = torch.tensor(indices.shape[1:]).expand(len(indices), 2)
        return {"bits": torch.from_numpy(packed.copy()), "shape": shape.contiguous()}

    def summarize(self, model: EvalModel, rows: Rows) -> MetricResult:
        """Count, then all metrics."""
        size = model.group_size or 1
        counts = count(rows, size)
        found = MetricResult({}, {name: note for name, note in model.notes.items() if name == self.name})
        _bits(found, counts, self.seed)
        _groups(found, counts, size)
        _pairs(found, counts, self.tied)
        shape = grid_of(len(counts.ones), model.preprocessing.size)
        found.arrays["position_entropy"] = where = by_position(counts).view(shape)
        for name, one in (("min", where.min()), ("max", where.max())):
            found.values[f"position_entropy_{name}"] = MetricValue(float(one), count=counts.images, unit="bit")
        found.values["tokens"] = MetricValue(float(counts.tokens), count=counts.images)
        return found


def count(rows: Rows, group_size: int) -> Counts:
    """Count what a codebook's rows hold, a chunk at a time.

    Args:
        rows: of :class:`Codebook`.
        group_size: G.

    Raises:
        QLIPError: images of unequal numbers of tokens.
    """
    shape: tuple[int, int] | None = None
    found: Counts | None = None
    each: list[Tensor] = []
    for packed, shapes in rows.stream("bits", "shape"):
        for one in {(int(n), int(k)) for n, k in shapes.unique(dim=0).tolist()}:
            if shape not in (None, one):
                raise QLIPError(f"codebook: images of {shape} and of {one} tokens and groups; measure one size at once")
            shape = one
        assert shape is not None
        tokens, groups = shape
        width = groups * group_size
        found = found or _empty(tokens, groups, group_size)
        flat = np.unpackbits(packed.numpy(), axis=1, count=tokens * width)
        bits = torch.from_numpy(flat).view(len(packed), tokens, width)
        found.images += len(bits)
        found.ones += bits.sum(0, dtype=torch.int64)
        each.append(bits.sum(1, dtype=torch.int64))
        for piece in bits.view(-1, width).split(_PIECE):
            floats = piece.float()
            found.both += (floats.t() @ floats).to(torch.int64)
            if found.values is not None:
                places = bits_to_indices(piece, group_size) + torch.arange(groups) * 2**group_size
                found.values += torch.bincount(places.flatten(), minlength=found.values.numel()).view_as(found.values)
    assert found is not None, "a metric_result has rows"
    found.each = torch.cat(each)
    return found


def _empty(tokens: int, groups: int, group_size: int) -> Counts:
    width = groups * group_size
    values = torch.zeros(groups, 2**group_size, dtype=torch.int64) if group_size <= LARGEST_GROUP else None
    ones, both = torch.zeros(tokens, width, dtype=torch.int64), torch.zeros(width, width, dtype=torch.int64)
    return Counts(0, ones, both, values, torch.empty(0, width, dtype=torch.int64))


def entropy(counts: Tensor) -> Tensor:
    """Plug-in entropies in bits of (..., V) counts, (...) float64; 0 where nothing was counted."""
    shares = counts.double() / counts.sum(-1, keepdim=True).clamp_min(1)
    found: Tensor = -torch.xlogy(shares, shares).sum(-1) / np.log(2)
    return found + 0.0  # no negative zero


def of_share(ones: Tensor, total: int) -> Tensor:
    """Entropies in bits of two-valued things that are 1 so many times of ``total``: the shape of ``ones``, float64."""
    return entropy(torch.stack([ones, total - ones], -1))


def by_position(counts: Counts) -> Tensor:
    """(N,) float64: the mean over bits of a bit's entropy at that position, over images; 1 is the most."""
    return of_share(counts.ones, counts.images).mean(1)


def mutual_information(counts: Counts) -> Tensor:
    """(L, L) float64, in bits, between the bits of a token; their entropies on the diagonal. Row by row in memory."""
    total, ones = counts.tokens, counts.both.diagonal()
    own = of_share(ones, total)
    found = torch.empty(len(ones), len(ones), dtype=torch.float64)
    for at, both in enumerate(counts.both):
        cells = torch.stack([both, ones[at] - both, ones - both, total - ones[at] - ones + both], -1)
        found[at] = (own[at] + own - entropy(cells)).clamp_min(0)
    return found


def correlation(counts: Counts) -> Tensor:
    """(L, L) float64, of the bits of a token; 0 where one never changes."""
    total, ones = counts.tokens, counts.both.diagonal().double()
    covariance = total * counts.both.double() - ones[:, None] * ones
    spread = (ones * (total - ones)).sqrt()
    return torch.where(spread[:, None] * spread > 0, covariance / (spread[:, None] * spread), 0.0)


def grid_of(num_tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of so many tokens over images of (height, width): of all that fit, the nearest in shape."""
    wanted = np.log(size[0] / size[1])
    fitting = [(rows, num_tokens // rows) for rows in range(1, num_tokens + 1) if num_tokens % rows == 0]
    return min(fitting, key=lambda one: abs(np.log(one[0] / one[1]) - wanted))


def _bits(found: MetricResult, counts: Counts, seed: int) -> None:
    ones, total, images = counts.both.diagonal(), counts.tokens, counts.images
    entropies = of_share(ones, total)
    low, high = _interval(counts, float(entropies.mean()), seed)
    dead = (ones == 0) | (ones == total)
    found.values |= {
        "bit_entropy": MetricValue(float(entropies.mean()), low, high, images, "bit", "higher"),
        "bit_entropy_min": MetricValue(float(entropies.min()), None, None, images, "bit", "higher"),
        "dead_bits": MetricValue(float(dead.sum()), None, None, images, "", "lower"),
    }
    found.arrays["bit_entropy"] = entropies
    found.tables["bits"] = [
        {"bit": at, "ones": 100 * int(ones[at]) / total, "entropy": float(entropies[at]), "dead": bool(dead[at])}
        for at in range(len(ones))
    ]


def _interval(counts: Counts, value: float, seed: int, resamples: int = 1000) -> tuple[float | None, float | None]:
    """95% bootstrap over images of the mean bit entropy, moved so that its own mean is the value."""
    images = counts.images
    if images < 2:
        return None, None
    draw, each = np.random.default_rng(seed), counts.each.double()
    means = np.empty(resamples)
    for at in range(resamples):
        drawn = np.bincount(draw.integers(0, images, images), minlength=images)
        ones = torch.from_numpy(drawn).double() @ each
        means[at] = float(of_share(ones, counts.tokens).mean())
    low, high = np.quantile(means + (value - means.mean()), [0.025, 0.975])
    return max(0.0, float(low)), min(1.0, float(high))


def _groups(found: MetricResult, counts: Counts, group_size: int) -> None:
    values, total = counts.values, counts.tokens
    if values is None:
        found.notes["groups"] = f"not counted: groups of {group_size} bits have more than 2^{LARGEST_GROUP} values"
        return
    entropies, seen = entropy(values), (values > 0).sum(1)
    corrected = (entropies + (seen - 1) / (2 * total * np.log(2))).clamp_max(group_size)
    usage, perplexity = 100 * seen.double() / values.shape[1], 2**entropies
    for name, number, unit in (
        ("group_entropy", entropies.mean(), "bit"),
        ("group_entropy_min", entropies.min(), "bit"),
        ("group_entropy_corrected", corrected.mean(), "bit"),
        ("group_usage", usage.mean(), "%"),
        ("group_usage_min", usage.min(), "%"),
        ("group_perplexity", perplexity.mean(), ""),
    ):
        found.values[name] = MetricValue(float(number), None, None, counts.images, unit, "higher")
    if total < PLAIN_TOKENS * values.shape[1]:
        found.notes["group_entropy"] = (
            f"too low by about {float((corrected - entropies).mean()):.2g} bit: {total:,} tokens for"
            f" {values.shape[1]:,} values a group; group_entropy_corrected allows for that, usage and perplexity do not"
        )
    if values.shape[1] <= _SHOWN:
        found.arrays["values"] = values
    found.tables["groups"] = [
        {
            "group": at,
            "entropy": float(entropies[at]),
            "corrected": float(corrected[at]),
            "values seen": int(seen[at]),
            "usage": float(usage[at]),
            "perplexity": float(perplexity[at]),
        }
        for at in range(len(values))
    ]


def _pairs(found: MetricResult, counts: Counts, tied: float) -> None:
    information, correlated = mutual_information(counts), correlation(counts)
    found.arrays["mutual_information"] = information
    width = len(information)
    alike = torch.triu(correlated.abs() >= tied - 1e-12, 1)
    found.values["tied_bits"] = MetricValue(float(alike.any(0).sum()), None, None, counts.images, "", "lower")
    if width > 1:
        pairs = information[tuple(torch.triu_indices(width, width, 1))]
        for name, number in (("mutual_information", pairs.mean()), ("mutual_information_max", pairs.max())):
            found.values[name] = MetricValue(float(number), None, None, counts.images, "bit", "lower")
    found.tables["tied"] = [
        {"bit": first, "other": second, "correlation": float(correlated[first, second])}
        for first, second in alike.nonzero().tolist()
    ]


def draw(metric_result: MetricResult, path: Path) -> None:
    """Write a PNG: where entropy is in the image, that of each bit, and what bits tell of each other.

    Args:
        metric_result: of :class:`Codebook`.
        path: of the image.

    Raises:
        QLIPError: a metric_result of something else, no matplotlib, or a path that cannot be written.
    """
    if not {"position_entropy", "bit_entropy", "mutual_information"} <= set(metric_result.arrays):
        raise QLIPError(f"{path}: nothing to draw, for the codebook was not measured; run qlip eval with codebook")
    figure = drawing.new_figure(11, 3.4)
    where, bits, pairs = figure.subplots(1, 3, width_ratios=(1, 1.3, 1))
    _map(figure, where, metric_result.arrays["position_entropy"], "bit entropy by position", "bit", "equal")
    entropies = metric_result.arrays["bit_entropy"].numpy()
    bits.bar(np.arange(len(entropies)), entropies, color=drawing.COLOURS[0])
    bits.set(xlabel="bit", ylim=(0, 1.02))
    bits.set_title("entropy of each bit", fontsize=10)
    bits.spines[["top", "right"]].set_visible(False)
    between = metric_result.arrays["mutual_information"].clone().fill_diagonal_(torch.nan)
    _map(figure, pairs, between, "mutual information of bits", "bit", "equal")
    drawing.save(figure, path, dpi=130)


def _map(figure: Any, axes: Any, values: Tensor, title: str, unit: str, aspect: str) -> None:
    drawn = axes.imshow(values.numpy(), cmap="viridis", interpolation="nearest", aspect=aspect)
    axes.set_title(title, fontsize=10)
    axes.tick_params(length=0, labelsize=8)
    figure.colorbar(drawn, ax=axes, shrink=0.85, label=unit)
