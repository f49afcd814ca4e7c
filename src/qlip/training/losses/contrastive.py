"""L_align: symmetric InfoNCE (CLIP, arXiv 2103.00020), with shared targets among equals."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, match_ids: Tensor | None = None) -> Tensor:
    """Contrastive loss of B matched pairs, in float32 whatever autocast says.

    Where several pairs mean the same (equal captions, or one class), all of them are positives of each other and share
    the target equally. With one positive a pair, its floor would be the logarithm of the number of twins.

    Args:
        image_embeds: (B, E), unit length.
        text_embeds: (B, E), unit length; row i belongs to image i.
        logit_scale: scalar, the logarithm of the inverse temperature (learned).
        match_ids: (B,) int64, equal for pairs that mean the same; None makes every pair its own (plain InfoNCE).

    Returns:
        Scalar float32, in nats.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        logits = image_embeds.float() @ text_embeds.float().t() * logit_scale.float().exp()
        targets = _targets(logits, match_ids)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)) / 2


def _targets(logits: Tensor, match_ids: Tensor | None) -> Tensor:
    """(B, B) rows of probabilities; the equality of ids is symmetric, so one table serves both directions."""
    if match_ids is None:
        return torch.eye(len(logits), device=logits.device)
    equal = (match_ids[:, None] == match_ids[None, :]).float()
    return equal / equal.sum(1, keepdim=True)
