"""Norms that drift before a model of two modalities diverges (Chameleon, arXiv 2405.09818, section 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from qlip.lm.transformer import DecoderBlock
from qlip.training.task import Report
from qlip.um3.model import UM3


@torch.no_grad()
def norms(model: UM3) -> Report:
    """Norms of a model's weights, whole ones also where they are sharded; a collective call then.

    Returns:
        ``norm/text_rows`` and ``norm/visual_rows``, means over the output layer's rows; ``norm/queries`` and
        ``norm/keys``, the largest of the layers: of a query or key before rotation, whose root mean square the norm's
        weight decides, or, without such norms, if the inputs have unit variance.
    """
    rows = _whole(model.decoder.output_weight.float().norm(dim=1))  # (V,)
    border = model.config.visual_begin
    queries, keys = [], []
    for layer in model.decoder.layers:
        assert isinstance(layer, DecoderBlock)
        attention = layer.attention
        if attention.q_norm is not None and attention.k_norm is not None:
            queries.append(_whole(attention.q_norm.weight.float()).norm())
            keys.append(_whole(attention.k_norm.weight.float()).norm())
        else:
            squares = _whole(attention.wqkv.weight.float().square().sum(1))  # (rows,)
            of_queries, of_keys, _ = squares.split(attention.sizes)
            queries.append((of_queries.sum() / attention.heads).sqrt())
            keys.append((of_keys.sum() / attention.kv_heads).sqrt())
    return {
        "norm/text_rows": rows[:border].mean(),
        "norm/visual_rows": rows[border:].mean(),
        "norm/queries": torch.stack(queries).max(),
        "norm/keys": torch.stack(keys).max(),
    }


def _whole(tensor: Tensor) -> Tensor:
    """Tensor of all ranks' shards."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
