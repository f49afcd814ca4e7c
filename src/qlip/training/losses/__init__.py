"""What is minimised: plain functions of tensors. Weights live in the recipe."""

from qlip.training.losses.contrastive import info_nce
from qlip.training.losses.siglip import siglip

__all__ = ["info_nce", "siglip"]
