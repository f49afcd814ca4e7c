"""Tokens to train on, from a token dataset, LlamaGen's folders of codes, or scenes drawn on the fly.

A `TokenSource` says what a decoder must know of the tokens, and opens a feed of them in which the sample at a position
depends on the seed and the position alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.drawn_scenes import DrawnScenes
from qlip.archive.dataset.stream import TokenBatch, TokenFeed
from qlip.data.loader.feed import PositionFeed
from qlip.errors import QLIPError
from qlip.t2i.recipe import T2IRecipe

ConditionKind = Literal["caption", "class", "none"]
OpenTokens = Callable[[ConditionKind], PositionFeed[TokenBatch]]


@dataclass(frozen=True)
class TokenSource:
    """Tokens with what they are drawn from.

    Attributes:
        name: address or name, for messages.
        grid: rows and columns of tokens.
        codebook_size: V, values of a group.
        num_groups: K, groups per token.
        code_fingerprint: of the tokenizer; None if it is not known.
        size: how many there are, in words.
        open: opens the feed, with what the condition of a kind needs.
    """

    name: str
    grid: tuple[int, int]
    codebook_size: int
    num_groups: int
    code_fingerprint: str | None
    size: str
    open: OpenTokens

    @property
    def group_size(self) -> int:
        """Bits of a group; of the values rounded up where they are no power of two."""
        return (self.codebook_size - 1).bit_length()


def open_dataset(dataset: TokenDataset, recipe: T2IRecipe) -> TokenSource:
    """Open a token dataset.

    Args:
        dataset: of images of one grid.
        recipe: of the run.

    Raises:
        QLIPError: the dataset has no grid of its own.
    """
    info, where = dataset.info, dataset.layout.address
    if info.grid is None:
        raise QLIPError(f"{where}: its images have different grids; make tokens of one size")

    def open_feed(kind: ConditionKind) -> PositionFeed[TokenBatch]:
        return TokenFeed(
            dataset,
            recipe.batch_size,
            seed=recipe.seed,
            num_workers=recipe.data.num_workers,
            captions=kind == "caption",
            class_ids=kind == "class",
            one_view=recipe.data.one_view,
        )

    return TokenSource(
        where,
        info.grid,
        1 << dataset.group_size,
        info.bits_per_token // dataset.group_size,
        info.code_fingerprint,
        f"{len(dataset):,} rows",
        open_feed,
    )


def open_scenes(split: str, tokenizer: str, group_size: int | None, batch_size: int, num_workers: int) -> TokenSource:
    """Open made scenes of a split, drawn on the fly.

    Args:
        split: such as ``captioned``.
        tokenizer: checkpoint that encodes them.
        group_size: bits per group; None is the tokenizer's.
        batch_size: of all ranks together.
        num_workers: drawing processes.

    Raises:
        QLIPError: no such split or checkpoint, or a group size that does not divide the bits of a token.
    """
    scenes = DrawnScenes(split, tokenizer, group_size)
    scenes.check()
    model = scenes.codec.model
    bits = group_size or model.group_size
    identity = {"scenes": split, "code_fingerprint": model.code_fingerprint}

    def open_feed(kind: ConditionKind) -> PositionFeed[TokenBatch]:
        return PositionFeed(scenes.batch, identity, batch_size, num_workers, name=scenes.name)

    return TokenSource(
        scenes.name,
        model.grid,
        1 << bits,
        model.num_bits // bits,
        model.code_fingerprint,
        "newly drawn scenes",
        open_feed,
    )
