"""Drawing images from prompts: `Drawer`, a decoder with the reader of its prompts and the tokenizer of its images.

    drawer = Drawer.from_pretrained("bundled")
    [image] = drawer("a red circle above a blue square", generator=torch.Generator().manual_seed(0)).images

A call has the signature of diffusers' pipelines. `condition`, `draw` and `images` are its steps.

Shapes: B images, N tokens, K groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qlip import assets
from qlip.errors import QLIPError, check_integer
from qlip.lm.conditions import Condition
from qlip.lm.generate import OnStep, generate
from qlip.lm.guidance import Constant, Guidance, parse
from qlip.lm.model import DecoderModel
from qlip.lm.packed import Weights, pack
from qlip.lm.sampling import Sampling
from qlip.modeling.checkpoint import resolve
from qlip.modeling.images import ImageInput, to_images
from qlip.modeling.indices import regroup
from qlip.runtime.machine import pick_device
from qlip.t2i.inpaint import CANDIDATES, Edit, inpaint, read_edit
from qlip.t2i.prompts import Prompts, open_prompts, unknown_class
from qlip.t2i.settings import DrawSettings
from qlip.tokens.image_codec import ImageCodec

OutputType = Literal["pil", "np", "pt"]
OnStepEnd = Callable[["Drawer", int, int, dict[str, Any]], dict[str, Any] | None]
"""Called as diffusers calls it: with the drawer, the step's number, the same number again, and a dict."""


@dataclass(frozen=True)
class DrawerOutput:
    """Result of a call.

    Attributes:
        images: B Pillow images; float32 (B, H, W, 3) in [0, 1] for "np", or a tensor (B, 3, H, W) for "pt".
        indices: int64 (B, N, K), the images' tokens.
    """

    images: list[Image.Image] | np.ndarray[Any, Any] | Tensor
    indices: Tensor


class Drawer:
    """Draws images from prompts.

    Attributes:
        decoder: in eval mode, packed on CPUs.
        codec: turns tokens into images.
        prompts: reads prompts.
        settings: guidance and sampling where a call gives none.
        name: for messages and reports.
    """

    AT_ONCE = 64
    """Images that a call draws together."""

    def __init__(
        self, decoder: DecoderModel, codec: ImageCodec, prompts: Prompts, settings: DrawSettings, name: str
    ) -> None:
        decoder.check_tokenizer(codec.model.code_fingerprint, codec.name)
        self.decoder, self.codec, self.prompts, self.settings, self.name = decoder, codec, prompts, settings, name

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "bundled",
        *,
        tokenizer: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        torch_dtype: str | torch.dtype | None = None,
        device_map: str | torch.device | None = None,
        weights: Weights = "float32",
        **hub: Any,
    ) -> Self:
        """Load a decoder's folder and the tokenizer that it draws tokens of.

        Args:
            name_or_path: a folder, a Hub id, or "bundled".
            tokenizer: instead of the one that the folder's ``generation_config.json`` names.
            device: such as cpu or cuda; "auto" takes a GPU where there is one.
            dtype: of the weights.
            torch_dtype, device_map: other names for ``dtype`` and ``device``, as in diffusers.
            weights: how a CPU holds them, see :func:`qlip.lm.pack`.
            **hub: ``revision`` (of the drawer), ``token``, ``cache_dir``, ``local_files_only``.

        Raises:
            QLIPError: no such checkpoint, a broken file, or a tokenizer whose tokens the decoder does not draw.
        """
        name = assets.name_of(name_or_path, assets.BUNDLED_DRAWER)
        folder, dtype, device = resolve(name, **hub), torch_dtype or dtype, device_map or device
        settings = DrawSettings.from_folder(folder)
        decoder = DecoderModel.from_pretrained(folder, device=pick_device(device), dtype=dtype)
        prompts = open_prompts(decoder, folder, name)
        tokenizer = tokenizer or settings.tokenizer_inside(folder) or settings.tokenizer
        hub.pop("revision", None)  # the tokenizer has a repository of its own
        codec = ImageCodec.from_pretrained(tokenizer, device=decoder.device, dtype=dtype, **hub)
        if decoder.device.type == "cpu" and decoder.dtype == torch.float32:
            pack(decoder, weights)
        return cls(decoder, codec, prompts, settings, name)

    # ---------------------------------------------------------------- steps of a call

    def condition(self, prompts: str | Sequence[str]) -> Condition:
        """Read one prompt, or several.

        Raises:
            QLIPError: a prompt that this drawer cannot draw; names it.
        """
        return self.prompts(_texts("prompt", prompts)).to(self.decoder.device)

    def caption_of(self, name: str) -> str:
        """Prompt for a class: its name for a class-conditional decoder, else its caption in the settings.

        Raises:
            QLIPError: no such class, or a drawer of captions alone.
        """
        if self.decoder.config.condition == "class":
            return name
        if not self.settings.classes:
            raise QLIPError(f"{self.name}: was not trained on classes; write {name!r} as a prompt")
        if name not in self.settings.classes:
            raise unknown_class(name, list(self.settings.classes))
        return self.settings.classes[name]

    @property
    def unconditional(self) -> bool:
        """The decoder was trained on images alone."""
        config = self.decoder.config
        return config.condition == "class" and config.condition_size == 1 and config.classes is None

    def schedule(self, guidance: Guidance | None = None) -> Guidance:
        """Guidance to draw with: the given one, else that of the settings; none for a drawer of images alone.

        Raises:
            QLIPError: guidance is given for a drawer of images alone, whose null condition was never trained.
        """
        if not self.unconditional:
            return guidance or self.settings.schedule()
        if guidance not in (None, Constant(1.0)):
            raise QLIPError(f"guidance {guidance}: {self.name} was trained on images alone; draw without guidance")
        return Constant(1.0)

    def draw(
        self,
        condition: Condition,
        *,
        guidance: Guidance | None = None,
        sampling: Sampling | None = None,
        negative: Condition | None = None,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        edit: Edit | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Draw an image's tokens from each condition.

        Args:
            condition: of B samples.
            guidance, sampling: by default those of the settings.
            negative: see :func:`qlip.lm.generate`.
            seed: of the noise.
            numbers: image numbers, 0, 1, ... by default; an image depends on its condition, seed and number alone.
            edit: image of which only a part is drawn, see :meth:`edit`.
            on_step: called after each step of the transformer; not while candidates of an edit are drawn.

        Returns:
            int64 (B, N, K).
        """
        guidance = self.schedule(guidance)
        sampling = self.settings.sampling() if sampling is None else sampling
        common: dict[str, Any] = {"guidance": guidance, "sampling": sampling, "negative": negative}
        common |= {"seed": seed, "numbers": numbers, "on_step": on_step}
        if edit is None:
            return generate(self.decoder, condition, **common)
        indices = edit.indices.expand(len(condition), -1, -1)
        return inpaint(self.decoder, condition, indices, edit.hole, candidates=edit.candidates, **common)

    def edit(
        self,
        image: ImageInput,
        mask: ImageInput | None = None,
        keep: float | None = None,
        candidates: int = CANDIDATES,
    ) -> Edit:
        """Choose a part of an image to draw: the white part of a mask, or what follows the share that is kept.

        See :func:`qlip.t2i.inpaint.read_edit`.
        """
        return read_edit(self.decoder, self.codec, image, mask, keep, candidates)

    @torch.inference_mode()
    def pixels(self, indices: Tensor, rows: int | None = None) -> Tensor:
        """Decode tokens.

        Args:
            indices: int64 (B, N, K).
            rows: rows of tokens that are given, N a multiple of them; by default the whole image.

        Returns:
            float32 (B, 3, H, W) in [0, 1].
        """
        model, config = self.codec.model, self.decoder.config
        grid = config.grid if rows is None else (rows, config.grid[1])
        theirs = regroup(indices, model.group_size, from_group_size=config.group_size)
        return self.codec.processor.preprocessing.denormalize(model.decode(theirs.to(model.device), grid))

    def images(self, indices: Tensor, rows: int | None = None) -> list[Image.Image]:
        """Decode tokens into Pillow images; see :meth:`pixels`."""
        return to_images(self.pixels(indices, rows))

    # ---------------------------------------------------------------- the call of diffusers

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | str | Guidance | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        keep: float | None = None,
    ) -> Any:
        """Draw images.

        Args:
            prompt: one, or several.
            negative_prompt: what guidance leads away from, one or one per prompt.
            num_images_per_prompt: images of one prompt follow each other.
            guidance_scale: scale or schedule of classifier-free guidance, also in the short form of
                :func:`qlip.lm.guidance.parse`; 1 is none.
            temperature, top_k: instead of the settings' ones.
            generator: one for all images or one per image; without one, PyTorch's global generator gives the seed.
            output_type: "pil", "np" or "pt".
            return_dict: return a `DrawerOutput`; else the tuple ``(images,)``.
            callback_on_step_end: called after each step with this drawer, the step's number twice, and ``{"indices":
                groups drawn so far}``.
            image: image of which a part is drawn.
            mask_image: of the image's size, white where it is drawn.
            keep: share of the image that is kept, instead of a mask: its upper part.

        Raises:
            QLIPError: a prompt or a number that cannot be drawn from.
        """
        if output_type not in ("pil", "np", "pt"):
            raise QLIPError(f"output_type {output_type!r}: give pil, np or pt")
        check_integer("num_images_per_prompt", num_images_per_prompt)
        prompts = _texts("prompt", prompt)
        if not prompts:
            raise QLIPError("no prompt; give one, or several")
        repeated = torch.arange(len(prompts)).repeat_interleave(num_images_per_prompt).tolist()  # prompt of each image
        negatives = _negatives(negative_prompt, len(prompts))
        seed, numbers = _seed_of(generator, len(repeated))
        sampling = self.settings.sampling(temperature, top_k)
        guidance = guidance_scale if isinstance(guidance_scale, Guidance | None) else parse(str(guidance_scale))
        if image is None and (mask_image is not None or keep is not None):
            raise QLIPError("a mask or a share to keep without an image; give the image too")
        edit = None if image is None else self.edit(image, mask_image, keep)
        condition = self.condition(prompts).rows(repeated)
        negative = None
        if negatives is not None:
            negative = self.condition(negatives).rows([place % len(negatives) for place in repeated])
        found = []
        for first in range(0, len(repeated), self.AT_ONCE):
            some = range(first, min(first + self.AT_ONCE, len(repeated)))
            indices = self.draw(
                condition.rows(some),
                guidance=guidance,
                sampling=sampling,
                negative=None if negative is None else negative.rows(some),
                seed=seed,
                numbers=[numbers[number] for number in some],
                edit=edit,
                on_step=None if callback_on_step_end is None else _callback(self, callback_on_step_end),
            )
            found.append(indices)
        indices = torch.cat(found)
        pixels = torch.cat([self.pixels(some) for some in indices.split(self.AT_ONCE)])
        images: Any = pixels
        if output_type == "np":
            images = pixels.permute(0, 2, 3, 1).float().cpu().numpy()
        elif output_type == "pil":
            images = to_images(pixels)
        return DrawerOutput(images, indices) if return_dict else (images,)


def _texts(name: str, given: str | Sequence[str]) -> list[str]:
    """One text, or several, as a list."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Iterable):
        raise QLIPError(f"{name} {given!r:.40}: give a string, or several")
    return list(given)


def _negatives(given: str | Sequence[str] | None, prompts: int) -> list[str] | None:
    """One negative prompt for all prompts, or one for each."""
    if given is None:
        return None
    texts = _texts("negative_prompt", given)
    if not isinstance(given, str) and len(texts) != prompts:
        raise QLIPError(f"{len(texts)} negative prompts for {prompts} prompts; give one, or one for each")
    return texts


def _seed_of(generator: torch.Generator | Sequence[torch.Generator] | None, images: int) -> tuple[int, Sequence[int]]:
    """Seed and image numbers: a generator's next number is the seed, and one per image are their numbers."""

    def number(one: torch.Generator | None) -> int:
        device = "cpu" if one is None else one.device
        return int(torch.randint(1 << 62, (1,), generator=one, device=device))

    if generator is None or isinstance(generator, torch.Generator):
        return number(generator), range(images)
    if not isinstance(generator, Sequence) or not all(isinstance(one, torch.Generator) for one in generator):
        raise QLIPError(f"generator {generator!r:.60}: give a torch.Generator, or a list of one per image")
    if len(generator) != images:
        raise QLIPError(f"{len(generator)} generators for {images} images; give one, or one for each")
    return 0, [number(one) for one in generator]


def _callback(drawer: Drawer, call: OnStepEnd) -> OnStep:
    def on_step(done: int, indices: Tensor) -> None:
        call(drawer, done - 1, done - 1, {"indices": indices})

    return on_step
