"""QLIP as the vision tower of the LLaVA repository and of LLaVA-NeXT; see docs/llava-repository.md."""

from qlip.vlm.llava.tower import LlavaImageProcessor, QLIPVisionTower

__all__ = ["LlavaImageProcessor", "QLIPVisionTower"]
