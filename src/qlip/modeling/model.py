"""QLIP: a model that encodes an image as tokens, decodes it, and embeds images and text in one space.

Shapes: B images of H x W pixels, patch p, N = (H/p) * (W/p) tokens of L bits in K = L / group_size groups, D the
encoder's width, E = projection_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlip.errors import QLIPError
from qlip.modeling import checkpoint, fingerprint, initialization
from qlip.modeling.config import QLIPConfig
from qlip.modeling.processor import QLIPProcessor
from qlip.modeling.text import TextOutput, TextTower
from qlip.modeling.transformer import Block
from qlip.modeling.vision import Grid, VisionDecoder, VisionOutput, VisionTower
from qlip.runtime.finite import require_finite
from qlip.runtime.machine import pick_device, pick_dtype


@dataclass
class QLIPOutput:
    """Output of :class:`QLIPModel`; a field is None if its input was not given.

    Attributes:
        loss: scalar, the symmetric contrastive loss of this batch alone (``return_loss=True``).
        logits_per_image: (B_image, B_text) cosine similarities times the temperature.
        logits_per_text: its transpose.
        text_embeds: (B_text, E) float32, unit length.
        image_embeds: (B_image, E) float32, unit length.
        text_model_output: the text tower's output.
        vision_model_output: the encoder's output; its ``last_hidden_state`` is the decoder's input.
        reconstructions: (B, 3, H, W), unclamped, in the processor's normalised space.
        indices: (B, N, K) int64.

    In training also ``quantizer_loss`` (eq. 1), ``persample_entropy``, ``codebook_entropy`` (nats per token) and
    ``commitment``: float32 scalars over the global batch, computed on first access.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: TextOutput | None = None
    vision_model_output: VisionOutput | None = None
    reconstructions: Tensor | None = None
    indices: Tensor | None = None

    @property
    def quantizer_loss(self) -> Tensor | None:
        """Scalar float32 (eq. 1), in training only."""
        return None if self.vision_model_output is None else self.vision_model_output.quantizer.loss

    @property
    def persample_entropy(self) -> Tensor | None:
        """Scalar float32, nats per token, in training only."""
        return None if self.vision_model_output is None else self.vision_model_output.quantizer.persample_entropy

    @property
    def codebook_entropy(self) -> Tensor | None:
        """Scalar float32, nats per token, in training only."""
        return None if self.vision_model_output is None else self.vision_model_output.quantizer.codebook_entropy

    @property
    def commitment(self) -> Tensor | None:
        """Scalar float32, in training only."""
        return None if self.vision_model_output is None else self.vision_model_output.quantizer.commitment


class QLIPModel(nn.Module):
    """The tokenizer with its text tower. Weights are random; :meth:`from_pretrained` loads trained ones.

    Args:
        config: e.g. ``QLIPConfig.named("QLIP-B-16-256")``.
    """

    forward_methods: ClassVar = ("encode", "decode", "get_image_features", "get_text_features", "get_patch_features")
    """Ways into the model beside its forward; sharded weights are gathered for each."""

    def __init__(self, config: QLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTower(config.text_config)
        self.vision_model = VisionTower(config.vision_config)
        self.vision_decoder = VisionDecoder(config.decoder_config)
        self.visual_projection = nn.Linear(
            config.vision_config.hidden_size, config.projection_dim, bias=config.vision_projection_bias
        )
        self.text_projection = nn.Linear(
            config.text_config.hidden_size, config.projection_dim, bias=config.text_projection_bias
        )
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        initialization.initialize(self)
        self._fingerprints = fingerprint.Cache()
        self._loaded_from: Path | None = None

    # ---------------------------------------------------------------- the whole model

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool = False,
        output_hidden_states: bool = False,
        reconstruct: bool = True,
    ) -> QLIPOutput:
        """Run the model on images, texts, or both.

        Args:
            pixel_values: (B, 3, H, W) normalised pixels, H and W multiples of the patch.
            input_ids: (B_text, N_text) int64.
            attention_mask: (B_text, N_text), 0 at padding.
            return_loss: compute the contrastive loss too; needs images and texts in equal number.
            output_hidden_states: return every layer's output in the towers' outputs.
            reconstruct: False skips the decoder.

        Raises:
            QLIPError: neither images nor texts, or wrong shapes.
        """
        if pixel_values is None and input_ids is None:
            raise QLIPError("nothing to do: give pixel_values, input_ids, or both")
        output = QLIPOutput()
        if pixel_values is not None:
            self._add_images(output, pixel_values, output_hidden_states, reconstruct)
        if input_ids is not None:
            text = self.text_model(self._checked_ids(input_ids), attention_mask, output_hidden_states)
            output.text_model_output = text
            output.text_embeds = self._checked(unit(self.text_projection(text.pooler_output)), "text embeddings")
        if output.image_embeds is not None and output.text_embeds is not None:
            with torch.autocast(self.device.type, enabled=False):
                similarities = output.text_embeds @ output.image_embeds.t()
            output.logits_per_text = similarities * self.logit_scale.float().exp()
            output.logits_per_image = output.logits_per_text.t()
        if return_loss:
            if output.logits_per_text is None:
                raise QLIPError("return_loss needs pixel_values and input_ids in equal number")
            output.loss = contrastive_loss(output.logits_per_text)
        return output

    def _add_images(
        self, output: QLIPOutput, pixel_values: Tensor, output_hidden_states: bool, reconstruct: bool
    ) -> None:
        vision = self.vision_model(self._checked_pixels(pixel_values), output_hidden_states)
        self._checked(vision.last_hidden_state, "codes")
        output.vision_model_output = vision
        output.image_embeds = self._checked(unit(self.visual_projection(vision.pooler_output)), "image embeddings")
        if reconstruct:
            rebuilt = self.vision_decoder(vision.last_hidden_state, vision.grid)
            output.reconstructions = self._checked(rebuilt, "decoded pixels")
        output.indices = vision.quantizer.indices

    # ---------------------------------------------------------------- features and tokens

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) of any floating type to (B, E), not normalised."""
        last, _ = self.vision_model.run_encoder(self._checked_pixels(pixel_values))
        features = self.visual_projection(self.vision_model.post_layernorm(last[:, 0]))
        return self._checked(features, "image features")

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, N_text) int64 to (B, E), not normalised."""
        features = self.text_projection(self.text_model(self._checked_ids(input_ids), attention_mask).pooler_output)
        return self._checked(features, "text features")

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) of any floating type to (B, E) float32 of unit length."""
        return unit(self.get_image_features(pixel_values))

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, N_text) int64 to (B, E) float32 of unit length."""
        mask = None if attention_mask is None else attention_mask.to(self.device)
        return unit(self.get_text_features(input_ids, mask))

    def get_patch_features(self, pixel_values: Tensor, layer: int = -2) -> Tensor:
        """Patch features of an encoder layer, without [CLS], before the quantizer: the input of LLaVA (eq. 8).

        Args:
            pixel_values: (B, 3, H, W) of any floating type.
            layer: index into the list of hidden states: 0 is the embeddings, -1 the last layer's output.

        Returns:
            (B, N, D).

        Raises:
            QLIPError: no such layer.
        """
        num_layers = self.vision_model.num_layers_of(layer)
        pixels = self._checked_pixels(pixel_values)
        last, _ = self.vision_model.run_encoder(pixels, num_layers=num_layers)
        return self._checked(last[:, 1:], "patch features")

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Encode images as tokens.

        Deterministic in eval mode for a given batch. Another batch size may change a float by about 1e-6 and so,
        rarely, a bit.

        Args:
            pixel_values: (B, 3, H, W) normalised pixels of any floating type.

        Returns:
            (B, N, K) int64 in [0, 2^group_size), tokens in raster order.

        Raises:
            QLIPError: pixels of another shape or type, or not finite.
        """
        last, _ = self.vision_model.run_encoder(self._checked_pixels(pixel_values))
        latents = self._checked(self.vision_model.latents(last[:, 1:]), "latents")
        return self.vision_model.quantizer.indices_of(latents)

    def decode(self, indices: Tensor, grid: Grid | None = None) -> Tensor:
        """Decode tokens to images.

        Args:
            indices: (B, N, K) int64 in [0, 2^group_size).
            grid: rows and columns, h * w = N; required unless the grid is square.

        Returns:
            (B, 3, h * p, w * p), unclamped, in the processor's normalised space.

        Raises:
            QLIPError: an index out of range, another number of groups, or a grid that does not hold N tokens.
        """
        if not isinstance(indices, Tensor):
            raise QLIPError(f"indices must be a tensor, got {type(indices).__name__}; torch.from_numpy makes one")
        if indices.dim() != 3 or indices.shape[-1] != self.num_groups:
            raise QLIPError(
                f"indices must be (B, N, {self.num_groups}), groups of {self.group_size} bits,"
                f" got {tuple(indices.shape)}; see qlip.regroup"
            )
        grid = _checked_grid(indices.shape[1], grid)
        codes = self.vision_model.quantizer.codes_of(indices, self.dtype)
        return self._checked(self.vision_decoder(self.vision_model.embed_codes(codes), grid), "decoded pixels")

    def grid_of(self, pixel_values: Tensor) -> Grid:
        """Rows and columns of tokens of (B, 3, H, W) pixels."""
        return self.vision_model.embeddings.grid_of(pixel_values)

    def _checked_pixels(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) pixels on the model's device and of its dtype; in eval mode they must be finite."""
        self.grid_of(pixel_values)  # checks type and shape
        if not (self.training or torch.compiler.is_compiling()):
            if not len(pixel_values):
                raise QLIPError(f"pixel_values hold no image, their shape is {tuple(pixel_values.shape)}")
            require_finite(pixel_values, "pixel_values", "check the image that they come from")
        return pixel_values.to(self.device, self.dtype)

    def _checked_ids(self, input_ids: Tensor) -> Tensor:
        """(B, N_text) ids on the model's device; in eval mode they must be in the vocabulary."""
        if not isinstance(input_ids, Tensor) or input_ids.is_floating_point() or input_ids.dim() != 2:
            kind = (tuple(input_ids.shape), input_ids.dtype) if isinstance(input_ids, Tensor) else type(input_ids)
            raise QLIPError(f"input_ids must be a tensor of integers, (B, N), got {kind}; QLIPProcessor makes one")
        size = self.config.text_config.vocab_size
        if not (self.training or torch.compiler.is_compiling() or input_ids.is_meta) and input_ids.numel():
            low, high = (int(edge) for edge in input_ids.aminmax())
            if low < 0 or high >= size:
                bad = low if low < 0 else high
                raise QLIPError(f"input_ids hold {bad}, the vocabulary has 0 to {size - 1}; is it another model's?")
        return input_ids.to(self.device)

    def _checked(self, values: Tensor, what: str) -> Tensor:
        """Values that the model computed, (B, ...); in eval mode they must be finite. Training checks its losses."""
        if not self.training:
            kind = str(self.dtype).removeprefix("torch.")
            require_finite(values, what, f"the weights are broken, or {kind} has too small a range for them")
        return values

    # ---------------------------------------------------------------- properties

    @property
    def num_bits(self) -> int:
        """Bits per token (L)."""
        return self.vision_model.quantizer.num_bits

    @property
    def group_size(self) -> int:
        """Bits per group."""
        return self.vision_model.quantizer.group_size

    @property
    def num_groups(self) -> int:
        """Groups per token (K)."""
        return self.num_bits // self.group_size

    @property
    def patch_size(self) -> int:
        """Pixels per patch side (p)."""
        return self.config.vision_config.patch_size

    @property
    def image_size(self) -> int:
        """Pixels per image side at the trained size."""
        return self.config.vision_config.image_size

    @property
    def grid(self) -> Grid:
        """Rows and columns of tokens at the trained size."""
        return self.config.vision_config.grid_size, self.config.vision_config.grid_size

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.vision_model.embeddings.class_embedding.dtype

    @property
    def code_fingerprint(self) -> str:
        """SHA-256 (hex) of everything that makes codes: encoder, ``quant_embed`` and their config."""
        return self._fingerprints.get(self, "codes")

    @property
    def decoder_fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decodes pixels: ``quant_embed_post``, decoder and their config."""
        return self._fingerprints.get(self, "decoder")

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """In training, store only each block's input and recompute the rest in the backward pass."""
        for module in self.modules():
            if isinstance(module, Block):
                module.activation_checkpointing = enabled

    # ---------------------------------------------------------------- files

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: str | torch.device | Mapping[str, str | torch.device] | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load a checkpoint folder, a Hub repository, or ``"bundled"``, the model in this package.

        The published models are found by their bare names, e.g. ``"QLIP-B-16-256"``.

        Args:
            name_or_path: folder with ``config.json`` and ``model.safetensors`` (sharded too), or a Hub id.
            dtype: data type of the weights in memory, or its name; float32 by default, also if the file holds another;
                "auto" is the file's own.
            device: device of the weights; the CPU by default, "auto" is a GPU where there is one.
            torch_dtype: other name for ``dtype``, as in transformers.
            device_map: other name for ``device``; the model is never divided among devices.
            revision, token, cache_dir, local_files_only: passed to ``huggingface_hub``.

        Returns:
            The model in eval mode.

        Raises:
            QLIPError: no such folder or repository, offline and not cached, a key missing or unexpected, another shape,
                or this machine has no such device.
        """
        if isinstance(device_map, Mapping):
            if len(set(device_map.values())) != 1:
                raise QLIPError(f"device_map {dict(device_map)}: the model fits on one device; give its name")
            device_map = next(iter(device_map.values()))
        if (dtype and torch_dtype and dtype != torch_dtype) or (device and device_map and device != device_map):
            raise QLIPError("dtype and torch_dtype, or device and device_map, disagree; give one of each")
        kind, place = dtype or torch_dtype or torch.float32, pick_device(device or device_map or "cpu")
        files = checkpoint.Files(
            name_or_path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        model = checkpoint.load(cls, files, files.dtype() if kind == "auto" else pick_dtype(kind), place)
        model._loaded_from = files.folder
        return model

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``, each whole or not at all.

        Args:
            folder: created if absent.
            dtype: data type of the stored tensors; the weights' own by default.
            state: all tensors by name, to store instead of the model's own, e.g. EMA weights.
        """
        checkpoint.save(self, Path(folder), dtype, state)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        processor: QLIPProcessor | None = None,
        private: bool = False,
        token: str | None = None,
        **options: Any,
    ) -> str:
        """Upload the checkpoint to a Hub repository, created if absent: weights, config, preprocessing and vocabulary.

        Args:
            repo_id: "owner/name".
            processor: by default that of the checkpoint which the model was loaded from.
            private: for a new repository.
            token: by default the one that is logged in.
            **options: of ``HfApi.upload_folder``, such as ``commit_message``.

        Returns:
            The commit's address.

        Raises:
            QLIPError: a random model without a processor, offline, or no permission.
        """
        if processor is None:
            if self._loaded_from is None:
                raise QLIPError("push_to_hub needs a processor for a model that was not loaded: give processor=...")
            processor = QLIPProcessor.from_pretrained(self._loaded_from)
        writers = (self.save_pretrained, processor.save_pretrained)
        return checkpoint.push(writers, repo_id, private=private, token=token, **options)


def unit(features: Tensor) -> Tensor:
    """Scale (..., E) features of any floating type to unit length, in float32: similarities need the digits."""
    features = features.float()
    rows: Tensor = features / features.norm(dim=-1, keepdim=True)
    return rows


def contrastive_loss(logits: Tensor) -> Tensor:
    """Symmetric InfoNCE of B matched pairs, from their whole table of logits (CLIP, arXiv 2103.00020).

    Training computes it over all ranks and in chunks (`qlip.training.losses.info_nce`); the two are equal without
    shared targets.

    Args:
        logits: (B, B) similarities times the temperature; pairs are on the diagonal.

    Returns:
        Scalar float32, in nats.

    Raises:
        QLIPError: the table is not square.
    """
    if logits.shape[0] != logits.shape[1]:
        raise QLIPError("return_loss needs pixel_values and input_ids in equal number")
    targets = torch.arange(len(logits), device=logits.device)  # (B,)
    return (F.cross_entropy(logits.float(), targets) + F.cross_entropy(logits.float().t(), targets)) / 2


def _checked_grid(num_tokens: int, grid: Grid | None) -> Grid:
    if grid is None:
        side = round(num_tokens**0.5)
        if side * side != num_tokens or not num_tokens:
            raise QLIPError(f"{num_tokens} tokens are not a square grid; give grid=(rows, columns)")
        return side, side
    if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != num_tokens:
        raise QLIPError(
            f"grid {tuple(grid)} does not hold {num_tokens} tokens: rows times columns must be {num_tokens}"
        )
    return int(grid[0]), int(grid[1])
