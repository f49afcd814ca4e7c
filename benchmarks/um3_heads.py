"""UM3s that read an image token by token instead of group by group, for the part heads of ``benchmarks.um3``.

Each token is one position: it is read as the sum of the rows of its K groups, and a head of :mod:`qlip.lm.heads` draws
them from one state. Documents, losses, and what is measured are those of a UM3. Such a model is no stock decoder, so it
exists for the comparison alone.

Shapes: B sequences, M positions, S tokens, K groups, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, overload

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qlip.errors import QLIPError
from qlip.lm.cache import KVCache
from qlip.lm.complete import ENDED, Steps, complete
from qlip.lm.config import DecoderConfig, HeadConfig
from qlip.lm.guidance import Guidance
from qlip.lm.heads import build_head
from qlip.lm.sampling import Sampling, uniforms
from qlip.lm.transformer import initialize_module
from qlip.modeling import checkpoint
from qlip.modeling.indices import regroup
from qlip.training.job import Job
from qlip.training.parallel.distributed import Parallel
from qlip.um3.config import UM3Config
from qlip.um3.generate import Mode, UM3Steps
from qlip.um3.model import UM3, Sequences, um3_nats
from qlip.um3.sequence import IN_TEXT, TEXT, TEXT_TOKENS, VISUAL, first_ids, image_ids
from qlip.um3.session import Answer, Prompt, UM3Chat
from qlip.um3.training.recipe import UM3Recipe
from qlip.um3.training.task import UM3Kind, UM3Task

HEADS: Mapping[str, HeadConfig] = {
    "chain": HeadConfig(kind="chain"),
    "depth": HeadConfig(kind="depth", num_layers=2, hidden_size=128, num_attention_heads=4),  # as t2i/scenes
}
FILE = "head.safetensors"


class HeadedUM3(UM3):
    """A UM3 with one position per token of an image.

    Args:
        model: whose decoder it takes; its visual rows are those of each group.
        kind: one of `HEADS`.

    Raises:
        QLIPError: visual rows that the groups share.
    """

    def __init__(self, model: UM3, kind: str) -> None:
        super().__init__(model.config, model.decoder)
        config, sizes = model.config, model.config.decoder
        if config.rows != "per_group":
            raise QLIPError(f"model.rows {config.rows}: a token is the sum of its groups' rows; give rows per_group")
        self.head = build_head(
            DecoderConfig(
                hidden_size=sizes.hidden_size,
                num_hidden_layers=sizes.num_hidden_layers,
                num_attention_heads=sizes.num_attention_heads,
                grid=config.grid,
                codebook_size=1 << config.group_size,
                num_groups=config.num_groups,
                condition_size=1,
                head=HEADS[kind],
            )
        )
        for module in self.head.modules():
            initialize_module(module)
        for weight in self.head.last_layers():
            nn.init.zeros_(weight)

    @overload
    def forward(self, batch: Sequences) -> Tensor: ...
    @overload
    def forward(self, batch: Sequences, norms: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, batch: Sequences, norms: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """See :meth:`UM3.forward`; logarithms of the normalisers are 0."""
        ids, documents = batch.ids.flatten(), batch.documents
        types = self.grammar.target_types(batch.ids, documents).flatten()
        kept = ((types <= VISUAL) & (documents.flatten() >= 0)).nonzero()[:, 0]  # (M,)
        numbers = documents + (documents.max() + 1) * torch.arange(len(documents), device=ids.device)[:, None]
        embeddings = self.read(ids, types, kept)[None]
        hidden = self.decoder.hidden(embeddings, documents=numbers.flatten()[kept][None])[0]
        own = types[kept]
        at = (own == TEXT).nonzero()[:, 0]
        text, weight = kept[at], self.decoder.output_weight
        said, _ = um3_nats(hidden.index_select(0, at - 1), weight, ids[text], types[text], self.config)
        at = (own == VISUAL).nonzero()[:, 0]
        places = self._places(kept[at])  # (S, K)
        drawn = self.head.nats(
            hidden.index_select(0, at - 1)[None], (ids[places] - first_ids(self.config, ids.device))[None]
        )
        nats = said.new_zeros(len(ids)).index_copy(0, text, said).index_copy(0, places.flatten(), drawn.flatten())
        nats = nats.view(batch.ids.shape)
        return (nats, torch.zeros_like(nats)) if norms else nats

    def read(self, ids: Tensor, types: Tensor, kept: Tensor) -> Tensor:
        """Embed positions.

        Args:
            ids: int64 (L,) of documents.
            types: int64 (L,) of the same ids, see `Grammar.target_types`.
            kept: int64 (M,), places of ids of text, and of the first group of each token.

        Returns:
            (M, D).
        """
        tokens = (types[kept] == VISUAL).nonzero()[:, 0]
        added = self.decoder.embed(ids[self._places(kept[tokens])]).sum(1)
        return self.decoder.embed(ids[kept]).index_copy(0, tokens, added)

    def _places(self, firsts: Tensor) -> Tensor:
        """Places (S, K) of the groups of tokens from those of their first ones."""
        return firsts[:, None] + torch.arange(self.config.num_groups, device=firsts.device)

    def read_document(self, ids: Sequence[int]) -> Tensor:
        """Embed a document of text and whole images, (M, D)."""
        row = torch.tensor(ids, device=self.device)
        types = self.grammar.target_types(row[None], torch.zeros_like(row)[None])[0]
        return self.read(row, types, (types <= VISUAL).nonzero()[:, 0])

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """See :meth:`UM3.save_pretrained`; the head is a file of its own."""
        state = self.state_dict() if state is None else state
        under = {name: one for name, one in state.items() if name.startswith("decoder.")}
        super().save_pretrained(folder, dtype, under)
        head = {name.removeprefix("head."): one for name, one in state.items() if name.startswith("head.")}
        checkpoint.save_weights(head, Path(folder), dtype, FILE)


class HeadedKind(UM3Kind):
    """The task ``um3`` of a `HeadedUM3`.

    Args:
        head: one of `HEADS`.
    """

    def __init__(self, head: str) -> None:
        self.head = head

    def build(self, recipe: UM3Recipe, parallel: Parallel, folder: Path) -> Job[Any]:
        """See :class:`qlip.training.job.Kind`."""
        job = super().build(recipe, parallel, folder)
        assert isinstance(job.task, UM3Task) and job.task.start is not None
        model = HeadedUM3(job.task.um3, self.head).train()
        task = UM3Task(model, recipe, replace(job.task.start, model=model), parallel.wrap)
        return replace(job, task=task)


class HeadedChat(UM3Chat):
    """Continues independent prompts by a `HeadedUM3`, with texts or with one image each."""

    model: HeadedUM3

    @classmethod
    def from_folder(cls, folder: Path, head: str) -> Self:
        """Load what training has exported, in eval mode, on the CPU."""
        chat = UM3Chat.from_pretrained(folder, device="cpu")
        model = HeadedUM3(chat.model, head)
        model.head.load_state_dict(load_file(folder / FILE))
        return cls(model.eval(), chat.tokenizer, chat.codec, chat.settings, chat.name)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        generation_mode: Mode = "text",
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        guidance: Guidance | float | None = None,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> list[Answer]:
        """See :meth:`UM3Chat.generate`; "interleaved" and guidance are not there."""
        assert generation_mode != "interleaved" and guidance is None
        model, config, sampling = self.model, self.model.config, sampling or self.settings.sampling()
        draws = generation_mode == "image"
        begin = [config.begin_image] if draws else []
        read = [model.read_document([*self.encode(one), *begin]) for one in prompts]
        start = torch.tensor([max(map(len, read)) - len(one) for one in read])
        embeddings = nn.utils.rnn.pad_sequence(read, batch_first=True, padding_side="left")
        noise = uniforms(seed, range(len(read)) if numbers is None else numbers, config.num_tokens, config.num_groups)
        steps = complete(
            model.decoder,
            embeddings,
            start,
            max_tokens=config.num_tokens if draws else max_tokens or TEXT_TOKENS,
            stop=() if draws else config.decoder.stop_ids,
            seed=seed,
            numbers=numbers,
            how=_ImageSteps(model, sampling, noise) if draws else _text_steps(model, sampling, len(read)),
        )
        found = torch.stack(list(steps), 1)
        if not draws:
            return [list(self._texts([one for one in row if one != ENDED])) for row in found.tolist()]
        ids = image_ids(config, _groups(config, found))
        return [[image] for image in self.decode_image_tokens(ids)]


def _text_steps(model: HeadedUM3, sampling: Sampling, count: int) -> Steps:
    """Draw ids of text for a number of sequences; no image is begun."""
    return UM3Steps(model, sampling, None, "text", [IN_TEXT] * count, [[]] * count, model.config.decoder.stop_ids)


class _ImageSteps(Steps):
    """Draws whole tokens, each as one group of all its bits.

    Args:
        model: of the image.
        sampling: of each group.
        noise: float64 (B, N, K).
    """

    def __init__(self, model: HeadedUM3, sampling: Sampling, noise: Tensor) -> None:
        super().__init__(model.decoder, sampling)
        self.um3, self.noise, self.step = model, noise, 0

    def draw(self, hidden: Tensor, noise: Tensor, left: int) -> Tensor:
        """See :class:`qlip.lm.complete.Steps`."""

        def pick(logits: Tensor, first: int) -> Tensor:
            return self.sampling.draw(logits[:, 0].float(), self.noise[:, self.step, first])[:, None]

        config, values = self.um3.config, self.um3.head.draw(hidden, pick, self.step)  # (B, K)
        self.step += 1
        return regroup(values, config.group_size * config.num_groups, from_group_size=config.group_size)[:, 0]

    def embed(self, ids: Tensor, cache: KVCache) -> Tensor:
        """See :class:`qlip.lm.complete.Steps`."""
        config = self.um3.config
        return self.model.embed(_groups(config, ids) + first_ids(config, ids.device)).sum(1, keepdim=True)


def _groups(config: UM3Config, tokens: Tensor) -> Tensor:
    """Groups (..., K) of tokens that `_ImageSteps` has drawn."""
    return regroup(tokens[..., None], config.group_size, from_group_size=config.group_size * config.num_groups)
