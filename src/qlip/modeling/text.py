"""CLIP's causal text tower. Shapes: B texts of N positions, D width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlip.errors import QLIPError
from qlip.modeling.attention import causal_padding_mask
from qlip.modeling.config import QLIPTextConfig
from qlip.modeling.transformer import Encoder


@dataclass
class TextOutput:
    """Output of the text tower.

    Attributes:
        last_hidden_state: (B, N, D), normalised.
        pooler_output: (B, D), the normalised state at the first end-of-text token.
        hidden_states: the embeddings and every layer's output, (B, N, D) each, not normalised; None unless requested.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class TextEmbeddings(nn.Module):
    """Token plus position embeddings."""

    def __init__(self, config: QLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, N) int64 to (B, N, D)."""
        length, limit = input_ids.shape[1], self.position_embedding.num_embeddings
        if length > limit:
            raise QLIPError(f"input_ids have {length} positions, the model reads at most {limit}; truncate the text")
        return self.token_embedding(input_ids) + self.position_embedding.weight[:length]  # type: ignore[no-any-return]


class TextTower(nn.Module):
    """Embeddings, causal transformer, final norm, pooling at the end of the text."""

    def __init__(self, config: QLIPTextConfig) -> None:
        super().__init__()
        self.eos_token_id = config.eos_token_id
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> TextOutput:
        """Embed texts.

        Args:
            input_ids: (B, N) int64.
            attention_mask: (B, N), 0 at padding. Not needed if padding follows the end-of-text token.
            output_hidden_states: return every layer's output.
        """
        if input_ids.dim() != 2 or not input_ids.shape[1]:
            raise QLIPError(f"input_ids must be (B, N), got {tuple(input_ids.shape)}")
        hidden_states: list[Tensor] | None = [] if output_hidden_states else None
        x = self.embeddings(input_ids)  # (B, N, D)
        mask = None if attention_mask is None else causal_padding_mask(attention_mask, x.dtype)
        x = self.encoder(x, mask=mask, causal=mask is None, hidden_states=hidden_states)
        normed = self.final_layer_norm(x)
        pooled = normed[torch.arange(len(x), device=x.device), self._end_positions(input_ids)]  # (B, D)
        return TextOutput(normed, pooled, None if hidden_states is None else tuple(hidden_states))

    def _end_positions(self, input_ids: Tensor) -> Tensor:
        """(B,) position of the first end-of-text token, 0 if there is none."""
        if self.eos_token_id == 2:
            # CLIP's first configs hold a wrong id, 2; their end token is the largest id of the vocabulary
            return input_ids.argmax(-1)
        return (input_ids == self.eos_token_id).int().argmax(-1)
