"""The text decoder: `CausalModel`, with the weights and numbers of a stock Llama or Qwen3.

It reads embeddings, so that those of images can stand between those of ids, and its output layer is apart from its
states, so that a loss never needs all logits at once. Shapes: B sequences, T positions, D width, V ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.errors import QLIPError
from qlip.files import write_text
from qlip.lm.cache import KVCache
from qlip.lm.causal_config import CausalConfig
from qlip.lm.conditions import check_ids
from qlip.lm.cross_entropy import linear_cross_entropy
from qlip.lm.export import block_of_stock_layer, stock_layer
from qlip.lm.export.lingua import is_lingua, lingua_config, lingua_weights, own_lingua_weights, write_params
from qlip.lm.rotary import causal_frequencies, turn_table
from qlip.lm.transformer import (
    DecoderBlock,
    DecoderLayers,
    DocumentRuns,
    RMSNorm,
    causal_mask,
    document_mask,
    initialize_module,
    padded_mask,
)
from qlip.modeling import checkpoint
from qlip.modeling.parts import BlockGroups
from qlip.runtime.machine import pick_device, pick_dtype

_OUTER = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
"""Names outside the layers, and a stock model's."""


class CausalModel(nn.Module):
    """Autoregressive model of ids, given the embeddings before them.

    Its blocks are `Block`s, which training shards and compiles; `param_groups` says how an optimizer treats its
    parameters.

    Attributes:
        config: sizes.
        output: output layer; None where the input embeddings serve as such.
    """

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = DecoderLayers(
            DecoderBlock(
                width=config.hidden_size,
                inner=config.intermediate_size,
                heads=config.num_attention_heads,
                kv_heads=config.kv_heads,
                head_width=config.head_width,
                eps=config.rms_norm_eps,
                qk_norm=config.qk_norm,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output: nn.Module | None = None
        if not config.tie_word_embeddings:
            self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._turns: Tensor | None = None
        self.initialize()

    def initialize(self) -> None:
        """Start as stock models do."""
        for module in self.modules():
            initialize_module(module)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.tok_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.tok_embeddings.weight.dtype

    @property
    def output_weight(self) -> Tensor:
        """Weight (V, D) of the output layer."""
        return self.tok_embeddings.weight if self.output is None else self.output.weight  # type: ignore[return-value]

    def num_parameters(self) -> int:
        """Number of trained numbers."""
        return sum(one.numel() for one in self.parameters())

    # ---------------------------------------------------------------- arithmetic

    def embed(self, ids: Tensor) -> Tensor:
        """Embed ids (B, T) int64 as (B, T, D)."""
        return self.tok_embeddings(ids)  # type: ignore[no-any-return]

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache of keys and values for a number of sequences and positions."""
        return KVCache(self.config, rows, capacity, self.dtype, self.device)

    def hidden(
        self,
        embeddings: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        hidden_states: list[Tensor] | None = None,
    ) -> Tensor:
        """States that predict the next id, after the last norm.

        Args:
            embeddings: (B, T, D).
            positions: (B, T) int64; by default counted from each document's first position, or behind the cache.
            documents: (B, T) int64, a number per document and -1 for padding: a position sees itself and the earlier
                ones of its own document, which stands in one piece. None is one document without padding. With a cache
                all that is not padding belongs to the cached document.
            cache: keys and values of earlier positions; it is advanced.
            hidden_states: list to which every block's output is appended.

        Returns:
            (B, T, D); padding has finite states without meaning.

        Raises:
            QLIPError: a sequence longer than the model's context.
        """
        mask: Tensor | None
        past, steps = 0 if cache is None else cache.length, embeddings.shape[1]
        if positions is None and (documents is None or cache is not None) and past + steps > self.config.length:
            raise QLIPError(
                f"{past + steps} positions: the language model's context is {self.config.length}; shorten the text, or"
                " give fewer images"
            )
        if cache is not None:
            cache.pad(steps, None if documents is None else documents < 0)
        if cache is not None and cache.padding is not None:
            mask = padded_mask(cache.padding, steps, embeddings.dtype)
            if positions is None:
                positions = ((~cache.padding).cumsum(1) - 1).clamp_(min=0)[:, past:]
        elif cache is None and documents is not None:
            if positions is None:
                positions = positions_within(documents)
            if embeddings.device.type == "cpu":
                return self._packed_hidden(embeddings, positions, documents, hidden_states)
            mask = document_mask(documents, embeddings.dtype)
        else:
            mask = causal_mask(steps, past, None, embeddings.dtype, embeddings.device)
            if positions is None:
                positions = torch.arange(past, past + steps, device=embeddings.device)
        table = turn_table(positions, self._frequencies())
        x = self.layers.run(embeddings, table, mask, cache, hidden_states)
        if cache is not None:
            cache.advance(steps)
        return self.norm(x)  # type: ignore[no-any-return]

    def _packed_hidden(
        self, embeddings: Tensor, positions: Tensor, documents: Tensor, hidden_states: list[Tensor] | None
    ) -> Tensor:
        """`hidden` on CPUs: documents follow one another in one row, without the padding, whose states are 0."""
        real = (documents >= 0).flatten().nonzero()[:, 0]
        if not len(real):
            real = real.new_zeros(1)  # the layers run, as those of other ranks do
        runs = DocumentRuns.of(_begins(documents).flatten()[real])
        table = turn_table(positions.flatten()[real], self._frequencies())
        first = 0 if hidden_states is None else len(hidden_states)
        x = embeddings.flatten(0, 1).index_select(0, real)[None]
        x = self.norm(self.layers.run(x, table, runs, None, hidden_states))

        def spread(row: Tensor) -> Tensor:
            return row.new_zeros(documents.numel(), row.shape[-1]).index_copy(0, real, row[0]).view(embeddings.shape)

        if hidden_states is not None:
            hidden_states[first:] = map(spread, hidden_states[first:])
        return spread(x)

    def logits(self, hidden: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
        """Logits (..., V) of states (..., D), or those of the ids from ``begin`` up to ``end`` alone."""
        if self.output is None or (begin, end) != (0, None):
            packed: Callable[[int, int | None], nn.Module] | None = getattr(self.output, "part", None)
            if packed is not None:
                return packed(begin, end)(hidden)  # type: ignore[no-any-return]
            return F.linear(hidden, self.output_weight[begin:end])
        return self.output(hidden)  # type: ignore[no-any-return]

    def nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihoods of ids, without a tensor of all logits.

        Args:
            hidden: (M, D), states that predict them.
            targets: (M,) int64.

        Returns:
            (M,) float32.
        """
        return linear_cross_entropy(hidden, self.output_weight, targets)

    def forward(self, ids: Tensor, positions: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Logits of the ids that follow; see :meth:`hidden`.

        Args:
            ids: (B, T) int64.
            positions, documents: (B, T) int64.

        Returns:
            (B, T, V).

        Raises:
            QLIPError: an id out of range, or a sequence longer than the model's context.
        """
        check_ids(ids, self.config.vocab_size, "id")
        return self.logits(self.hidden(self.embed(ids), positions, documents))

    def _frequencies(self) -> Tensor:
        """Rotary frequencies (d / 2,) float32, made once per device."""
        if self._turns is None or self._turns.device != self.device:
            self._turns = causal_frequencies(self.config, self.device)
        return self._turns

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the configuration, and of each tensor's name, shape and first 1,024 values as float32."""
        config = self.config
        sizes = (config.num_attention_heads, config.kv_heads, config.rms_norm_eps, config.rope_theta)
        digest = hashlib.sha256(f"{sizes} {config.rope_scaling}".encode())
        for name, one in sorted(self.state_dict().items()):
            values = one.flatten()[:1024].float().cpu().numpy()
            digest.update(f"{name} {tuple(one.shape)}".encode() + values.astype("<f4").tobytes())
        return digest.hexdigest()

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
        """Load a stock Llama's or Qwen3's folder, or Hub repository, or a lingua checkpoint as safetensors.

        Args:
            name_or_path: folder with ``config.json``, or lingua's ``params.json``, and ``model.safetensors``, or its
                shards with an index; or a Hub id.
            dtype: of the weights in memory.
            device: of the weights; "auto" is a GPU where there is one.
            **hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

        Returns:
            The model in eval mode.

        Raises:
            QLIPError: no such folder or repository, another kind of model, a tensor missing, unexpected, of another
                shape or not finite, or this machine has no such device.
        """
        kind, place = pick_dtype(dtype), pick_device(device)
        files = checkpoint.Files(name_or_path, **hub)
        lingua, config = is_lingua(files.folder), config_of(files)
        embedding, head = "tok_embeddings.weight", "output.weight"
        if not lingua:
            embedding, head = _OUTER[embedding], _OUTER[head]
        with torch.device("meta"):
            model = cls(config)
        theirs = (lingua_weights if lingua else stock_weights)(model.state_dict(), config)
        shapes = {name: one.shape for name, one in theirs.items()}
        if twice := config.tie_word_embeddings and head in checkpoint.stored_shapes(files):
            shapes[head] = shapes[embedding]
        stored = checkpoint.read(files, shapes, dtype=kind)
        if twice and not torch.equal(stored.pop(head), stored[embedding]):
            raise QLIPError(
                f"{files.name}: tie_word_embeddings is true, but {head!r} is not {embedding!r}; set it to false"
            )
        model.load_state_dict((own_lingua_weights if lingua else own_weights)(stored, config), assign=True)
        return model.requires_grad_(True).to(place).eval()

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a stock Llama's or Qwen3's ``config.json`` and ``model.safetensors``, each whole or not at all.

        Args:
            folder: created if absent.
            dtype: of the stored tensors; the weights' own by default.
            state: all tensors by this model's names, to store instead of its own, e.g. EMA weights.
        """
        state = self._tensors() if state is None else state
        checkpoint.save_weights(stock_weights(state, self.config), Path(folder), dtype)
        stored = dtype or state["tok_embeddings.weight"].dtype
        config = self.config.to_dict() | {"dtype": str(stored).removeprefix("torch.")}
        write_text(Path(folder) / "config.json", json.dumps(config, indent=2) + "\n")

    def save_lingua(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a lingua checkpoint: ``params.json``, and its weights as ``model.safetensors``.

        Args:
            folder: created if absent.
            dtype: of the stored tensors; the weights' own by default.

        Raises:
            QLIPError: scaled rotary frequencies, which lingua does not have.
        """
        write_params(Path(folder), self.config)
        checkpoint.save_weights(lingua_weights(self._tensors(), self.config), Path(folder), dtype)

    def _tensors(self) -> dict[str, Tensor]:
        """Own tensors by name, to store them."""
        if not isinstance(self.layers[0], DecoderBlock):
            raise QLIPError("a packed model cannot be saved; save the model before packing it")
        return self.state_dict()


def config_of(files: checkpoint.Files) -> CausalConfig:
    """Configuration of a stock folder or of a lingua checkpoint. Raises QLIPError as `CausalModel.from_pretrained`."""
    if is_lingua(files.folder):
        return lingua_config(files.folder, checkpoint.stored_shapes(files))
    return CausalConfig.from_file(files.folder / "config.json")


def positions_within(documents: Tensor) -> Tensor:
    """Positions (B, T) counted from the first of each document of ``documents`` (B, T); padding counts too."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    return places - places.where(_begins(documents), 0).cummax(1).values


def _begins(documents: Tensor) -> Tensor:
    """Mark the first position of each document, bool (B, T); padding counts too."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return begins


def stock_weights(state: Mapping[str, Tensor], config: CausalConfig) -> dict[str, Tensor]:
    """Tensors of a `CausalModel` by a stock model's names, and in its order of rows."""
    width = config.head_width
    sizes = (config.num_attention_heads * width, config.kv_heads * width, config.kv_heads * width)
    found = {theirs: state[ours] for ours, theirs in _OUTER.items() if ours in state}
    for number in range(config.num_hidden_layers):
        layer = stock_layer(_under(state, f"layers.{number}."), sizes, width)
        found |= {f"model.layers.{number}.{name}": one for name, one in layer.items()}
    return found


def own_weights(stored: Mapping[str, Tensor], config: CausalConfig) -> dict[str, Tensor]:
    """Tensors of a stock model by a `CausalModel`'s names: the inverse of `stock_weights`."""
    found = {ours: stored[theirs] for ours, theirs in _OUTER.items() if theirs in stored}
    for number in range(config.num_hidden_layers):
        layer = block_of_stock_layer(_under(stored, f"model.layers.{number}."), config.head_width)
        found |= {f"layers.{number}.{name}": one for name, one in layer.items()}
    return found


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}


def param_groups(model: nn.Module) -> BlockGroups:
    """How a `CausalModel` is trained: one part; embeddings and norms without weight decay."""
    return BlockGroups(model)
