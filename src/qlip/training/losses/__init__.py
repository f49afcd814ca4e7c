"""Loss terms as plain functions of tensors. Their weights come from the recipe."""

from qlip.training.losses.contrastive import info_nce
from qlip.training.losses.siglip import siglip

__all__ = ["info_nce", "siglip"]
