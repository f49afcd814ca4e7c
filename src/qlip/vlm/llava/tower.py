"""The interface of the LLaVA repository's vision towers over QLIP's encoder, without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from qlip.errors import QLIPError
from qlip.modeling.checkpoint import Files
from qlip.modeling.config import QLIPVisionConfig
from qlip.modeling.model import QLIPModel
from qlip.modeling.processor import Preprocessing, QLIPProcessor
from qlip.modeling.vision import VisionTower
from qlip.runtime.machine import pick_device

FEATURES = ("patch", "cls_patch")


class LlavaImageProcessor:
    """Preparation of images as the LLaVA repository asks for it.

    Args:
        preprocessing: of the tower.

    Attributes:
        image_mean, image_std: RGB constants for pixels in [0, 1].
        crop_size: ``height`` and ``width`` of the tower's input.
        size: ``shortest_edge`` before the crop.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        height, width = preprocessing.size
        self.image_mean, self.image_std = list(preprocessing.mean), list(preprocessing.std)
        self.crop_size = {"height": height, "width": width}
        self.size = {"shortest_edge": preprocessing.shortest_edge or min(height, width)}

    def preprocess(
        self, images: Image.Image | Sequence[Image.Image], return_tensors: Literal["pt"] = "pt", **unused: Any
    ) -> dict[str, Tensor]:
        """Resize and normalise images.

        Args:
            images: an image or several, in any mode.
            return_tensors: only PyTorch's are made.
            **unused: arguments of other processors, without an effect.

        Returns:
            ``pixel_values`` (B, 3, H, W) float32.
        """
        return QLIPProcessor(self.preprocessing)(images)

    __call__ = preprocess


class QLIPVisionTower(nn.Module):
    """QLIP's encoder with the interface of LLaVA's ``CLIPVisionTower``; blocks behind the wanted layer never run.

    Args:
        vision_tower: folder, Hub id, or name of a QLIP.
        args: ``mm_vision_select_layer`` (-2 by default), ``mm_vision_select_feature`` ("patch", or "cls_patch" with
            [CLS]), and what loads the weights at once: ``unfreeze_mm_vision_tower``, or "mm_vision_tower" in
            ``mm_tunable_parts``, as LLaVA-NeXT names a tower that trains.
        delay_load: read the configuration alone, until `load_model`.

    Attributes:
        is_loaded: the weights and `image_processor` are there.

    Raises:
        QLIPError: no such model, layer or kind of features.
    """

    vision_tower: VisionTower
    image_processor: LlavaImageProcessor

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False) -> None:
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = vision_tower
        self.select_layer = int(getattr(args, "mm_vision_select_layer", -2))
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        if self.select_feature not in FEATURES:
            raise QLIPError(f"mm_vision_select_feature {self.select_feature!r}: take {' or '.join(FEATURES)}")
        self.cfg_only = Files(vision_tower).config().vision_config
        depth = self.cfg_only.num_hidden_layers
        if not -depth - 1 <= self.select_layer <= depth:
            raise QLIPError(
                f"mm_vision_select_layer {self.select_layer}: the encoder has {depth}; choose -{depth + 1} to {depth}"
            )
        trains = "mm_vision_tower" in (getattr(args, "mm_tunable_parts", None) or "")
        if not delay_load or trains or getattr(args, "unfreeze_mm_vision_tower", False):
            self.load_model()

    def load_model(self, device_map: Any = None) -> None:
        """Load weights and image processor; a second call has no effect.

        Args:
            device_map: a device, "auto" for a GPU where there is one, or ``{"": device}``; None stays on the CPU.
        """
        if self.is_loaded:
            return
        model = QLIPModel.from_pretrained(self.vision_tower_name)
        self.image_processor = LlavaImageProcessor(QLIPProcessor.from_pretrained(self.vision_tower_name).preprocessing)
        self.vision_tower = model.vision_model.eval().requires_grad_(False)
        if isinstance(device_map, dict):
            device_map = device_map.get("")
        if device_map is not None:
            self.vision_tower.to(pick_device(device_map))
        self.is_loaded = True

    def feature_select(self, hidden: Tensor) -> Tensor:
        """Take (B, 1 + N, D) of the wanted layer, [CLS] first, as it is or without [CLS]."""
        return hidden if self.select_feature == "cls_patch" else hidden[:, 1:]

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Encode images; without a graph unless the encoder's parameters ask for gradients.

        Args:
            images: (B, 3, H, W) normalised pixels, or a list of (3, H, W), whose sizes may differ.

        Returns:
            (B, N, D) of the images' data type, or a list of (1, N, D).
        """
        trains = torch.is_grad_enabled() and any(one.requires_grad for one in self.vision_tower.parameters())
        with torch.set_grad_enabled(trains):
            if isinstance(images, list):
                return [self._features(image[None]) for image in images]
            return self._features(images)

    def _features(self, pixels: Tensor) -> Tensor:
        layers = self.vision_tower.num_layers_of(self.select_layer)
        hidden, _ = self.vision_tower.run_encoder(pixels.to(self.device, self.dtype), num_layers=layers)
        return self.feature_select(hidden).to(pixels.dtype)

    @property
    def dummy_feature(self) -> Tensor:
        """Zeros (1, D)."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.vision_tower.embeddings.class_embedding.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.vision_tower.embeddings.class_embedding.device

    @property
    def config(self) -> QLIPVisionConfig:
        """Sizes of the encoder."""
        return self.cfg_only

    @property
    def hidden_size(self) -> int:
        """Width of a feature, D."""
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        """Pixels per side of an image."""
        return self.config.image_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches per side of an image."""
        return self.config.grid_size

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.num_patches_per_side**2
