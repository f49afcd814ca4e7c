"""The pre-norm transformer of all three towers: x + Attn(LN(x)), then x + MLP(LN(x))."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qlip.modeling.attention import Attention
from qlip.modeling.config import TowerConfig


class GeluMLP(nn.Module):
    """fc2(ffn_ln(act(fc1 x))); ``ffn_ln`` only with sub-LN."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_ln = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps) if config.subln else None
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        hidden = self.fc1(x)
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick else F.gelu(hidden)
        if self.ffn_ln is not None:
            hidden = self.ffn_ln(hidden)
        return self.fc2(hidden)  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """w3(ffn_ln(silu(w1 x) * w2 x)); ``ffn_ln`` only with sub-LN."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.w2 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_ln = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps) if config.subln else None
        self.w3 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        hidden = F.silu(self.w1(x)) * self.w2(x)
        if self.ffn_ln is not None:
            hidden = self.ffn_ln(hidden)
        return self.w3(hidden)  # type: ignore[no-any-return]


class Block(nn.Module):
    """A transformer layer: the unit that is compiled, sharded (FSDP2) and counted for depth; models subclass it.

    Attributes:
        activation_checkpointing: in training, store only the inputs and recompute the rest in the backward pass.
    """

    activation_checkpointing = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)
        return super().__call__(*args, **kwargs)


class Layer(Block):
    """One block: attention and MLP, each after a norm, each added to its input."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp: nn.Module = SwiGLU(config) if config.swiglu else GeluMLP(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        x = x + self.self_attn(self.layer_norm1(x), rope, mask, causal)
        return x + self.mlp(self.layer_norm2(x))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Stack of blocks, without a norm after the last."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        hidden_states: list[Tensor] | None = None,
        num_layers: int | None = None,
    ) -> Tensor:
        """Run the blocks.

        Args:
            x: (B, N, D).
            rope: rotary tables, (N, d / 2) each, or None.
            mask, causal: see :func:`qlip.modeling.attention.attention`.
            hidden_states: list to which the input and every block's output are appended.
            num_layers: number of blocks to run; all by default.

        Returns:
            (B, N, D).
        """
        if hidden_states is not None:
            hidden_states.append(x)
        for layer in self.layers[:num_layers]:
            x = layer(x, rope, mask, causal)
            if hidden_states is not None:
                hidden_states.append(x)
        return x
