"""UM3 in the remote-code file: stock decoders that mask by the grammar, and turn tokens into images and back.

The tokenizer of images is the folder ``qlip`` inside the model's, with a remote-code file of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor
from transformers import AutoModel, BatchFeature, CLIPImageProcessor, LlamaForCausalLM, Qwen3ForCausalLM
from transformers.processing_utils import ProcessorMixin

from qlip.modeling.indices import regroup
from qlip.um3.sequence import IN_TEXT, TEXT_TOKENS, AllowedIds, Grammar, image_ids, indices_of

TOKENIZER = "qlip"
"""Folder of the tokenizer of images, inside the model's."""


def um3_fields(folder: Path) -> Any:
    """Content of ``um3.json`` in a model's folder, with the numbers that follow from it."""
    values = json.loads((folder / "um3.json").read_text(encoding="utf-8"))
    decoder = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    fields = SimpleNamespace(**values, decoder=SimpleNamespace(**decoder), visual_begin=values["text_vocab_size"])
    fields.num_tokens = fields.grid[0] * fields.grid[1]
    fields.image_length = fields.num_tokens * fields.num_groups

    def group_rows(group: int) -> tuple[int, int]:
        begin = fields.visual_begin + (group << fields.group_size if fields.rows == "per_group" else 0)
        return begin, begin + (1 << fields.group_size)

    fields.group_rows = group_rows
    return fields


def allowed_tokens(fields: Any, end: int | None) -> Callable[[int, Tensor], list[int]]:
    """Make a ``prefix_allowed_tokens_fn``.

    Args:
        fields: of the model.
        end: ids of a sequence with its prompt, at most; no image is begun that would not fit. None draws none.
    """
    grammar, ids_of = Grammar(fields), cache(AllowedIds.ids)  # each list is made once

    def allowed(row: int, ids: Tensor) -> list[int]:
        behind = (ids == fields.begin_image).nonzero()
        read = len(ids) - int(behind[-1, 0]) - 1 if len(behind) else fields.image_length + 1
        state = read if read <= fields.image_length else IN_TEXT
        return ids_of(grammar.allowed(state, 0 if end is None else end - len(ids)))

    return allowed


class UM3Mixin:
    """Generation of text and images by a stock decoder.

    `generate` has a ``generation_mode``, `output_modalities` says which there are, and `decode_image_tokens` turns ids
    into images: the calls of the pipeline "any-to-any".
    """

    input_modalities: Any = ("text", "image")
    output_modalities: Any = ("text", "image")
    config: Any
    device: Any

    @property
    def folder(self) -> Path:
        """Folder that the model was loaded from; a Hub repository is fetched whole."""
        name = self.config._name_or_path
        return Path(name) if Path(name).is_dir() else Path(snapshot_download(name))

    @property
    def um3(self) -> Any:
        """Fields of ``um3.json``."""
        if not hasattr(self, "_um3"):
            object.__setattr__(self, "_um3", um3_fields(self.folder))
        return self._um3  # type: ignore[attr-defined]

    @property
    def qlip(self) -> Any:
        """Tokenizer of images, loaded at its first use; none of the model's own modules."""
        if not hasattr(self, "_qlip"):
            place = self.folder / TOKENIZER
            model = AutoModel.from_pretrained(str(place), trust_remote_code=True).to(self.device).eval()
            object.__setattr__(self, "_qlip", model)
            object.__setattr__(self, "_pixels", CLIPImageProcessor.from_pretrained(str(place)))
        return self._qlip  # type: ignore[attr-defined]

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Save weights as transformers does, with ``um3.json`` and the tokenizer of images."""
        super().save_pretrained(save_directory, **options)  # type: ignore[misc]
        shutil.copyfile(self.folder / "um3.json", Path(save_directory) / "um3.json")
        shutil.copytree(self.folder / TOKENIZER, Path(save_directory) / TOKENIZER, dirs_exist_ok=True)

    def image_ids(self, pixel_values: Tensor) -> Tensor:
        """Ids (B, N K) of normalised pixels (B, 3, H, W)."""
        model = self.qlip
        indices = model.encode(pixel_values.to(self.device))
        theirs = model.vision_model.quantizer.group_size
        return image_ids(self.um3, regroup(indices, self.um3.group_size, from_group_size=theirs))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        generation_mode: str = "text",
        **options: Any,
    ) -> Tensor:
        """Continue a batch of prompts.

        Args:
            input_ids: (B, T), with -1 at the places of images' ids where ``pixel_values`` are given.
            attention_mask: (B, T).
            pixel_values: (M, 3, H, W), images of the prompts in order.
            generation_mode: "text"; "image", one image per prompt; or "interleaved", both in one sequence.
            **options: of transformers' ``generate``; by default ``max_new_tokens`` has room for an image and 256 ids of
                text for "interleaved".

        Returns:
            Prompts with what follows; for "image" the ids (B, N K) of the images alone.
        """
        fields = self.um3
        if generation_mode not in ("text", "image", "interleaved"):
            raise ValueError(f"generation_mode {generation_mode!r}: give text, image or interleaved")
        wanted, budget = fields.image_length, options.get("max_new_tokens")
        if generation_mode != "text" and budget is not None and budget < wanted + 2 * (generation_mode != "image"):
            raise ValueError(f"max_new_tokens {budget}: an image has {wanted} ids, besides its begin and end")
        room = self.config.max_position_embeddings - input_ids.shape[1]
        if generation_mode == "image" and room <= wanted:
            raise ValueError(f"{input_ids.shape[1]} ids leave no room for an image; shorten the prompt")
        if pixel_values is not None:
            input_ids = input_ids.masked_scatter(input_ids < 0, self.image_ids(pixel_values))
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if generation_mode == "image":
            begin = input_ids.new_full((len(input_ids), 1), fields.begin_image)
            input_ids = torch.cat([input_ids, begin], 1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(begin)], 1)
            options["max_new_tokens"] = fields.image_length
            if options.get("guidance_scale", 1) > 1:
                options.setdefault("negative_prompt_ids", begin)
        elif generation_mode == "interleaved" and budget is None:
            options["max_new_tokens"] = min(room, wanted + 2 + TEXT_TOKENS)
        end = input_ids.shape[1] + options.get("max_new_tokens", 0)
        options["prefix_allowed_tokens_fn"] = allowed_tokens(fields, end if generation_mode == "interleaved" else None)
        found = super().generate(input_ids=input_ids, attention_mask=attention_mask, **options)  # type: ignore[misc]
        return found[:, -fields.image_length :] if generation_mode == "image" else found  # type: ignore[no-any-return]

    @torch.no_grad()
    def decode_image_tokens(self, image_tokens: Tensor) -> list[Image.Image]:
        """Turn ids (B, N K) of images into images."""
        model, fields = self.qlip, self.um3
        theirs = model.vision_model.quantizer.group_size
        indices = regroup(indices_of(fields, image_tokens), theirs, from_group_size=fields.group_size)
        pixels = model.decode(indices, tuple(fields.grid)).float().cpu()
        mean, deviation = (
            torch.tensor(values)[:, None, None]
            for values in (self._pixels.image_mean, self._pixels.image_std)  # type: ignore[attr-defined]
        )
        every = (pixels * deviation + mean).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1)
        return [Image.fromarray(one) for one in every.contiguous().numpy()]


class UM3Qwen3(UM3Mixin, Qwen3ForCausalLM):  # type: ignore[misc]
    """A UM3 with normalised queries and keys."""


class UM3Llama(UM3Mixin, LlamaForCausalLM):  # type: ignore[misc]
    """A UM3 without."""


class UM3Processor(ProcessorMixin):
    """Prompts of text and images as a BatchFeature: ``input_ids`` with -1 at the places of images' ids.

    Args:
        image_processor, tokenizer: stock ones.
        image_length: ids of an image.
        begin_image, end_image: ids around them.
        chat_template: of turns; none.
    """

    attributes: ClassVar[list[str]] = ["image_processor", "tokenizer"]
    image_processor_class = "CLIPImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_length: int = 0,
        begin_image: int = 0,
        end_image: int = 0,
        chat_template: str | None = None,
        **unused: Any,
    ) -> None:
        self.image_length, self.begin_image, self.end_image = image_length, begin_image, end_image
        super().__init__(image_processor, tokenizer, chat_template=chat_template)  # type: ignore[no-untyped-call]

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, return_tensors: str = "pt", **unused: Any
    ) -> BatchFeature:
        """Prepare prompts, padded at the left.

        Args:
            images: one per text, which stands before it; or None.
            text: one or several.
            return_tensors: "pt".
            **unused: options of other processors.
        """
        shown = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
        texts = [text] if isinstance(text, str) else list(text or [""] * len(shown))
        if shown and len(shown) != len(texts):
            raise ValueError(f"{len(shown)} images for {len(texts)} texts; give one for each, or none")
        rows = []
        for one in texts:
            ids = self.tokenizer(one, add_special_tokens=not shown)["input_ids"] if one else []
            image = [self.begin_image, *[-1] * self.image_length, self.end_image] if shown else []
            rows.append(torch.tensor([*image, *ids], dtype=torch.int64))
        width = max(map(len, rows))
        padding = self.tokenizer.pad_token_id or 0
        lacking = [width - len(row) for row in rows]
        found = {
            "input_ids": torch.stack(
                [torch.cat([row.new_full((n,), padding), row]) for row, n in zip(rows, lacking, strict=True)]
            ),
            "attention_mask": torch.stack([(torch.arange(width) >= n).long() for n in lacking]),
        }
        if shown:
            found["pixel_values"] = self.image_processor(images=shown, return_tensors="pt")["pixel_values"]
        return BatchFeature(found)

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **unused: Any,
    ) -> Any:
        """Texts of ids; for images, which `decode_image_tokens` made, the images themselves."""
        if generation_mode == "image":
            return generated_outputs
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens)
