"""Chat templates: the text that a language model reads of a conversation.

`Template` holds the strings around the turns, `TEMPLATES` those of known models. A conversation becomes a row of
`Piece`s: text, control tokens and images, each with or without a loss. The strings equal those of the models' own chat
templates, except that no system turn is added to ChatML.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from qlip.errors import QLIPError
from qlip.lm.tokenizer import LLMTokenizer
from qlip.vlm.conversations import IMAGE, Conversation, Turn

BOS, EOS = "{bos}", "{eos}"
"""The tokenizer's own tokens in a template; BOS is left out if the tokenizer begins no text with one."""
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Piece:
    """Part of a conversation.

    Attributes:
        kind: text, a control token by its name, or an image.
        text: of it.
        trained: it has a loss.
    """

    kind: Literal["text", "token", "image"]
    text: str
    trained: bool = False


@dataclass(frozen=True)
class Template:
    """Strings around the turns of a conversation; ``{}`` is a turn's text, without white space at its ends.

    Attributes:
        name: in recipes.
        user: a user's turn.
        assistant: before an answer.
        end: after an answer; it has a loss, so the model learns to stop.
        lead: between `assistant` and an answer that is not empty; it has a loss.
        after: behind `end`.
        begin: before everything.
        system: a system turn; None refuses it.
        default_system: text of the system turn of conversations without one; "" for none.
        tokens: control tokens in these strings.
        questions: users' text is read; else their images alone, as in LLaVA's first stage.
    """

    name: str
    user: str
    assistant: str
    end: str
    lead: str = ""
    after: str = ""
    begin: str = ""
    system: str | None = None
    default_system: str = ""
    tokens: tuple[str, ...] = ()
    questions: bool = True

    def pieces(self, conversation: Conversation) -> Iterator[Piece]:
        """Iterate over the pieces of a conversation.

        Raises:
            QLIPError: a system turn where the template has none, or see :meth:`Conversation.check`.
        """
        conversation.check()
        turns = list(conversation.turns)
        yield from self._marked(self.begin)
        system = turns.pop(0).text.strip() if turns[0].role == "system" else self.default_system
        if system and self.questions:
            if self.system is None:
                raise QLIPError(f"{conversation.id}: has a system turn, which the template {self.name} lacks")
            yield from self._around(self.system, [Piece("text", system)])
        for turn in turns:
            if turn.role == "user":
                yield from self._around(self.user, self._question(turn, bool(conversation.images)))
                continue
            yield from self._marked(self.assistant)
            if answer := turn.text.strip():
                yield Piece("text", self.lead + answer, trained=True)
            yield from self._marked(self.end, trained=True)
            yield from self._marked(self.after)

    def render(self, conversation: Conversation, bos: str = "", eos: str = "") -> str:
        """Return a conversation as text, with ``<image>`` for images.

        Args:
            conversation: to render.
            bos, eos: names of the tokenizer's tokens.
        """
        names = {BOS: bos, EOS: eos}
        return "".join(
            names.get(one.text, one.text) if one.kind == "token" else one.text for one in self.pieces(conversation)
        )

    def _question(self, turn: Turn, images: bool) -> Iterator[Piece]:
        for number, text in enumerate(turn.text.strip().split(IMAGE) if images else [turn.text.strip()]):
            if number:
                yield Piece("image", IMAGE)
            if text and self.questions:
                yield Piece("text", text)

    def _around(self, string: str, pieces: Sequence[Piece] | Iterator[Piece]) -> Iterator[Piece]:
        before, _, after = string.partition("{}")
        yield from self._marked(before)
        yield from pieces
        yield from self._marked(after)

    def _marked(self, string: str, trained: bool = False) -> Iterator[Piece]:
        """Iterate over text and control tokens of one of the template's strings."""
        for place, text in enumerate(self._token.split(string)):
            if text:
                yield Piece("token" if place % 2 else "text", text, trained)

    @cached_property
    def _token(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, (BOS, EOS, *self.tokens))) + ")")


TEMPLATES = {
    one.name: one
    for one in (
        Template("plain", user="{}", assistant="", end="\n", begin=BOS, questions=False),
        Template(
            "v1",
            begin=BOS,
            system="{} ",
            default_system=VICUNA_SYSTEM,
            user="USER: {} ",
            assistant="ASSISTANT:",
            lead=" ",
            end=EOS,
        ),
        Template(
            "chatml",
            system="<|im_start|>system\n{}<|im_end|>\n",
            user="<|im_start|>user\n{}<|im_end|>\n",
            assistant="<|im_start|>assistant\n",
            end="<|im_end|>",
            after="\n",
            tokens=("<|im_start|>", "<|im_end|>"),
        ),
        Template(
            "llama3",
            begin=BOS,
            system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
            user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
            assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
            end="<|eot_id|>",
            tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ),
        Template(
            "gemma",
            begin=BOS,
            user="<start_of_turn>user\n{}<end_of_turn>\n",
            assistant="<start_of_turn>model\n",
            end="<end_of_turn>",
            after="\n",
            tokens=("<start_of_turn>", "<end_of_turn>"),
        ),
        Template("qa", begin=BOS, user="{}\n", assistant="", end=EOS),
    )
}
"""By name: LLaVA's first stage, Vicuna, ChatML (SmolLM2, Qwen), Llama 3, Gemma, and a short one for own models."""


def token_of(name: str, tokenizer: LLMTokenizer) -> int | None:
    """Id of a control token of a template, or of `BOS` and `EOS`; None is BOS where texts begin with none.

    Raises:
        QLIPError: the tokenizer lacks it.
    """
    return tokenizer.bos if name == BOS else tokenizer.eos if name == EOS else tokenizer.token(name)


def check_tokens(template: Template, tokenizer: LLMTokenizer) -> None:
    """Check that a template's control tokens are the tokenizer's.

    Raises:
        QLIPError: one is not.
    """
    for name in template.tokens:
        try:
            tokenizer.token(name)
        except QLIPError as error:
            raise QLIPError(f"{error}, which the template {template.name} needs; set another template") from None


def template_of(chat_template: str | None, where: str) -> Template:
    """Recognise the template of a language model by its own chat template.

    Args:
        chat_template: in Jinja, from its ``tokenizer_config.json``; None if it has none.
        where: its folder, for errors.

    Raises:
        QLIPError: none of ours.
    """
    found = [
        one for one in TEMPLATES.values() if one.tokens and all(token in (chat_template or "") for token in one.tokens)
    ]
    if not found and chat_template and "USER:" in chat_template and "ASSISTANT:" in chat_template:
        found = [TEMPLATES["v1"]]
    if len(found) != 1:
        fault = (
            "has no chat template"
            if not chat_template
            else "its chat template does not say where answers begin and end"
        )
        raise QLIPError(f"{where}: {fault}, as far as is known here; set template: to one of {', '.join(TEMPLATES)}")
    return found[0]
