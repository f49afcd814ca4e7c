"""The decoder transformer over visual tokens: `DecoderModel`.

The sequence is a prefix of T positions, the condition, and then S steps: a token per step, or a group per step with the
flat head. The state of position T - 1 + s predicts step s. Shapes: B images, N tokens, K groups, D width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.errors import QLIPError
from qlip.files import write_text
from qlip.lm.cache import KVCache, StaticCache
from qlip.lm.conditions import Condition, ConditionModule, FeatureCondition, Prefix, build_condition, check_ids
from qlip.lm.config import MODEL_TYPE, DecoderConfig
from qlip.lm.heads import Head, build_head
from qlip.lm.rotary import rotary_table
from qlip.lm.transformer import DecoderBlock, DecoderLayers, RMSNorm, causal_mask, initialize_module
from qlip.modeling import checkpoint
from qlip.modeling.parts import BlockGroups
from qlip.runtime.machine import pick_device, pick_dtype


class DecoderModel(nn.Module):
    """Autoregressive model of an image's indices given a condition.

    Its blocks are `Block`s, which training shards and compiles; `param_groups` says how an optimizer treats its
    parameters.

    Attributes:
        config: sizes.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        rows = config.codebook_size * (1 if config.shared_embeddings else config.num_groups)
        self.tok_embeddings = nn.Embedding(rows, config.hidden_size)
        self.target_positions = nn.Embedding(config.num_tokens, config.hidden_size) if config.target_positions else None
        self.condition: ConditionModule = build_condition(config)
        self.layers = DecoderLayers(
            DecoderBlock(
                width=config.hidden_size,
                inner=config.ffn_width,
                heads=config.num_attention_heads,
                kv_heads=config.kv_heads,
                head_width=config.head_width,
                eps=config.rms_norm_eps,
                qk_norm=config.qk_norm,
                attention_dropout=config.attention_dropout,
                residual_dropout=config.residual_dropout,
                ffn_dropout=config.ffn_dropout,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head: Head = build_head(config)
        self._table: Tensor | None = None
        self._compiled: Callable[[Tensor, StaticCache], Tensor] | None = None
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Start as LlamaGen: linear layers and embeddings normal of deviation 0.02, the head's last layer zero."""
        for module in self.modules():
            initialize_module(module)
            if isinstance(module, FeatureCondition):
                nn.init.normal_(module.uncond_embedding, std=module.size**-0.5)
        for weight in self.head.last_layers():
            nn.init.zeros_(weight)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.tok_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.tok_embeddings.weight.dtype

    def num_parameters(self) -> int:
        """Number of trained numbers."""
        return sum(one.numel() for one in self.parameters())

    def check_tokenizer(self, code_fingerprint: str, where: str) -> None:
        """Refuse tokens of another tokenizer than the one that the model was trained on.

        Args:
            code_fingerprint: of the tokenizer or the token dataset.
            where: its name, for the error.

        Raises:
            QLIPError: another fingerprint; a model that names none takes any.
        """
        own = self.config.code_fingerprint
        if own is not None and own != code_fingerprint:
            raise QLIPError(
                f"{where}: its tokens are of another tokenizer ({code_fingerprint[:12]}) than this decoder's"
                f" ({own[:12]}); use the tokenizer that the decoder was trained on"
            )

    def check_text_encoder(self, fingerprint: str, where: str) -> None:
        """Refuse features of another text encoder than the one that the model was trained with.

        Args:
            fingerprint: of the text encoder.
            where: its name, for the error.

        Raises:
            QLIPError: another fingerprint; a model that names none takes any.
        """
        own = self.config.text_fingerprint
        if own is not None and own != fingerprint:
            name = f", {self.config.text_encoder}" if self.config.text_encoder else ""
            raise QLIPError(
                f"{where}: another text encoder ({fingerprint[:12]}) than this decoder's ({own[:12]}{name}); use the"
                " encoder that the decoder was trained with"
            )

    # ---------------------------------------------------------------- input and output of the transformer

    def rotary(self) -> Tensor:
        """Rotary table of the whole sequence, (T + S, d / 2, 2) float32, made once per device."""
        if self._table is None or self._table.device != self.device:
            self._table = rotary_table(self.config, self.device)
        return self._table

    def check_indices(self, indices: Tensor) -> None:
        """Refuse indices that this model has no rows for.

        Raises:
            QLIPError: another type, another number of tokens or groups, or a value out of range.
        """
        config = self.config
        wanted = (config.num_tokens, config.num_groups)
        if indices.ndim != 3 or tuple(indices.shape[1:]) != wanted:
            raise QLIPError(
                f"indices of shape {tuple(indices.shape)}: this decoder reads (B, {wanted[0]}, {wanted[1]}), images of"
                f" {config.grid[0]} x {config.grid[1]} tokens of {wanted[1]} groups"
            )
        check_ids(indices, config.codebook_size, "index")

    def steps(self, indices: Tensor) -> Tensor:
        """Indices (B, N, K) as the groups of each step, (B, S, K), or (B, N K, 1) with the flat head."""
        return indices.reshape(len(indices), -1, self.config.groups_per_step)

    def embed_steps(self, steps: Tensor, first: int = 0) -> Tensor:
        """Embed the groups of steps; a token's groups are added.

        Args:
            steps: (B, Q, K) int64, or (B, Q, 1) with the flat head.
            first: number of the first of these steps.

        Returns:
            (B, Q, D).
        """
        if not self.config.shared_embeddings and self.config.num_groups > 1:
            group: Tensor | int
            if self.config.groups_per_step > 1:
                group = torch.arange(steps.shape[-1], device=steps.device)  # (K,)
            elif steps.shape[1] == 1:
                group = first % self.config.num_groups
            else:
                number = torch.arange(first, first + steps.shape[1], device=steps.device)
                group = (number % self.config.num_groups)[:, None]  # (Q, 1)
            steps = steps + group * self.config.codebook_size
        if steps.shape[-1] == 1:
            return self.tok_embeddings(steps[..., 0])  # type: ignore[no-any-return]
        added = F.embedding_bag(steps.flatten(0, 1), self.tok_embeddings.weight, mode="sum")
        return added.view(*steps.shape[:2], -1)

    def run(
        self,
        x: Tensor,
        prefix_start: Tensor | None = None,
        cache: KVCache | None = None,
        table: Tensor | None = None,
        hidden_states: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the transformer on new positions.

        Args:
            x: (B, Q, D), behind what the cache holds.
            prefix_start: (B,) first visible position of each sequence; with a cache its own ``start`` counts.
            cache: of earlier positions; it is advanced.
            table: rotary table of these positions; by default that of the sequence.
            hidden_states: list to which every block's output is appended.

        Returns:
            (B, Q, D), after the last norm.
        """
        past, quantity = 0 if cache is None else cache.length, x.shape[1]
        start = prefix_start if cache is None else cache.start
        if table is None:
            table = self.rotary()[past : past + quantity]
        mask = causal_mask(quantity, past, start, x.dtype, x.device)
        x = self.layers.run(x, table, mask, cache, hidden_states)
        if cache is not None:
            cache.advance(quantity)
        return self.norm(x)  # type: ignore[no-any-return]

    def run_static(self, x: Tensor, cache: StaticCache) -> Tensor:
        """Run the transformer on one position, as `run`, with equal shapes at every step.

        Args:
            x: (R, 1, D).
            cache: it is advanced.

        Returns:
            (R, 1, D), after the last norm.
        """
        table = self.rotary().index_select(0, cache.position)
        mask = cache.mask(x.dtype)
        x = self.layers.run(x, table, mask, cache)
        cache.position.add_(1)
        return self.norm(x)  # type: ignore[no-any-return]

    def compiled_step(self) -> Callable[[Tensor, StaticCache], Tensor]:
        """Return `run_static`, compiled as one graph; made once per model.

        Raises:
            QLIPError: packed layers, whose operators cannot be compiled.
        """
        if not isinstance(self.layers[0], DecoderBlock):
            raise QLIPError("a packed decoder cannot be compiled; compile the model that was not packed")
        if self._compiled is None:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self._compiled = torch.compile(self.run_static, fullgraph=True, dynamic=False, mode=mode)
        return self._compiled

    # ---------------------------------------------------------------- training

    def hidden(
        self,
        indices: Tensor,
        prefix: Prefix,
        order: Tensor | None = None,
        hidden_states: list[Tensor] | None = None,
    ) -> Tensor:
        """States that predict each step, from the true steps before it.

        Args:
            indices: (B, N, K) int64, in raster order.
            prefix: of the same samples.
            order: (B, N) int64, places in the order in which they are predicted; None is raster order. Needs a model
                with ``target_positions``.
            hidden_states: list to which every block's output (B, T + S - 1, D) is appended.

        Returns:
            (B, S, D); row s predicts step s, of place ``order[:, s]``.
        """
        config = self.config
        table = self.rotary()[: config.length - 1]
        if order is not None:
            if self.target_positions is None:
                raise QLIPError(
                    "this decoder predicts in raster order; random order needs target_positions in its config"
                )
            indices = indices.gather(1, order[..., None].expand_as(indices))
            image = self.rotary()[config.prefix_length :][order[:, :-1]]  # (B, N - 1, d / 2, 2)
            table = torch.cat([table[: config.prefix_length].expand(len(order), -1, -1, -1), image], 1)
        steps = self.steps(indices)
        x = torch.cat([prefix.embeddings, self.embed_steps(steps[:, :-1])], 1)  # (B, T + S - 1, D)
        x = self.add_target_positions(x, config.prefix_length - 1, order)
        x = F.dropout(x, config.embedding_dropout, self.training)
        out = self.run(x, prefix.start, table=table, hidden_states=hidden_states)
        return out[:, config.prefix_length - 1 :]

    def add_target_positions(self, x: Tensor, begin: int, order: Tensor | None = None, first: int = 0) -> Tensor:
        """Add the embedding of the place that each position predicts, where the model has such.

        Args:
            x: (B, Q, D).
            begin: first position of ``x`` that predicts a step.
            order: (B, N) places; None is raster order.
            first: number of the step that position ``begin`` predicts.
        """
        if self.target_positions is None:
            return x
        count = x.shape[1] - begin
        places = (
            torch.arange(first, first + count, device=x.device) if order is None else order[:, first : first + count]
        )
        return torch.cat([x[:, :begin], x[:, begin:] + self.target_positions(places)], 1)

    def forward(
        self,
        indices: Tensor,
        condition: Condition,
        inputs: Tensor | None = None,
        dropped: Tensor | None = None,
        order: Tensor | None = None,
    ) -> Tensor:
        """Negative log-likelihoods of an image's groups.

        Args:
            indices: (B, N, K) int64, the targets.
            condition: of the same samples.
            inputs: (B, N, K) int64, what the transformer reads, such as noisy indices; None reads the targets.
            dropped: bool (B,), True where the null condition replaces the sample's; None for nowhere.
            order: see :meth:`hidden`.

        Returns:
            (B, N, K) float32 nats, in raster order; each given the steps before it, and what the head reads.

        Raises:
            QLIPError: indices or conditions that do not fit the model.
        """
        self.check_indices(indices)
        prefix = self.condition(condition, dropped)
        hidden = self.hidden(indices if inputs is None else inputs, prefix, order)
        if order is None:
            return self.head.nats(hidden, self.steps(indices)).reshape(indices.shape)
        places = order[..., None].expand_as(indices)
        nats = self.head.nats(hidden, indices.gather(1, places))
        return torch.zeros_like(nats).scatter(1, places, nats)

    @torch.inference_mode()
    def bits_per_image(self, indices: Tensor, condition: Condition) -> Tensor:
        """Negative log-likelihood of images in bits, in eval mode.

        Args:
            indices: (B, N, K) int64.
            condition: of the same samples.

        Returns:
            (B,) float32.
        """
        return self(indices, condition).sum((1, 2)) / math.log(2)  # type: ignore[no-any-return]

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
        """Load a decoder's folder, or a Hub repository.

        Args:
            name_or_path: folder with ``config.json`` and ``model.safetensors``, or a Hub id.
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
        config = DecoderConfig.from_file(files.folder / "config.json")
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        model.load_state_dict(checkpoint.read(files, shapes), assign=True)
        return model.requires_grad_(True).to(place, kind).eval()

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``, each whole or not at all.

        Args:
            folder: created if absent.
            dtype: of the stored tensors; the weights' own by default.
            state: all tensors by name, to store instead of the model's own, e.g. EMA weights.
        """
        if state is None and not isinstance(self.layers[0], DecoderBlock):
            raise QLIPError("a packed decoder cannot be saved; save the model before packing it")
        checkpoint.save_weights(self.state_dict() if state is None else state, Path(folder), dtype)
        config = {"architectures": [type(self).__name__], "model_type": MODEL_TYPE} | self.config.to_dict()
        write_text(Path(folder) / "config.json", json.dumps(config, indent=2) + "\n")

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None, **options: Any) -> str:
        """Upload the folder to a Hub repository, created if absent.

        Args:
            repo_id: "owner/name".
            private: for a new repository.
            token: by default the one that is logged in.
            **options: of ``HfApi.upload_folder``, such as ``commit_message``.

        Returns:
            The commit's address.

        Raises:
            QLIPError: offline, or no permission.
        """
        return checkpoint.push([self.save_pretrained], repo_id, private=private, token=token, **options)


def param_groups(model: nn.Module) -> BlockGroups:
    """How a `DecoderModel` is trained: one part; embeddings and norms without weight decay."""
    return BlockGroups(model)
