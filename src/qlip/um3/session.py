"""Text and images in, text and images out: `UM3Chat`.

    chat = UM3Chat.from_pretrained()
    for part in chat.stream("a red circle above a blue square"):
        print(part)  # pieces of text, and whole Pillow images

A conversation is one document, and keys and values of the ids that the cache holds are kept between turns; an image is
encoded once, to ids, and one that the model drew is never encoded again. `generate` continues independent prompts
together, apart from the conversation. A part of a prompt is a text (a string) or an image (a path or a
Pillow image, for instance).

Shapes: B prompts, N tokens, K groups.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from qlip import assets
from qlip.errors import QLIPError
from qlip.lm.cache import STEP, KVCache, common_length
from qlip.lm.guidance import Constant, Guidance
from qlip.lm.packed import pack
from qlip.lm.sampling import AnswerSettings, Sampling
from qlip.lm.tokenizer import AnswerText, LLMTokenizer
from qlip.modeling.checkpoint import resolve
from qlip.modeling.images import ImageInput, to_images
from qlip.modeling.indices import regroup
from qlip.tokens.image_codec import ImageCodec
from qlip.um3.generate import Mode, bos_of, generate, limit_of, rows_of, stream
from qlip.um3.model import UM3
from qlip.um3.sequence import IN_TEXT, indices_of, whole_image

Part = ImageInput
"""A string is text; all else is an image, as :func:`qlip.modeling.images.load_image` takes it."""
Prompt = Part | Sequence[Part]
"""One part, or several."""
Answer = list[str | Image.Image]
"""Texts and images in order."""
DECODED_AT_ONCE = 32
"""Images per call of the QLIP."""
BETWEEN = " "
"""Between the text of a turn and that of the next."""


class UM3Settings(AnswerSettings):
    """Sampling as the paper's, unless the folder says otherwise.

    Attributes:
        image_guidance_scale: scale of classifier-free guidance of images; 1 is none.
    """

    do_sample: bool = True
    top_p: float | None = 0.95
    image_guidance_scale: float = 1.0


class UM3Chat:
    """A conversation with one model that reads and writes text and images.

    Attributes:
        model: in eval mode.
        tokenizer: of its text.
        codec: the QLIP between images and their tokens.
        settings: of sampling, where a call gives none.
        name: for messages and reports.
        ids: of the conversation so far.
        prefilled: positions that the last turn added to the cache before the answer.

    Raises:
        QLIPError: a tokenizer with more ids than text rows, or another QLIP than that of the training.
    """

    def __init__(
        self,
        model: UM3,
        tokenizer: LLMTokenizer,
        codec: ImageCodec,
        settings: UM3Settings | None = None,
        name: str = "model",
    ) -> None:
        self.model, self.tokenizer, self.codec = model, tokenizer, codec
        self.settings, self.name = settings or UM3Settings(), name
        config = model.config
        if tokenizer.size > config.text_vocab_size:
            raise QLIPError(
                f"{name}: its tokenizer has {tokenizer.size:,} ids, the model {config.text_vocab_size:,} text rows;"
                " restore the tokenizer's files that it was saved with"
            )
        if config.vision_fingerprint not in (None, codec.model.code_fingerprint):
            raise QLIPError(
                f"{name}: was trained with images of the QLIP {str(config.vision_fingerprint)[:12]}, but {codec.name}"
                f" is {codec.model.code_fingerprint[:12]}; give that QLIP"
            )
        self.ids: list[int] = []
        self.prefilled = 0
        self._cache: KVCache | None = None
        self._held: list[int] = []  # ids of the cache's positions, and the one behind them
        self._answering: Generator[str | Image.Image, None, None] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "bundled",
        *,
        vision_tower: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        **hub: Any,
    ) -> Self:
        """Load a UM3 with its tokenizer and the QLIP of its images; on a CPU the decoder's weights are packed.

        Args:
            name_or_path: a folder, a Hub id, or "bundled".
            vision_tower: the QLIP, instead of the one that the folder names.
            device: such as cpu or cuda; "auto" takes a GPU where there is one.
            dtype: of the weights.
            **hub: ``revision`` (of the UM3), ``token``, ``cache_dir``, ``local_files_only``.

        Raises:
            QLIPError: no such model, a broken file, no tokenizer, or another QLIP than that of the training.
        """
        name = assets.name_of(name_or_path, assets.BUNDLED_UM3)
        folder = resolve(name, **hub)
        model = UM3.from_pretrained(folder, dtype=dtype, device=device)
        tokenizer = LLMTokenizer.from_folder(folder)
        settings = UM3Settings.from_folder(folder)
        hub.pop("revision", None)
        codec = ImageCodec.from_pretrained(
            vision_tower or model.config.vision_tower, device=model.device, dtype=dtype, **hub
        )
        chat = cls(model, tokenizer, codec, settings, name)
        if model.device.type == "cpu" and model.decoder.dtype == torch.float32:
            pack(model.decoder, "float32" if torch.backends.mkldnn.is_available() else "plain")
        return chat

    # ---------------------------------------------------------------- a conversation

    def reset(self) -> None:
        """Forget the conversation."""
        self._close()
        self.ids = []

    def say(self, prompt: Prompt, **options: Any) -> Answer:
        """Answer with texts and images; see :meth:`stream` for the options."""
        found: Answer = []
        for part in self.stream(prompt, **options):
            if isinstance(part, str) and found and isinstance(found[-1], str):
                found[-1] += part
            else:
                found.append(part)
        return found

    def stream(
        self,
        prompt: Prompt,
        *,
        generation_mode: Mode = "interleaved",
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        guidance: Guidance | float | None = None,
        seed: int = 0,
    ) -> Iterator[str | Image.Image]:
        """Continue the conversation by a prompt, and answer piece by piece.

        Args:
            prompt: text, an image, or several of both.
            generation_mode, max_tokens, seed: see :func:`qlip.um3.generate`.
            sampling, guidance: instead of the settings'.

        Returns:
            Iterator over pieces of text, in whole characters, and over images. The conversation holds what was taken
            from it, without an unfinished image; the next turn ends it.

        Raises:
            QLIPError: an image that cannot be read, or a conversation or `max_tokens` that leaves no room for an
                image; the conversation stays as it was.
        """
        self._close()
        before = self._last_image(prompt, generation_mode) if self.settings.single_turn else self.ids
        ids = [*before, *self.encode(prompt, before)]
        sampling = self.settings.sampling() if sampling is None else sampling
        steps = self._stream(ids, generation_mode, max_tokens, sampling, self.guidance(guidance), seed)
        self._answering = steps
        return steps

    def _last_image(self, prompt: Prompt, mode: Mode) -> list[int]:
        """Ids of the conversation's last image, alone; none before a drawing, or a prompt that has an image itself."""
        config, shows = self.model.config, any(not isinstance(part, str) for part in _parts_of(prompt))
        if mode == "image" or shows or config.end_image not in self.ids:
            return []
        end = len(self.ids) - self.ids[::-1].index(config.end_image)
        return [*bos_of(config, self.ids), *self.ids[end - self.model.grammar.image_cost : end]]

    def _close(self) -> None:
        """End an answer that was not taken whole."""
        if self._answering is not None:
            self._answering.close()
            self._answering = None

    def _stream(
        self, ids: list[int], mode: Mode, max_tokens: int | None, sampling: Sampling, guidance: Guidance, seed: int
    ) -> Generator[str | Image.Image, None, None]:
        config = self.model.config
        begun = [*ids, *([config.begin_image] if mode == "image" else [])]
        limit = limit_of(self.model, mode, max_tokens, len(begun), [0 if mode == "image" else IN_TEXT])
        cache = self._prepared(begun, rows_of(config, mode, guidance), min(len(begun) + limit, config.decoder.length))
        self.prefilled = len(begun) - cache.length
        steps = stream(
            self.model,
            [ids],
            generation_mode=mode,
            max_tokens=max_tokens,
            sampling=sampling,
            guidance=guidance,
            seed=seed,
            cache=cache,
        )
        self._held = begun
        text, image = AnswerText(self.tokenizer, strip=False), list[int]()
        inside, drawn_any = mode == "image", False
        try:
            for step in steps:
                drawn_any = True
                id_ = int(step[0])
                self._held.append(id_)
                if inside:
                    image.append(id_)
                    if id_ == config.end_image:
                        inside = False
                        ids += [config.begin_image, *image]
                        [drawn] = self.decode_image_tokens(torch.tensor([image[:-1]]))
                        yield drawn
                elif id_ == config.begin_image:
                    if piece := text.rest():
                        yield piece
                    inside, image, text = True, [], AnswerText(self.tokenizer, strip=False)
                elif id_ in config.decoder.stop_ids:
                    break
                else:
                    ids.append(id_)
                    if piece := text.add(id_):
                        yield piece
            if piece := text.rest():
                yield piece
        finally:
            if drawn_any:
                self.ids = ids
            if self._cache is not None:
                self._cache.length = cache.length

    def _prepared(self, ids: Sequence[int], rows: int, positions: int) -> KVCache:
        """Return the cache with room for a number of positions, and with the beginning that it shares with ids."""
        cache = self._cache
        kept = 0 if cache is None else min(common_length(ids, self._held), len(ids) - 1, cache.length)
        if cache is None or cache.rows < rows or cache.capacity < positions:
            grown = self.model.decoder.new_cache(rows, -(-positions // STEP) * STEP)
            if cache is not None:
                grown.stored[:, :1, ..., :kept, :] = cache.stored[:, :1, ..., :kept, :]
            self._cache = cache = grown
        cache.length, cache.padding = kept, None  # the row without a prompt begins with each image
        return cache if cache.rows == rows else cache.first(rows)

    # ---------------------------------------------------------------- independent prompts

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        generation_mode: Mode = "interleaved",
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        guidance: Guidance | float | None = None,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> list[Answer]:
        """Continue independent prompts, together and apart from the conversation.

        Args:
            prompts: B prompts.
            generation_mode, max_tokens, seed, numbers: see :func:`qlip.um3.generate`.
            sampling, guidance: instead of the settings'.

        Returns:
            Texts and images of each; an image that was cut short is left out.

        Raises:
            QLIPError: an image that cannot be read, or a context or `max_tokens` that cannot hold an image.
        """
        if not isinstance(prompts, list | tuple):
            raise QLIPError(f"prompts: give a list of prompts, not a {type(prompts).__name__}")
        found = generate(
            self.model,
            [self.encode(one) for one in prompts],
            generation_mode=generation_mode,
            max_tokens=max_tokens,
            sampling=self.settings.sampling() if sampling is None else sampling,
            guidance=self.guidance(guidance),
            seed=seed,
            numbers=numbers,
        )
        begin = [self.model.config.begin_image] if generation_mode == "image" else []
        return self._decode([[*begin, *ids] for ids in found])

    # ---------------------------------------------------------------- ids

    def guidance(self, given: Guidance | float | None = None) -> Guidance:
        """Return the given guidance, of which a number is the scale at all tokens, or else the settings'."""
        given = self.settings.image_guidance_scale if given is None else given
        return Constant(given) if isinstance(given, int | float) else given

    def encode(self, prompt: Prompt, before: Sequence[int] = ()) -> list[int]:
        """Ids of a prompt.

        Args:
            prompt: one part or several.
            before: ids of the conversation before it; without any, the tokenizer's BOS comes first.

        Raises:
            QLIPError: nothing at all, or an image that cannot be read.
        """
        config = self.model.config
        ids = [] if before or self.tokenizer.bos is None else [self.tokenizer.bos]
        for part in _parts_of(prompt):
            last = ids[-1] if ids else before[-1] if before else None
            if not isinstance(part, str):
                ids += whole_image(config, self.tokens(part)).tolist()
                continue
            spaced = last is not None and last not in (config.end_image, self.tokenizer.bos)
            ids += self.tokenizer.encode(
                BETWEEN + part if spaced else part,
                first=last is None or last == self.tokenizer.bos,
                after_token=last == config.end_image,
            )
        if not ids and not before:
            raise QLIPError("an empty prompt; give some text, or an image")
        return ids

    def decode(self, ids: Sequence[int]) -> Answer:
        """Texts and whole images of ids, in order; an image that was cut short is left out."""
        return self._decode([ids])[0]

    def _decode(self, rows: Sequence[Sequence[int]]) -> list[Answer]:
        """Texts and whole images of rows of ids; the images of all rows are decoded together."""
        parts = [self._parts(ids) for ids in rows]
        images = [part for row in parts for part in row if not isinstance(part, str)]
        decoded = iter(self.decode_image_tokens(torch.tensor(images)) if images else ())
        return [[part if isinstance(part, str) else next(decoded) for part in row] for row in parts]

    def _parts(self, ids: Sequence[int]) -> list[str | list[int]]:
        """Texts, and ids of whole images without begin and end, in order."""
        config, found = self.model.config, list[str | list[int]]()
        text, place = list[int](), 0
        while place < len(ids):
            if ids[place] != config.begin_image:
                text.append(ids[place])
                place += 1
                continue
            found += self._texts(text)
            image = list(ids[place + 1 : place + 1 + config.image_length])
            if len(image) == config.image_length:
                found.append(image)
            text, place = [], place + self.model.grammar.image_cost
        return [*found, *self._texts(text)]

    def _texts(self, ids: Sequence[int]) -> list[str]:
        text = self.tokenizer.decode([one for one in ids if one not in self.model.config.decoder.stop_ids])
        return [text] if text else []

    def tokens(self, image: ImageInput) -> Tensor:
        """Indices (N, K) of an image. Raises QLIPError if it cannot be read."""
        config, patch = self.model.config, self.codec.model.patch_size
        size = (config.grid[0] * patch, config.grid[1] * patch)
        [file] = self.codec.encode([image], size=size)
        return file.indices(config.group_size)

    @torch.inference_mode()
    def decode_image_tokens(self, ids: Tensor) -> list[Image.Image]:
        """Turn the ids of images into images.

        Args:
            ids: int64 (B, N K), without begin and end.

        Raises:
            QLIPError: another number of ids, or ids of other than images.
        """
        config, model = self.model.config, self.codec.model
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype.is_floating_point or ids.dtype == torch.bool:
            got = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
            raise QLIPError(f"ids must be an integer tensor (B, {config.image_length}), got {got}")
        indices = regroup(indices_of(config, ids), model.group_size, from_group_size=config.group_size)
        found = list[Image.Image]()
        for some in indices.to(model.device).split(DECODED_AT_ONCE):
            pixels = model.decode(some, config.grid)
            found += to_images(self.codec.processor.preprocessing.denormalize(pixels))
        return found


def _parts_of(prompt: Prompt) -> list[Any]:
    return list(prompt) if isinstance(prompt, list | tuple) else [prompt]
