"""A kind of training from outside the package, in one file: a small decoder over a dataset of image tokens.

Shapes: B samples, S sub-tokens of a sample, T sub-tokens of a packed batch, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.stream import TokenBatch, TokenFeed
from qlip.data.loader.batch import PerSample, SampleBatch
from qlip.modeling.parts import BlockGroups
from qlip.modeling.transformer import Block
from qlip.training.job import Job
from qlip.training.linear_task import LinearTask
from qlip.training.parallel.distributed import Parallel
from qlip.training.recipe_schema import Count, RunRecipe, Section
from qlip.training.task import Wrap, unwrapped

VOCABULARY = 128  # values of a group of 7 bits
LONGEST = 24


class ModelSection(Section):
    """Size of the decoder."""

    width: Count = 16
    layers: Count = 2


class DataSection(Section):
    """A token dataset, and how its rows become sequences."""

    path: str
    layout: Literal["even", "ragged", "packed"] = "even"
    num_workers: int = 0


class Recipe(RunRecipe):
    """Recipe of the task ``tiny_lm``."""

    FREE: ClassVar[tuple[str, ...]] = (*RunRecipe.FREE, "data.num_workers")

    task: Literal["tiny_lm"] = "tiny_lm"
    model: ModelSection = ModelSection()
    data: DataSection


# ---------------------------------------------------------------------- data


@dataclass
class Sequences(SampleBatch):
    """Padded sequences: ids int64 (B, S), lengths int64 (B,)."""

    ids: PerSample[Tensor]
    lengths: PerSample[Tensor]

    def flat(self) -> tuple[Tensor, Tensor]:
        """Ids and document numbers, (B, S) each; padding has document -1."""
        real = torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]
        return self.ids, torch.where(real, 0, -1)


@dataclass
class Packed(SampleBatch):
    """Sequences one after the other: ids int64 (T,), ends int64 (B + 1,), the first of which is 0."""

    ids: Any
    ends: Any

    def __len__(self) -> int:
        return len(self.ends) - 1

    def split(self, number: int) -> list[Packed]:
        """Cut between sequences."""
        bounds = [len(self) * part // number for part in range(number + 1)]
        cuts = [self.ends[first : last + 1] for first, last in zip(bounds, bounds[1:], strict=False)]
        return [Packed(self.ids[int(ends[0]) : int(ends[-1])], ends - ends[0]) for ends in cuts]

    def flat(self) -> tuple[Tensor, Tensor]:
        """Ids and document numbers, (1, T) each."""
        documents = torch.arange(len(self), device=self.ids.device).repeat_interleave(self.ends.diff())
        return self.ids[None], documents[None]


def sequences_of(make: Any, layout: str, positions: Any) -> Sequences | Packed:
    """Read rows of the dataset and lay them out; the length of a row depends on its number alone."""
    batch: TokenBatch = make(positions)
    assert isinstance(batch.indices, Tensor)
    ids = batch.indices.flatten(1)[:, :LONGEST]  # (B, S)
    lengths = torch.full((len(ids),), LONGEST) if layout == "even" else 4 + batch.rows * 7 % (LONGEST - 3)
    if layout != "packed":
        return Sequences(ids, lengths, skipped=batch.skipped)
    rows = [row[:length] for row, length in zip(ids, lengths.tolist(), strict=True)]
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Packed(torch.cat(rows) if rows else ids.flatten(), ends, skipped=batch.skipped)


# ---------------------------------------------------------------------- model


class DecoderBlock(Block):
    """x + Attn(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)  # a key's bias has no gradient, only rounding errors
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D); the mask is (B, 1, S, S)."""
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, -1)  # (B, 1, S, D)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, mask).squeeze(1))
        return x + self.mlp(x)


class Decoder(nn.Module):
    """Predicts each next sub-token of its document."""

    def __init__(self, settings: ModelSection) -> None:
        super().__init__()
        width = settings.width
        self.embed, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(LONGEST, width)
        self.blocks = nn.ModuleList(DecoderBlock(width) for _ in range(settings.layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, documents: Tensor) -> Tensor:
        """Ids and document numbers (B, S) to the summed cross entropy of all next sub-tokens."""
        length = ids.shape[1]
        same = documents[:, :, None] == documents[:, None]  # (B, S, S)
        mask = same & torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        places = mask.sum(-1) - 1  # of a sub-token in its document
        x = self.embed(ids) + self.places(places.clamp(max=LONGEST - 1))
        for block in self.blocks:
            x = block(x, mask[:, None])
        follows = same[:, 1:].diagonal(dim1=1, dim2=2) & (documents[:, 1:] >= 0)  # (B, S - 1)
        logits = self.head(self.norm(x))[:, :-1]  # (B, S - 1, V)
        losses = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        return (losses * follows).sum()


# ---------------------------------------------------------------------- task


class NextToken(LinearTask[Any]):
    """Cross entropy of the next sub-token, per sub-token."""

    terms: ClassVar = {"next_token": "tokens"}

    def __init__(self, recipe: Recipe, wrap: Wrap = unwrapped) -> None:
        model = Decoder(recipe.model)
        super().__init__(model, recipe.optimizer, BlockGroups(model), wrap)

    def counts(self, batch: Sequences | Packed) -> dict[str, int]:
        """Number of sub-tokens that are predicted."""
        lengths = batch.ends.diff() if isinstance(batch, Packed) else batch.lengths
        return {"tokens": int((lengths - 1).sum())}

    def sums(self, batch: Sequences | Packed) -> Mapping[str, Tensor]:
        """Summed cross entropy; an empty batch runs the network on a sample that counts nothing."""
        ids, documents = batch.flat()
        if not len(batch):
            ids, documents = ids.new_zeros(1, 2), ids.new_full((1, 2), -1)
        return {"next_token": self.network(ids, documents)}

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Weights alone."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")


class Kind:
    """The entry point ``tiny_lm`` of the group ``qlip.tasks``."""

    Recipe = Recipe
    folders = ()

    def build(self, recipe: Recipe, parallel: Parallel, folder: Path) -> Job[Any]:
        """A decoder over a token dataset."""
        dataset = TokenDataset(recipe.data.path)
        feed: Any = TokenFeed(dataset, recipe.batch_size, seed=recipe.seed, num_workers=recipe.data.num_workers)
        feed.make = partial(sequences_of, feed.make, recipe.data.layout)
        task = NextToken(recipe, parallel.wrap)
        return Job(task, feed, unit="tokens", units_per_sample=LONGEST, describe=f"{len(dataset):,} rows")
