"""Made scenes as tokens, drawn and encoded while they are read: no layout comes twice.

The scene at position n of the feed is scene n of a split of `qlip.data.public.scene_captions`; the captions of epoch
2 and later are new samples of the same distribution too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from qlip.archive.dataset.stream import TokenBatch
from qlip.data.loader.feed import PositionFeed
from qlip.data.loader.sampler import Numbers
from qlip.data.public.scene_captions import LENGTHS, SPLITS, CaptionedScenes
from qlip.data.public.scenes import draw
from qlip.errors import QLIPError
from qlip.modeling.indices import regroup
from qlip.registry import unknown_name
from qlip.t2i.token_source import ConditionKind, TokenSource
from qlip.tokens.image_codec import ImageCodec


@dataclass(frozen=True)
class DrawnScenes:
    """Draws and encodes the scenes at positions on the CPU; pickles into workers.

    Attributes:
        split: of the scenes.
        tokenizer: checkpoint that encodes them.
        group_size: bits per group; None is the tokenizer's.
    """

    split: str
    tokenizer: str
    group_size: int | None

    @cached_property
    def codec(self) -> ImageCodec:
        """The tokenizer; loaded once per process."""
        return ImageCodec.from_pretrained(self.tokenizer, device="cpu")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "codec"}

    @torch.no_grad()
    def batch(self, positions: Numbers) -> TokenBatch:
        """Draw and encode the scenes at positions, int64 (B,)."""
        scenes, model, preprocessing = CaptionedScenes(self.split), self.codec.model, self.codec.processor.preprocessing
        found = [scenes.scene(number) for number in positions.tolist()]
        pixels = [preprocessing.pixels(preprocessing.resized(draw(scene))) for _, scene in found]
        indices = model.encode(torch.stack(pixels))
        return TokenBatch(
            indices=regroup(indices, self.group_size or model.group_size, from_group_size=model.group_size),
            rows=torch.from_numpy(positions),
            epochs=torch.from_numpy(positions // LENGTHS[self.split]),
            keys=[scenes.key(number) for number in positions.tolist()],
            captions=[(description.caption,) for description, _ in found],
            labels=[description.family for description, _ in found],
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
    if split not in SPLITS:
        raise unknown_name(split, "split of the made scenes", SPLITS)
    scenes = DrawnScenes(split, tokenizer, group_size)
    model = scenes.codec.model
    bits = group_size or model.group_size
    if model.num_bits % bits:
        raise QLIPError(f"group_size {bits} does not divide {model.num_bits} bits, a token of {tokenizer}")
    identity = {"scenes": split, "code_fingerprint": model.code_fingerprint}

    def open_feed(kind: ConditionKind) -> PositionFeed[TokenBatch]:
        return PositionFeed(scenes.batch, identity, batch_size, num_workers, name=f"scenes:{split}")

    return TokenSource(
        f"scenes:{split}",
        model.grid,
        1 << bits,
        model.num_bits // bits,
        model.code_fingerprint,
        "newly drawn scenes",
        open_feed,
    )
