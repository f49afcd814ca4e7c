"""The model class for lmms-eval: `QLIPVision` answers the requests of its tasks with a `VisionChat`.

lmms-eval imports this module; nothing in this package does. What cannot be answered is an error, never an empty answer,
which would count as a wrong one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmms_eval.api.model import lmms

from qlip.errors import QLIPError, QLIPWarning
from qlip.evaluation.models.harness import batch_size_of, batches, cut, stops_of
from qlip.lm.sampling import Sampling
from qlip.runtime.progress import progress
from qlip.vlm.chat import VisionChat
from qlip.vlm.conversations import IMAGE, Conversation, Turn

READ = frozenset({"until", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams"})
"""Settings of a task's ``generation_kwargs`` that are followed; of others a warning tells once."""
MOST_ROUNDS = 32
Message = Mapping[str, Any]
Request = tuple[str, Callable[..., Any], dict[str, Any], int, str, str]
"""Context, function from a document to messages, settings of generation, document, task and split."""


class QLIPVision(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """A vision-language model for the tasks of lmms-eval, by its chat interface.

    Args:
        pretrained: folder, Hub id, or "bundled".
        device, dtype: see :meth:`VisionChat.from_pretrained`.
        batch_size: questions that are answered together.
        max_batch_size: not used; lmms-eval passes it.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "bundled",
        device: str = "auto",
        dtype: str = "float32",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size_of(batch_size)
        self.chat = VisionChat.from_pretrained(pretrained, device=device, dtype=dtype)
        self._unread: set[str] = set()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer questions.

        Args:
            requests: lmms-eval's instances, with the six arguments of `Request`.

        Returns:
            Answers in the order of the requests, each cut at the first of the task's ``until`` texts.

        Raises:
            QLIPError: a video or audio, a prompt that is too long, or beam search.
        """
        answers = dict[int, str]()
        with progress("answering", len(requests), "questions") as bar:
            for numbers in batches([request.args[2] for request in requests], self.batch_size):
                arguments: list[Request] = [requests[number].args for number in numbers]
                messages = [request[1](self._document(request)) for request in arguments]
                answers.update(zip(numbers, self._answers(messages, arguments), strict=True))
                bar.advance(len(numbers))
        return [answers[number] for number in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answer tasks of several rounds, in which a question depends on the answer before; returns all answers."""
        return [self._rounds(request.args) for request in requests]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return log-probabilities of given answers, and whether each is the greedy one.

        Args:
            requests: with lmms-eval's arguments for it: context, continuation or a function that makes it, function
                from a document to images, document, task, split.
        """
        found = []
        for request in requests:
            context, target, visual, document, task, split = request.args
            row = self.task_dict[task][split][document]
            images = [] if visual is None else visual(row)
            content = [*({"type": "image", "url": image} for image in images or ()), {"type": "text", "text": context}]
            answer = str(target(row) if callable(target) else target)
            messages: list[Message] = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": answer.strip()},
            ]
            found.append(self.chat.likelihood(conversation_of(messages, f"{task} {document}")))
        return found

    def _document(self, request: Request) -> Any:
        _, _, _, document, task, split = request
        return self.task_dict[task][split][document]

    def _answers(self, messages: Sequence[Sequence[Message]], arguments: Sequence[Request]) -> list[str]:
        settings = self._settings(arguments[0][2], arguments[0][4])
        conversations = [
            conversation_of(some, f"{request[4]} {request[3]}")
            for some, request in zip(messages, arguments, strict=True)
        ]
        until = settings.pop("until")
        return [cut(answer, until).strip() for answer in self.chat.answers(conversations, **settings)]

    def _rounds(self, request: Request) -> list[str]:
        make, document = request[1], self._document(request)
        messages, outputs, told = make(document), list[str](), None
        for number in range(1, MOST_ROUNDS + 1):
            outputs = [*outputs, *self._answers([messages], [request])]
            following = make(document, round_idx=number, previous_output=outputs, previous_round_info=told)
            messages, ended, outputs, told = following
            if ended:
                return list(outputs)
        raise QLIPError(f"{request[4]} {request[3]}: does not end after {MOST_ROUNDS} rounds; see the task's functions")

    def _settings(self, given: Mapping[str, Any], task: str) -> dict[str, Any]:
        """Read a task's ``generation_kwargs``; they are greedy unless they ask for samples, as lmms-eval's models."""
        for name in sorted(given.keys() - READ - self._unread):
            self._unread.add(name)
            warnings.warn(f"{task}: generation_kwargs {name}: not followed by this model", QLIPWarning, stacklevel=2)
        if (beams := given.get("num_beams") or 1) != 1:
            raise QLIPError(f"{task}: num_beams {beams}: this model has no beam search; pass --gen_kwargs num_beams=1")
        temperature = given.get("temperature") or 0.0
        if not given.get("do_sample", temperature > 0):
            temperature = 0.0
        filters = {name: given[name] for name in ("top_k", "top_p") if temperature and given.get(name) is not None}
        return {
            "sampling": Sampling(temperature=temperature, **filters),
            "max_tokens": given.get("max_new_tokens"),
            "until": stops_of(given),
        }


def conversation_of(messages: Sequence[Message], name: str) -> Conversation:
    """Convert lmms-eval's messages.

    Args:
        messages: with a role, and content: a text, or a list of ``{"type": "text", "text": ...}`` and
            ``{"type": "image", "url": Pillow image or path}``.
        name: task and document, for errors.

    Raises:
        QLIPError: a video or audio.
    """
    images, turns = list[Any](), list[Turn]()
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        shown = [part["url"] for part in parts if part["type"] == "image"]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        if others := sorted({part["type"] for part in parts} - {"text", "image"}):
            raise QLIPError(f"{name}: asks about {others[0]}; this model reads images and text")
        if sum(text.count(IMAGE) for text in texts) != len(shown) or not shown:  # else the texts place the images
            parts = [part | {"text": part["text"].replace(IMAGE, "")} if "text" in part else part for part in parts]
            texts = [IMAGE if part["type"] == "image" else part["text"] for part in parts]
        images += shown
        turns.append(Turn(message["role"], "\n".join(texts)))
    return Conversation(name, tuple(images), tuple(turns))
