"""Questions about images, answered by a trained model: `VisionChat`.

    chat = VisionChat.from_pretrained("runs/scenes/model")
    print(chat.ask("What colour is the circle?", ["photo.jpg"]))
    for piece in chat.stream("And the square?"):
        print(piece, end="")

A conversation becomes ids by the code that training uses. Keys and values of ids that the cache holds are kept, so a
second question prefills its own tokens alone, and an image is encoded once. `answer_batch` and `answers` answer
independent questions together, without the conversation.

Shapes: B conversations, T positions, M images of N tokens, C features, D the decoder's width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from qlip import assets
from qlip.errors import QLIPError, check_integer
from qlip.files import plural
from qlip.lm.cache import STEP, KVCache, common_length
from qlip.lm.complete import complete
from qlip.lm.packed import pack
from qlip.lm.sampling import AnswerSettings, Sampling
from qlip.lm.tokenizer import AnswerText, LLMTokenizer
from qlip.modeling.checkpoint import resolve
from qlip.modeling.images import ImageInput
from qlip.modeling.processor import Preprocessing
from qlip.vlm.config import IMAGE_ID
from qlip.vlm.conversations import IMAGE, Conversation, Turn
from qlip.vlm.images import load, pixels_of, read_vlm_preprocessing
from qlip.vlm.labels import encode_conversation
from qlip.vlm.model import VisionLanguageModel
from qlip.vlm.prompts import NO_LIMIT, last_labels, prompt_of
from qlip.vlm.templates import EOS, TEMPLATES, check_tokens, token_of

MAX_TOKENS = 256
"""Longest answer in tokens, where neither a call nor the model's folder names one."""
Key = int | str
"""Content of a cache's position: an id, or the digest of an image."""


@dataclass(frozen=True)
class Seen:
    """An image as the model sees it.

    Attributes:
        digest: of the pixels; equal pixels have equal features.
        pixels: (3, H, W) float32, normalised.
    """

    digest: str
    pixels: Tensor


class VisionChat:
    """A conversation with a vision-language model.

    Attributes:
        model: in eval mode.
        tokenizer: of its text decoder.
        preprocessing: of images.
        settings: of answers, where a call gives none.
        name: for messages and reports.
        template: chat template of the model.
        image_length: tokens of an image, N.
        turns: of the conversation so far.
        prefilled: positions that the last question added to the cache before its answer.

    Raises:
        QLIPError: an unknown template, or a tokenizer that lacks its tokens or has more ids than the text decoder.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: LLMTokenizer,
        preprocessing: Preprocessing,
        settings: AnswerSettings | None = None,
        name: str = "model",
    ) -> None:
        self.model, self.tokenizer, self.preprocessing = model, tokenizer, preprocessing
        self.settings, self.name = settings or AnswerSettings(), name
        if tokenizer.size > (rows := model.config.text_config.vocab_size):
            raise QLIPError(
                f"{name}: its tokenizer has {tokenizer.size:,} ids, its text decoder {rows:,}; restore the tokenizer's"
                " files that it was saved with"
            )
        if model.config.template not in TEMPLATES:
            raise QLIPError(f"{name}: template {model.config.template!r} is unknown; there are {', '.join(TEMPLATES)}")
        self.template = TEMPLATES[model.config.template]
        check_tokens(self.template, tokenizer)
        end_is_token = self.template.end in (EOS, *self.template.tokens)
        self._end_text = "" if end_is_token else self.template.end
        ends = [tokenizer.eos, *([token_of(self.template.end, tokenizer)] if end_is_token else []), *self.settings.ends]
        self._ends = tuple(dict.fromkeys(one for one in ends if one is not None))
        self.image_length = model.config.num_image_tokens(preprocessing.size)
        self.turns: tuple[Turn, ...] = ()
        self.prefilled = 0
        self._images: list[Seen] = []
        self._features: dict[str, Tensor] = {}  # by digest, (N, C)
        self._cache: KVCache | None = None
        self._keys: list[Key] = []  # of the cache's positions
        self._answering: Generator[str, None, None] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "bundled",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        torch_dtype: str | torch.dtype | None = None,
        **hub: Any,
    ) -> Self:
        """Load a model's folder.

        Args:
            name_or_path: a folder that `VisionLanguageModel.save_pretrained` wrote, with its tokenizer's files; a Hub
                id; or "bundled".
            device: such as cpu or cuda; "auto" takes a GPU where there is one.
            dtype: of the weights.
            torch_dtype: other name for ``dtype``, as in transformers.
            **hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

        Raises:
            QLIPError: no such model, a broken file, or no tokenizer.
        """
        name = assets.name_of(name_or_path, assets.BUNDLED_TALKER)
        folder = resolve(name, **hub)
        model = VisionLanguageModel.from_pretrained(folder, dtype=torch_dtype or dtype, device=device)
        if model.device.type == "cpu" and model.llm.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            pack(model.llm)
        preprocessing = read_vlm_preprocessing(folder, model.config)
        tokenizer = LLMTokenizer.from_folder(folder)
        return cls(model, tokenizer, preprocessing, AnswerSettings.from_folder(folder), name)

    # ---------------------------------------------------------------- a conversation

    def reset(self) -> None:
        """Forget questions, answers and images; images that are shown again are not encoded again."""
        self._close()
        self.turns, self._images = (), []

    def ask(
        self,
        question: str,
        images: ImageInput | Sequence[ImageInput] | None = None,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> str:
        """Answer a question, which may refer to earlier ones; see :meth:`stream`."""
        return "".join(self.stream(question, images, max_tokens=max_tokens, temperature=temperature, seed=seed))

    def stream(
        self,
        question: str,
        images: ImageInput | Sequence[ImageInput] | None = None,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> Iterator[str]:
        """Answer a question piece by piece.

        Args:
            question: may hold ``<image>`` where each of the images stands; else they stand before it.
            images: new image or images that it is about; earlier ones stay in the conversation, but where the settings
                say `single_turn` new ones replace them.
            max_tokens: of the answer, instead of the settings'.
            temperature: instead of the settings'; 0 takes the likeliest tokens.
            seed: of sampled answers.

        Returns:
            Iterator over pieces of whole characters. The conversation holds what was taken from it; the next question
            ends it.

        Raises:
            QLIPError: an image that cannot be read, or a conversation that is too long; it stays as it was.
        """
        self._close()
        sampling = self.settings.sampling(temperature)
        new = [self._see(image) for image in _several(images)]
        alone = self.settings.single_turn
        seen = (new or self._images) if alone else [*self._images, *new]
        user = Turn("user", _with_marks(question, len(seen if alone else new)))
        turns = (user,) if alone else (*self.turns, user)
        prompt = self._prompt(Conversation("the conversation", tuple(seen), turns))
        limit = self._limit(len(prompt), max_tokens)
        self._answering = self._stream(seen, turns, prompt, sampling, limit, seed)
        return self._answering

    def _close(self) -> None:
        """End an answer that was not taken whole."""
        if self._answering is not None:
            self._answering.close()
            self._answering = None

    @torch.inference_mode()
    def _stream(
        self, seen: list[Seen], turns: tuple[Turn, ...], prompt: list[int], sampling: Sampling, limit: int, seed: int
    ) -> Generator[str, None, None]:
        self._features = self._encode(seen, self._features)
        keys, cache = self._keys_of(prompt, seen), self._room(len(prompt) + limit)
        kept = min(common_length(keys, self._keys[: cache.length]), len(keys) - 1)
        images, inside = divmod(prompt[:kept].count(IMAGE_ID), self.image_length)
        kept -= inside  # an image is prefilled whole
        cache.advance(kept - cache.length)
        self._keys, self.prefilled = keys, len(keys) - kept
        embedded = self._embed([prompt[kept:]], [seen[images:]], self._features)
        answer, text = "", AnswerText(self.tokenizer, self._end_text)
        steps = complete(
            self.model.llm, embedded, sampling=sampling, stop=self._ends, max_tokens=limit, seed=seed, cache=cache
        )
        try:
            for step in steps:
                token = int(step[0])
                self._keys.append(token)
                if token in self._ends:
                    break
                if piece := text.add(token):
                    answer += piece
                    yield piece
                if text.ended:
                    break
            if piece := text.rest():
                answer += piece
                yield piece
        finally:
            self.turns, self._images = (*turns, Turn("assistant", answer)), seen

    # ---------------------------------------------------------------- independent questions

    def answer_batch(
        self,
        images: Sequence[ImageInput | Sequence[ImageInput] | None],
        questions: Sequence[str],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> list[str]:
        """Answer one question about each image, together and apart from the conversation.

        Args:
            images: one per question, or a list of several, or None for a question without an image.
            questions: B texts.
            max_tokens, temperature, seed: see :meth:`stream`.
            numbers: of the questions, which with the seed choose sampled answers; 0, 1, ... by default.

        Returns:
            B answers.

        Raises:
            QLIPError: an image that cannot be read, or a question that is too long.
        """
        if len(images) != len(questions):
            raise QLIPError(f"{len(images)} images for {len(questions)} questions; give one entry for each")
        conversations = []
        for number, (given, question) in enumerate(zip(images, questions, strict=True)):
            shown = _several(given)
            turn = Turn("user", _with_marks(question, len(shown)))
            conversations.append(Conversation(f"question {number}", shown, (turn,)))
        return self.answers(
            conversations,
            sampling=self.settings.sampling(temperature),
            max_tokens=max_tokens,
            seed=seed,
            numbers=numbers,
        )

    @torch.inference_mode()
    def answers(
        self,
        conversations: Sequence[Conversation],
        *,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> list[str]:
        """Answer the last turn of each conversation, as one batch padded at the left.

        Args:
            conversations: B, each with a user's turn at its end.
            sampling: instead of the settings'.
            max_tokens, seed: see :meth:`stream`.
            numbers: see :meth:`answer_batch`.

        Returns:
            B answers.

        Raises:
            QLIPError: an image that cannot be read, or a conversation that is too long; its id is named.
        """
        if not conversations:
            return []
        sampling = self.settings.sampling() if sampling is None else sampling
        seen = [[self._see(image) for image in one.images] for one in conversations]
        prompts = [self._prompt(one) for one in conversations]
        limit = min(
            self._limit(len(prompt), max_tokens, one.id) for prompt, one in zip(prompts, conversations, strict=True)
        )
        features = self._encode([one for some in seen for one in some])
        embedded = self._embed(prompts, seen, features)
        start = torch.tensor([embedded.shape[1] - len(prompt) for prompt in prompts], device=embedded.device)
        texts, answers = [AnswerText(self.tokenizer, self._end_text) for _ in prompts], [""] * len(prompts)
        open_rows = set(range(len(prompts)))
        steps = complete(
            self.model.llm,
            embedded,
            start=start,
            sampling=sampling,
            stop=self._ends,
            max_tokens=limit,
            seed=seed,
            numbers=numbers,
        )
        for step in steps:
            tokens = step.tolist()
            for row in sorted(open_rows):
                if tokens[row] not in self._ends:
                    answers[row] += texts[row].add(tokens[row])
                if tokens[row] in self._ends or texts[row].ended:
                    open_rows.remove(row)
            if not open_rows:
                break
        return [answer + text.rest() for answer, text in zip(answers, texts, strict=True)]

    @torch.inference_mode()
    def likelihood(self, conversation: Conversation) -> tuple[float, bool]:
        """Log-probability of the last turn of a conversation, an answer.

        Args:
            conversation: ends with an assistant's turn; the token that ends it does not count.

        Returns:
            Sum of its tokens' log-probabilities in nats, and True if each is the likeliest one.

        Raises:
            QLIPError: a conversation that is too long, or whose last turn is not the assistant's or is empty.
        """
        if not conversation.turns or conversation.turns[-1].role != "assistant":
            raise QLIPError(f"{conversation.id}: has no answer; end with a turn of the assistant")
        seen = [self._see(image) for image in conversation.images]
        example = encode_conversation(conversation, self.template, self.tokenizer, self.image_length, NO_LIMIT)
        ids, (begin, end) = example.ids.tolist(), last_labels(example.labels.tolist())
        end -= not self._end_text  # the id that ends a turn
        if begin >= end:
            raise QLIPError(f"{conversation.id}: has an empty answer; give one")
        self._limit(end, None, conversation.id)
        hidden = self.model.llm.hidden(self._embed([ids[:end]], [seen], self._encode(seen)))  # (1, T, D)
        scores = self.model.llm.logits(hidden[0, begin - 1 : end - 1]).float().log_softmax(-1)  # (tokens, V)
        targets = torch.tensor(ids[begin:end], device=scores.device)
        return float(scores.gather(-1, targets[:, None]).sum()), bool((scores.argmax(-1) == targets).all())

    # ---------------------------------------------------------------- steps

    def load(self, image: ImageInput) -> Image.Image:
        """Load an image, which can be shown then. Raises QLIPError if it cannot be."""
        return load(image, self.preprocessing, self.model.config.pad_images)

    def _see(self, image: ImageInput) -> Seen:
        pixels = pixels_of(image, self.preprocessing, self.model.config.pad_images)
        return Seen(hashlib.sha256(pixels.numpy().tobytes()).hexdigest(), pixels)

    def _prompt(self, conversation: Conversation) -> list[int]:
        return prompt_of(conversation, self.template, self.tokenizer, self.image_length)

    def _limit(self, prompt: int, max_tokens: int | None, name: str = "the conversation") -> int:
        """Tokens that an answer may have behind a prompt."""
        if max_tokens is not None:
            check_integer("max_tokens", max_tokens)
        if not prompt:
            raise QLIPError(f"{name}: no prompt; the template {self.template.name} reads images alone, show one")
        most = self.model.config.text_config.length
        if prompt >= most:
            raise QLIPError(
                f"{name}: {prompt:,} tokens with the question, and {self.name} reads {most:,}; start again, ask"
                " less, or show fewer images"
            )
        return min(max_tokens or self.settings.max_new_tokens or MAX_TOKENS, most - prompt)

    def _encode(self, images: Sequence[Seen], known: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Features (N, C) of images by digest, each computed once, and not at all if it is known."""
        pixels = {one.digest: one.pixels for one in images}
        missing = [digest for digest in pixels if digest not in (known or {})]
        found = {digest: one for digest, one in (known or {}).items() if digest in pixels}
        if missing:
            stacked = torch.stack([pixels[digest] for digest in missing]).to(self.model.device)
            found.update(zip(missing, self.model.image_features(stacked), strict=True))
        return found

    def _embed(
        self, ids: Sequence[list[int]], images: Sequence[Sequence[Seen]], features: Mapping[str, Tensor]
    ) -> Tensor:
        """Embed rows of ids, padded at the left, with the images in order of occurrence: (B, T, D)."""
        length = max(map(len, ids))
        padded = torch.tensor([[0] * (length - len(row)) + row for row in ids], device=self.model.device)
        shown = [features[one.digest] for some in images for one in some]
        return self.model.embed(padded, features=torch.stack(shown) if shown else None)

    def _keys_of(self, ids: Sequence[int], images: Sequence[Seen]) -> list[Key]:
        """Content of the cache's positions for a prompt: ids, and at image tokens their image's digest."""
        digests = (one.digest for one in images for _ in range(self.image_length))
        return [next(digests) if token == IMAGE_ID else token for token in ids]

    def _room(self, positions: int) -> KVCache:
        """Return the cache with room for a number of positions; what it holds stays."""
        cache = self._cache
        if cache is None or cache.capacity < positions:
            capacity = -(-positions // STEP) * STEP
            grown = self.model.llm.new_cache(1, capacity)
            if cache is not None:
                grown.stored[..., : cache.length, :] = cache.stored[..., : cache.length, :]
                grown.advance(cache.length)
            self._cache = cache = grown
        return cache


def _several(given: ImageInput | Sequence[ImageInput] | None) -> tuple[ImageInput, ...]:
    """Images of an argument that may be one image, a list or None."""
    if given is None:
        return ()
    return tuple(given) if isinstance(given, list | tuple) else (given,)  # type: ignore[return-value]


def _with_marks(question: str, images: int) -> str:
    """Put marks of new images before a question that has none."""
    if not isinstance(question, str):
        raise QLIPError(f"a question is a text, not {question!r}")
    if not question.strip():
        raise QLIPError("an empty question; ask something")
    marks = question.count(IMAGE)
    if marks not in (0, images):
        raise QLIPError(
            f"{plural(marks, 'mark')} {IMAGE} in the question for {plural(images, 'image')}; give as many, or none"
        )
    return question if marks else "\n".join([*[IMAGE] * images, question])
