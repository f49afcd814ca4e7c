"""A decoder over text and images: `UM3`.

It is a `CausalModel` whose last rows are visual; what differs is the softmax of the loss, `um3_nats`, and where the
visual rows start, `extend_rows`. Shapes: B rows of T positions, M targets, D width, V rows of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, Self, get_args, overload

import torch
from torch import Tensor, nn

from qlip.errors import QLIPError
from qlip.lm.causal import CausalModel
from qlip.lm.causal_config import CausalConfig
from qlip.lm.cross_entropy import linear_softmax
from qlip.modeling.checkpoint import resolve
from qlip.modeling.indices import indices_to_bits
from qlip.modeling.parts import BlockGroups
from qlip.um3.config import UM3Config
from qlip.um3.sequence import IGNORED, VISUAL, Grammar

Start = Literal["mean", "random", "bits"]
STARTS: tuple[Start, ...] = get_args(Start)
_MAY_DIFFER = {"vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
"""Fields of a text decoder's configuration without an effect on its weights."""


class Sequences(Protocol):
    """Inputs of :meth:`UM3.forward`.

    Attributes:
        ids: (B, T) int64.
        documents: (B, T) int64, number of the document in its row; -1 at padding.
        positions: (B, T) int64, from 0 in every document.
    """

    ids: Tensor
    documents: Tensor
    positions: Tensor


class UM3(nn.Module):
    """A decoder over text and images. Build one with `from_scratch`, `grown` or `from_pretrained`.

    Attributes:
        config: sizes and ids.
        decoder: of all ids.
        grammar: of its sequences.
    """

    def __init__(self, config: UM3Config, decoder: CausalModel | None = None) -> None:
        super().__init__()
        self.config = config
        self.decoder = CausalModel(config.decoder) if decoder is None else decoder
        self.grammar = Grammar(config)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.decoder.device

    # ---------------------------------------------------------------- training

    @overload
    def forward(self, batch: Sequences) -> Tensor: ...
    @overload
    def forward(self, batch: Sequences, norms: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, batch: Sequences, norms: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Negative log-likelihood of each id, given what stands before it in its document (eq. 6).

        Args:
            batch: see :class:`Sequences`.
            norms: also return the logarithms of the softmaxes' normalisers, for `z_loss`.

        Returns:
            (B, T) float32 nats at the places of the targets, 0 where `Grammar.target_types` is `IGNORED`; with `norms`
            also (B, T) float32 in the same way.
        """
        ids, documents = batch.ids, batch.documents
        hidden = self.decoder.hidden(self.decoder.embed(ids), batch.positions, documents)
        types = self.grammar.target_types(ids, documents)
        places = (types.flatten() != IGNORED).nonzero()[:, 0]  # (M,); each is predicted by the position before it
        states = hidden.flatten(0, 1).index_select(0, places - 1)
        weight, config = self.decoder.output_weight, self.config
        found = um3_nats(states, weight, ids.flatten()[places], types.flatten()[places], config)
        every = [one.new_zeros(ids.numel()).index_copy(0, places, one).view(ids.shape) for one in found]
        return (every[0], every[1]) if norms else every[0]

    # ---------------------------------------------------------------- construction

    @classmethod
    def from_scratch(cls, config: UM3Config, start: Start = "mean", seed: int = 0) -> Self:
        """Make a model of random weights, with visual rows as :func:`extend_rows`.

        Args:
            config: of the model.
            start: of the visual rows.
            seed: of the visual rows.
        """
        decoder = CausalModel(config.decoder)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in _row_weights(decoder):
                weight.copy_(extend_rows(weight[: config.visual_begin], config, start, generator))
        return cls(config, decoder)

    @classmethod
    def grown(cls, text_model: CausalModel, config: UM3Config, start: Start = "mean", seed: int = 0) -> Self:
        """Extend a text decoder by visual rows; the logits of its ids stay equal to the bit.

        Args:
            text_model: keeps its own weights.
            config: of the model, as :meth:`UM3Config.extend` makes it.
            start: of the visual rows, see :func:`extend_rows`; text rows that the decoder lacks start at the mean.
            seed: of the visual rows.

        Raises:
            QLIPError: the text decoder has another size, e.g. rows of another width.
        """
        ours, theirs = config.decoder.to_dict(), text_model.config.to_dict()
        for name in ("model_type", *CausalConfig.model_fields):
            if name in theirs and name not in _MAY_DIFFER and ours[name] != theirs[name]:
                raise QLIPError(f"the text decoder has {name} {theirs[name]!r}, the UM3's config {ours[name]!r}")
        if text_model.config.vocab_size > config.text_vocab_size:
            raise QLIPError(
                f"the text decoder has {text_model.config.vocab_size:,} rows, the UM3 {config.text_vocab_size:,} for"
                " text; all are kept"
            )
        with torch.device("meta"):
            decoder = CausalModel(config.decoder)
        state = {name: one.clone() for name, one in text_model.state_dict().items()}
        generator = torch.Generator().manual_seed(seed)
        for name in ("tok_embeddings.weight", "output.weight"):
            if name in state:
                state[name] = extend_rows(state[name], config, start, generator)
        decoder.load_state_dict(state, assign=True)
        return cls(config, decoder.requires_grad_(True))

    # ---------------------------------------------------------------- files

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        **hub: Any,
    ) -> Self:
        """Load a folder, or a Hub repository, of a stock decoder with ``um3.json``; see `CausalModel.from_pretrained`.

        Returns:
            The model in eval mode.

        Raises:
            QLIPError: as `CausalModel.from_pretrained`, or ``um3.json`` is absent or does not fit.
        """
        folder = resolve(name_or_path, **hub)
        config = UM3Config.from_folder(folder)
        return cls(config, CausalModel.from_pretrained(folder, dtype=dtype, device=device)).eval()

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write ``um3.json`` and a stock ``config.json`` and ``model.safetensors``, each whole or not at all.

        Args:
            folder: created if absent.
            dtype: of the stored tensors; the weights' own by default.
            state: all tensors by this model's names, to store instead of its own, e.g. EMA weights.
        """
        prefix = "decoder."
        stored = None if state is None else {name.removeprefix(prefix): one for name, one in state.items()}
        self.decoder.save_pretrained(folder, dtype, stored)
        self.config.save(Path(folder))


def um3_nats(
    hidden: Tensor, weight: Tensor, targets: Tensor, types: Tensor, config: UM3Config
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods of ids, without a tensor of all logits.

    With the separate softmax a text id is normalised over the text rows, a visual one over the visual rows (eq. 6), or
    over those of its group where groups have their own; with the joint one over all rows.

    Args:
        hidden: (M, D), states that predict them.
        weight: (V, D) of the output layer.
        targets: (M,) int64.
        types: (M,) int64 of the targets, without `IGNORED`.
        config: of the model.

    Returns:
        (M,) float32 nats, and (M,) float32 logarithms of the softmaxes' normalisers.
    """
    if config.softmax == "joint":
        return linear_softmax(hidden, weight, targets)
    text = (0, config.visual_begin)
    if config.rows == "shared":
        return linear_softmax(hidden, weight, targets, (text, config.group_rows(0)), types.clamp(max=VISUAL))
    groups = [config.group_rows(group) for group in range(config.num_groups)]
    return linear_softmax(hidden, weight, targets, (text, *groups), types)  # TEXT is 0, group k is 1 + k


def z_loss(norms: Tensor) -> Tensor:
    """Squared logarithms of the softmaxes' normalisers, which keep logits from drifting (arXiv 2204.02311)."""
    return norms.square()


@torch.no_grad()
def extend_rows(rows: Tensor, config: UM3Config, start: Start, generator: torch.Generator) -> Tensor:
    """Rows of a vocabulary of text and images from those of text.

    Args:
        rows: (V0, D) of text, V0 at most `config.text_vocab_size`; text rows that are missing start at the mean.
        config: of the model.
        start: of visual rows. "mean" is the mean of the text rows, so all predictions of a group are equal; "random"
            has the mean and the deviation of the text rows, channel by channel; "bits" too, as a sum of a vector for
            each bit's value.
        generator: of the random numbers, on the CPU.

    Returns:
        (V, D) of the dtype and on the device of `rows`.

    Raises:
        QLIPError: another start.
    """
    if start not in STARTS:
        raise QLIPError(f"start {start!r}: need {', '.join(STARTS)}")
    known = rows.float()
    mean, deviation = known.mean(0), known.std(0, correction=0)
    visual = mean.expand(config.visual_rows, -1)
    if start == "random":
        visual = mean + deviation * _noise((config.visual_rows, rows.shape[1]), rows, generator)
    elif start == "bits":
        bits, groups = config.group_size, config.visual_rows >> config.group_size
        noise = _noise((groups, bits, 2, rows.shape[1]), rows, generator)
        vectors = mean / bits + deviation / math.sqrt(bits) * noise
        values = indices_to_bits(torch.arange(1 << bits, device=rows.device)[:, None], bits)  # (2^G, G)
        visual = sum(vectors[:, bit, values[:, bit].long()] for bit in range(bits)).flatten(0, 1)  # type: ignore[union-attr]
    new_text = mean.expand(config.text_vocab_size - len(rows), -1)
    return torch.cat([rows, new_text.to(rows.dtype), visual.to(rows.dtype)])


def _noise(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal float32 numbers that do not depend on the device."""
    return torch.randn(shape, generator=generator, device="cpu").to(like.device)


def _row_weights(decoder: CausalModel) -> list[Tensor]:
    """Weights with a row for each id."""
    return [decoder.tok_embeddings.weight] + ([] if decoder.output is None else [decoder.output_weight])


def param_groups(model: nn.Module) -> BlockGroups:
    """How a `UM3` is trained: one part; embeddings and norms without weight decay."""
    return BlockGroups(model)
