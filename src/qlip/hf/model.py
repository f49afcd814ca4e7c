"""Transformers' models over the modules of `qlip.modeling`; parameter names are the published checkpoint's.

Shapes: B images of H x W pixels, N tokens in K groups, D the encoder's width, E = projection_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from qlip.errors import QLIPError
from qlip.hf.config import QLIPHFConfig, QLIPHFTextConfig, QLIPHFVisionConfig, resolve_known
from qlip.modeling.initialization import initialize_layer
from qlip.modeling.model import contrastive_loss, unit
from qlip.modeling.text import TextTower
from qlip.modeling.transformer import Block
from qlip.modeling.vision import Grid, Rope, VisionDecoder, VisionEmbeddings, VisionTower

Layers = bool | int | Sequence[int] | None
"""Requested hidden states: all (True), none, or those of some layers; 0 is the embeddings, -1 the last layer."""


@dataclass
class QLIPHFOutput(ModelOutput):
    """Output of :class:`QLIPHFModel`; a field is None if its input was not given.

    Attributes:
        loss: scalar, the symmetric contrastive loss (``return_loss=True``).
        logits_per_image: (B_image, B_text) cosine similarities times the temperature.
        logits_per_text: its transpose.
        text_embeds, image_embeds: (B, E) float32, unit length.
        text_model_output: output of the text tower.
        vision_model_output: output of the encoder; its ``last_hidden_state`` is the decoder's input (B, N, P).
        reconstructions: (B, 3, H, W), unclamped, in the processor's normalised space (``reconstruct=True``).
        indices: (B, N, K) int64.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    reconstructions: Tensor | None = None
    indices: Tensor | None = None


class QLIPHFPreTrainedModel(PreTrainedModel):
    """Base of the three models: loading, and random weights."""

    base_model_prefix = "qlip"
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # every attention is scaled_dot_product_attention
    _no_split_modules = ["Layer"]
    _keys_to_ignore_on_load_unexpected = [r"rope\.freqs_(cos|sin)$", r"embeddings\.position_ids$"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *inputs: Any, **options: Any) -> Self:
        """Load a folder, a Hub id, or the bundled or a published model by name; see transformers' documentation."""
        return super().from_pretrained(resolve_known(pretrained_model_name_or_path), *inputs, **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module that no checkpoint filled; training from scratch is `qlip.QLIPModel`'s business."""
        if isinstance(module, Rope):  # tables are in no checkpoint, and transformers leaves their memory unset
            module.compute_tables(module.get_buffer("cos").device)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, VisionEmbeddings):
            nn.init.normal_(module.class_embedding, std=0.02)
        elif isinstance(module, VisionDecoder):
            nn.init.normal_(module.position_embeddings, std=0.02)
        elif isinstance(module, QLIPHFModel):
            nn.init.constant_(module.logit_scale, module.config.logit_scale_init_value)
        else:
            initialize_layer(module)

    @property
    def gradient_checkpointing(self) -> bool:
        """True if blocks store only their inputs in training; ``gradient_checkpointing_enable`` sets it."""
        return any(module.activation_checkpointing for module in self.modules() if isinstance(module, Block))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        for module in self.modules():
            if isinstance(module, Block):
                module.activation_checkpointing = enabled


class QLIPHFVisionModel(QLIPHFPreTrainedModel):
    """The encoder before the quantizer, as a vision tower: [CLS] and patches of every layer.

    Args:
        config: of the tower.
    """

    config_class = QLIPHFVisionConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    _keys_to_ignore_on_load_unexpected = [
        *QLIPHFPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^(text_model|vision_decoder|visual_projection|text_projection|logit_scale)",
    ]

    def __init__(self, config: QLIPHFVisionConfig) -> None:
        super().__init__(config)
        self.vision_model = VisionTower(config.checked())
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def patch_size(self) -> int:
        """Pixels per patch side."""
        return self.vision_model.embeddings.patch_size

    def get_input_embeddings(self) -> nn.Module:
        """Return the patch embedding."""
        return self.vision_model.embeddings.patch_embedding

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: Layers = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Encode images.

        Args:
            pixel_values: (B, 3, H, W) normalised pixels, H and W multiples of the patch.
            output_hidden_states: True for all, or the wanted layers, as LLaVA gives them, e.g. -2. Blocks after the
                last wanted layer then do not run: ``last_hidden_state`` and ``pooler_output`` are None unless it is the
                last one, and so are the other entries of ``hidden_states``.
            return_dict: False for a tuple.
            **unused: arguments of other towers, without an effect.

        Returns:
            ``last_hidden_state`` (B, 1 + N, D), [CLS] first, not normalised; ``pooler_output`` (B, D), the normalised
            [CLS]; ``hidden_states``, layers + 1 of (B, 1 + N, D).

        Raises:
            QLIPError: pixels of another shape or type, or no such layer.
        """
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = encode(self.vision_model, pixel_values, wanted)
        return output.to_tuple() if return_dict is False else output


class QLIPHFTextModel(QLIPHFPreTrainedModel):
    """The text tower.

    Args:
        config: of the tower.
    """

    config_class = QLIPHFTextConfig
    main_input_name = "input_ids"
    _keys_to_ignore_on_load_unexpected = [
        *QLIPHFPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^(vision_model|vision_decoder|visual_projection|text_projection|logit_scale)",
    ]

    def __init__(self, config: QLIPHFTextConfig) -> None:
        super().__init__(config)
        self.text_model = TextTower(config.checked())
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of token embeddings."""
        return self.text_model.embeddings.token_embedding

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Embed texts: (B, N) int64 to ``last_hidden_state`` (B, N, D) and ``pooler_output`` (B, D)."""
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = read(self.text_model, input_ids, attention_mask, bool(wanted))
        return output.to_tuple() if return_dict is False else output


class QLIPHFModel(QLIPHFPreTrainedModel):
    """The whole tokenizer: encoder, quantizer, decoder and text tower.

    Args:
        config: of the whole model.
    """

    config_class = QLIPHFConfig
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]

    def __init__(self, config: QLIPHFConfig) -> None:
        super().__init__(config)
        checked = config.checked()
        self.text_model = TextTower(checked.text_config)
        self.vision_model = VisionTower(checked.vision_config)
        self.vision_decoder = VisionDecoder(checked.decoder_config)
        widths = checked.vision_config.hidden_size, checked.text_config.hidden_size
        self.visual_projection = nn.Linear(widths[0], checked.projection_dim, bias=checked.vision_projection_bias)
        self.text_projection = nn.Linear(widths[1], checked.projection_dim, bias=checked.text_projection_bias)
        self.logit_scale = nn.Parameter(torch.tensor(checked.logit_scale_init_value))
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Return the text tower's table of token embeddings."""
        return self.text_model.embeddings.token_embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        output_hidden_states: bool | None = None,
        reconstruct: bool = False,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> QLIPHFOutput | tuple[Any, ...]:
        """Run the model on images, texts, or both; the argument order is CLIP's.

        Args:
            input_ids: (B_text, N_text) int64.
            pixel_values: (B, 3, H, W) normalised pixels, H and W multiples of the patch.
            attention_mask: (B_text, N_text), 0 at padding.
            return_loss: compute the contrastive loss too; needs images and texts in equal number.
            output_hidden_states: return every layer's output in the towers' outputs.
            reconstruct: decode the images too.
            return_dict: False for a tuple.
            **unused: arguments of other models, without an effect.

        Raises:
            QLIPError: wrong shapes or types, or a loss without images and texts in equal number.
        """
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        found: dict[str, Any] = {}
        if pixel_values is not None:
            vision = self.vision_model(pixel_values.to(self.dtype), bool(wanted))
            found["image_embeds"] = unit(self.visual_projection(vision.pooler_output))
            found["indices"] = vision.quantizer.indices
            found["vision_model_output"] = BaseModelOutputWithPooling(
                vision.last_hidden_state, vision.pooler_output, vision.hidden_states
            )
            if reconstruct:
                found["reconstructions"] = self.vision_decoder(vision.last_hidden_state, vision.grid)
        if input_ids is not None:
            text = read(self.text_model, input_ids, attention_mask, bool(wanted))
            found["text_embeds"] = unit(self.text_projection(text.pooler_output))
            found["text_model_output"] = text
        if pixel_values is not None and input_ids is not None:
            with torch.autocast(self.device.type, enabled=False):
                similarities = found["text_embeds"] @ found["image_embeds"].t()
            logits = similarities * self.logit_scale.float().exp()
            found |= {"logits_per_text": logits, "logits_per_image": logits.t()}
        if return_loss:
            if "logits_per_text" not in found:
                raise QLIPError("return_loss needs pixel_values and input_ids in equal number")
            found["loss"] = contrastive_loss(found["logits_per_text"])
        output = QLIPHFOutput(**found)
        return output.to_tuple() if return_dict is False else output

    def get_image_features(self, pixel_values: Tensor, **unused: Any) -> Tensor:
        """(B, 3, H, W) pixels to (B, E), not normalised."""
        last, _ = self.vision_model.run_encoder(pixel_values.to(self.dtype))
        return self.visual_projection(self.vision_model.post_layernorm(last[:, 0]))  # type: ignore[no-any-return]

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any) -> Tensor:
        """(B_text, N_text) int64 to (B_text, E), not normalised."""
        pooled = self.text_model(input_ids, attention_mask).pooler_output
        return self.text_projection(pooled)  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Encode (B, 3, H, W) normalised pixels as tokens, (B, N, K) int64."""
        last, _ = self.vision_model.run_encoder(pixel_values.to(self.dtype))
        return self.vision_model.quantizer.indices_of(self.vision_model.latents(last[:, 1:]))

    def decode(self, indices: Tensor, grid: Grid) -> Tensor:
        """Decode tokens (B, N, K) on a grid of rows and columns to pixels (B, 3, H, W), unclamped and normalised."""
        codes = self.vision_model.quantizer.codes_of(indices, self.dtype)
        return self.vision_decoder(self.vision_model.embed_codes(codes), grid)  # type: ignore[no-any-return]


def encode(tower: VisionTower, pixel_values: Tensor, wanted: Layers) -> BaseModelOutputWithPooling:
    """Run an encoder as far as its wanted layers need; see :meth:`QLIPHFVisionModel.forward`."""
    depth = len(tower.encoder.layers)
    pixels = pixel_values.to(tower.embeddings.class_embedding.dtype)
    if wanted is None or isinstance(wanted, bool):
        layers = set(range(depth + 1)) if wanted else set()
        last = depth
    else:
        given = [wanted] if isinstance(wanted, int) else list(wanted)
        layers = {tower.num_layers_of(layer) for layer in given}
        last = max(layers, default=depth)
    states: list[Tensor] = []
    output, _ = tower.run_encoder(pixels, states if layers else None, last)
    whole = last == depth
    hidden_states: Any = tuple(states[i] if i in layers else None for i in range(depth + 1)) if layers else None
    return BaseModelOutputWithPooling(
        last_hidden_state=output if whole else None,
        pooler_output=tower.post_layernorm(output[:, 0]) if whole else None,
        hidden_states=hidden_states,
    )


def read(
    tower: TextTower, input_ids: Tensor, attention_mask: Tensor | None, states: bool
) -> BaseModelOutputWithPooling:
    """Run a text tower."""
    text = tower(input_ids, attention_mask, states)
    return BaseModelOutputWithPooling(text.last_hidden_state, text.pooler_output, text.hidden_states)
