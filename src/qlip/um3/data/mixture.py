"""Order of the rows of all sources: the shares of the kinds follow the calm-down, exactly in every block (eq. 7)."""

from __future__ import annotations

from dataclasses import dataclass

from qlip.data.loader.sampler import BLOCK
from qlip.um3.batch import DocumentKind
from qlip.um3.data.config import DataSection


@dataclass(frozen=True)
class SourceWeights:
    """Weights of sources in a block of positions, for `ScheduledMixture`; pickles into workers.

    Attributes:
        section: with the ratios.
        batch_size: rows per step, of all ranks together.
        kinds: of each source.
        weights: of each source among those of its kind, on any scale.
    """

    section: DataSection
    batch_size: int
    kinds: tuple[DocumentKind, ...]
    weights: tuple[float, ...]

    def __call__(self, block: int) -> list[float]:
        """Weight of each source in block `block`, by the ratios at the step in which the block begins."""
        shares = self.section.shares(block * BLOCK // self.batch_size)
        totals = dict.fromkeys(self.kinds, 0.0)
        for kind, weight in zip(self.kinds, self.weights, strict=True):
            totals[kind] += weight
        return [shares[kind] * weight / totals[kind] for kind, weight in zip(self.kinds, self.weights, strict=True)]
