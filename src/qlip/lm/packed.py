"""Fast steps on CPUs: `pack` replaces a decoder's layers by ones with packed weights and fewer operations.

A step reads every weight once, so memory bounds it. PyTorch's linear layer streams weights well for one row only; with
oneDNN's packed layout 1, 2 and 8 rows take about the same time, and a row's result does not depend on the number of
rows for inputs of up to 1,024 channels. Beside that, weights of the norms move into the next product, gate and up are
one product, and queries and keys rotate together. With int8 weights the products read a quarter of the bytes.
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.errors import QLIPError
from qlip.lm.cache import KVCache, StaticCache
from qlip.lm.causal import CausalModel
from qlip.lm.heads import FlatHead
from qlip.lm.model import DecoderModel
from qlip.lm.transformer import DecoderAttention, DecoderBlock, DecoderLayers, Mask, RMSNorm, grouped_attention
from qlip.modeling.int8 import Int8Linear, Rounding

Weights = Literal["float32", "int8", "plain"]
Model = TypeVar("Model", DecoderModel, CausalModel)


def pack(model: Model, weights: Weights = "float32") -> Model:
    """Replace the transformer's blocks and the head's linear layers by packed ones, in place.

    A packed product has a fixed cost of about 10 microseconds, one of int8 about 25. So for decoders of a few million
    parameters and one or two rows per step "plain" is fastest, with the fewer operations alone; the last bits of a
    row then depend on the number of rows.

    Logits change by rounding (about 1e-6) with float32 weights. With int8 weights, quantised per output channel, and
    activations quantised per row, they change by a few hundredths; docs/decoder.md has the change in likelihood.
    The model can then neither be trained nor saved.

    Args:
        model: float32, on the CPU, in eval mode.
        weights: of the blocks: "float32" packed, "int8" packed, or "plain", float32 as they are. The head's are packed
            in float32, and with "plain" not.

    Returns:
        The same model.

    Raises:
        QLIPError: weights of another dtype, another device, or a PyTorch without oneDNN, which only "plain" does not
            need.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32:
        kind = f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}"
        raise QLIPError(f"packed weights need float32 weights on a CPU, not {kind}")
    if weights not in get_args(Weights):
        raise QLIPError(f"weights {weights!r}: give {' or '.join(get_args(Weights))}")
    if weights != "plain" and not torch.backends.mkldnn.is_available():
        raise QLIPError("packed weights need a PyTorch with oneDNN, and this build has none; give weights plain")
    model.eval().requires_grad_(False)
    model.layers = PackedLayers(PackedBlock(cast(DecoderBlock, one), weights) for one in model.layers)
    if weights == "plain":
        return model
    if isinstance(model, CausalModel):
        model.output = PackedLinear(model.output_weight, keep=True)
        return model
    if isinstance(model.head, FlatHead) and model.head.groups > 1:
        model.head.by_group = nn.ModuleList(PackedLinear(model.head.group_weight(k)) for k in range(model.head.groups))
        return model
    for module in list(model.head.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, keep=True))
            elif isinstance(child, DecoderBlock):
                setattr(module, name, PackedBlock(child, "float32"))
    return model


class PackedLinear(nn.Module):
    """x @ weight.T with a weight in oneDNN's own layout.

    Args:
        weight: (M, C) float32.
        keep: keep the plain weight too, as ``weight``, which the losses of heads read.
    """

    def __init__(self, weight: Tensor, keep: bool = False) -> None:
        super().__init__()
        self.in_features = weight.shape[1]
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.weight = weight.detach() if keep else None
        self._parts: dict[tuple[int, int | None], PackedLinear] = {}

    def part(self, begin: int, end: int | None) -> PackedLinear:
        """Layer of some outputs alone, packed at its first use; the plain weight must have been kept."""
        if (begin, end) not in self._parts:
            assert self.weight is not None
            self._parts[begin, end] = PackedLinear(self.weight[begin:end])
        return self._parts[begin, end]

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., M) float32."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
        return found


class PackedBlock(nn.Module):
    """`DecoderBlock` in eval mode, with fewer and packed products; see there."""

    def __init__(self, block: DecoderBlock, weights: Weights) -> None:
        super().__init__()
        attention: DecoderAttention = block.attention
        ffn = block.feed_forward
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        self.root = torch.tensor(math.sqrt(block.attention_norm.eps * attention.wqkv.in_features))
        self.qkv = _product(_folded(attention.wqkv.weight, block.attention_norm), weights)
        self.wo = _product(attention.wo.weight, weights)
        self.gate_up = _product(_folded(torch.cat([ffn.w1.weight, ffn.w3.weight]), block.ffn_norm), weights)
        self.w2 = _product(ffn.w2.weight, weights)
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        mask: Mask = None,
        cache: KVCache | StaticCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """See :class:`DecoderBlock`."""
        turned = self.heads + self.kv_heads
        heads = self.qkv(_normed(x, self.root)).unflatten(-1, (turned + self.kv_heads, -1))  # (B, S, H + 2 H_kv, d)
        qk, v = heads[:, :, :turned], heads[:, :, turned:].transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat([self.q_norm(qk[:, :, : self.heads]), self.k_norm(qk[:, :, self.heads :])], 2)
        turns = torch.view_as_complex(table).unsqueeze(-2)  # (S, 1, d / 2)
        pairs = torch.view_as_complex(qk.unflatten(-1, (-1, 2)))
        qk = torch.view_as_real(pairs * turns).flatten(-2).transpose(1, 2)  # (B, H + H_kv, S, d)
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        if cache is not None:
            k, v = cache.update(layer, k, v)
        merged = grouped_attention(q, k, v, mask, 0.0)
        x = x + self.wo(merged.transpose(1, 2).flatten(-2))
        return self._fed(x)

    def step(self, x: Tensor, turns: Tensor, mask: Mask, slot: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Run the block on one new position, with the same result as `forward` in fewer operations.

        Args:
            x: (R, D).
            turns: complex (H + 2 H_kv, d / 2), or (R, H + 2 H_kv, d / 2); 1 for values.
            mask: additive, (R, 1, 1, positions so far), or None.
            slot: (R, 2, H_kv, d), a view of the cache that takes the new keys and values.
            keys, values: (R, H_kv, positions so far, d), the cache with the new position.

        Returns:
            (R, D).
        """
        rows, turned = len(x), self.heads + self.kv_heads
        heads = self.qkv(_normed(x, self.root)).view(rows, turned + self.kv_heads, -1)  # (R, H + 2 H_kv, d)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), 1)
            heads = torch.cat([self.q_norm(q), self.k_norm(k), v], 1)
        torch.view_as_complex(heads.view(rows, turned + self.kv_heads, -1, 2)).mul_(turns)
        slot.copy_(heads[:, self.heads :].view(slot.shape))
        merged = grouped_attention(heads[:, : self.heads, None], keys, values, mask, 0.0)
        return self._fed(x + self.wo(merged.reshape(rows, -1)))

    def _fed(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(_normed(x, self.root)).chunk(2, -1)
        return x + self.w2(F.silu(gate).mul_(up))  # type: ignore[no-any-return]


class PackedLayers(DecoderLayers):
    """`PackedBlock`s; a step of one position takes its views of the cache and its rotation once for all of them."""

    def run(
        self,
        x: Tensor,
        table: Tensor,
        mask: Mask = None,
        cache: KVCache | StaticCache | None = None,
        hidden_states: list[Tensor] | None = None,
    ) -> Tensor:
        """See :class:`DecoderLayers`."""
        if not isinstance(cache, KVCache) or x.shape[1] > 1 or hidden_states is not None:
            return super().run(x, table, mask, cache, hidden_states)
        blocks = [cast(PackedBlock, one) for one in self]
        turned, kept = blocks[0].heads + blocks[0].kv_heads, blocks[0].kv_heads
        turns = torch.view_as_complex(table)  # (1, d / 2), or (R, 1, d / 2)
        heads = [turns.expand(*turns.shape[:-2], turned, -1), turns.new_ones(*turns.shape[:-2], kept, turns.shape[-1])]
        turns = torch.cat(heads, -2)
        x = x[:, 0]
        for block, slot, keys, values in zip(blocks, *cache.next_position(), strict=True):
            x = block.step(x, turns, mask, slot, keys, values)
        return x[:, None]


def _normed(x: Tensor, root: Tensor) -> Tensor:
    """x / sqrt(sum of squares + root^2): RMSNorm but for its weight and sqrt(D), which the next product has."""
    scaled: Tensor = x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), root)  # three kernels
    return scaled


def _folded(weight: Tensor, norm: RMSNorm) -> Tensor:
    """The weight of a product of normed inputs, times what `_normed` leaves out."""
    folded: Tensor = weight.detach() * (norm.weight.detach() * weight.shape[1] ** 0.5)
    return folded


def _product(weight: Tensor, weights: Weights) -> nn.Module:
    if weights == "float32":
        return PackedLinear(weight)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear if weights == "plain" else Int8Linear(linear, Rounding())
