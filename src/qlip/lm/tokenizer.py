"""Tokenizers of language models: `LLMTokenizer`, over the ``tokenizer.json`` of their folders.

`AnswerText` is the text of ids that come one after the other.

Text between control tokens is encoded by itself, so encoding adds nothing to it: no BOS, and no space before the first
word, as Llama 2's file asks for, except where a caller says that the text begins there. Decoding is the inverse.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from tokenizers import Tokenizer

from qlip.errors import QLIPError
from qlip.files import encodable, write_text
from qlip.modeling.checkpoint import resolve

Space = Literal["", "first", "always"]
"""Place where a tokenizer puts a space before text: nowhere, at the beginning, or behind control tokens too."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Decoded text of the first bytes of a character whose last ones are still missing."""
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
CONTROL_TOKENS = frozenset(
    {
        *("<|im_start|>", "<|im_end|>"),
        *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        *("<start_of_turn>", "<end_of_turn>"),
    }
)
"""Tokens around the turns of ChatML, Llama 3 and Gemma; their names in a text are text, as of all special tokens."""


class LLMTokenizer:
    """Text to ids and back.

    The names of control tokens inside a text are text: no question can end its own turn.

    Args:
        tokenizer: content of ``tokenizer.json``.
        config: of ``tokenizer_config.json``: ``eos_token``, and, if there are, ``bos_token``, ``pad_token``,
            ``add_bos_token``, ``chat_template``.
        where: name of the folder, for errors.

    Attributes:
        bos: id that a text begins with; None if the tokenizer does not begin texts with one.
        eos: id of the end.
        pad: id of padding, often that of the end, so masks never come from it.
        size: number of ids, all of which are smaller.
        open_ids: ids behind which the text so far can still change: control tokens, and tokens of one byte.
        chat_template: of the model, in Jinja.

    Raises:
        QLIPError: not a tokenizer, or it names no end token.
    """

    def __init__(self, tokenizer: str, config: Mapping[str, Any], where: str = "the tokenizer") -> None:
        self.where, self.config, self._json = where, dict(config), tokenizer
        try:
            values = json.loads(tokenizer)
            original = Tokenizer.from_str(tokenizer)
            self._space = _remove_space(values)
            named = {name_of(self.config.get(f"{one}_token")) for one in ("bos", "eos", "pad")} | CONTROL_TOKENS
            for token in values["added_tokens"]:
                token["special"] |= token["content"] in named
            self._tokenizer = Tokenizer.from_str(json.dumps(values))
        except Exception as error:  # noqa: BLE001 (the library raises bare Exception for every fault)
            raise QLIPError(f"{where}: {FILE} is not a tokenizer ({error}); fetch it again") from None
        self._tokenizer.encode_special_tokens = True  # as text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        control = {token["id"] for token in values["added_tokens"] if token["special"]}
        bytes_ = {self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
        self.open_ids = frozenset(control | bytes_ - {None})
        eos = self._named("eos")
        if eos is None:
            raise QLIPError(f'{where}: names no token that ends a text; write "eos_token" into its {CONFIG}')
        self.eos = eos
        pad = self._named("pad")
        self.pad = self.eos if pad is None else pad
        self.bos = self._first(original)
        self.chat_template = chat_template_of(self.config)

    def _named(self, name: str) -> int | None:
        token = name_of(self.config.get(f"{name}_token"))
        found = None if token is None else self._tokenizer.token_to_id(token)
        if token is not None and found is None:
            raise QLIPError(
                f"{self.where}: {CONFIG} names {name}_token {token!r}, which {FILE} lacks; fetch both again"
            )
        return found

    def _first(self, original: Tokenizer) -> int | None:
        """Id that the tokenizer begins texts with."""
        adds = self.config.get("add_bos_token")
        if adds is not None:
            return self._named("bos") if adds else None
        original.no_padding()
        around = original.encode("").ids
        return around[0] if around and around[0] != self.eos else None

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Read the tokenizer of a model.

        Args:
            folder: or a Hub id.

        Raises:
            QLIPError: no such folder, no ``tokenizer.json``, a broken file, or no end token.
        """
        place, where = resolve(folder), str(folder)
        if not (place / FILE).is_file():
            raise QLIPError(
                f"{where}: has no {FILE}; save its tokenizer there with transformers:"
                " AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        names = ("special_tokens_map.json", CONFIG)
        config: dict[str, Any] = {}
        for path in (place / name for name in names):
            if path.is_file():
                try:
                    config |= json.loads(path.read_text(encoding="utf-8"))
                except (OSError, ValueError, TypeError):
                    raise QLIPError(f"{path}: not a JSON object; fetch it again") from None
        if (jinja := place / "chat_template.jinja").is_file():
            config["chat_template"] = jinja.read_text(encoding="utf-8")
        try:
            text = (place / FILE).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise QLIPError(f"{place / FILE}: cannot be read ({error}); fetch it again") from None
        return cls(text, config, where)

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides about ids."""
        named = [self.bos, self.eos, self.pad]
        return hashlib.sha256(f"{named} {self._json}".encode()).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` as they were read."""
        write_text(Path(folder) / FILE, self._json)
        write_text(Path(folder) / CONFIG, json.dumps(self.config, indent=2, ensure_ascii=False) + "\n")

    def encode(self, text: str, first: bool = False, after_token: bool = False) -> list[int]:
        """Turn text into ids, without BOS or end.

        Args:
            text: to encode.
            first: it begins a text.
            after_token: it stands behind a control token or an image.
        """
        ids: list[int] = self._tokenizer.encode(self._spaced(text, first, after_token), add_special_tokens=False).ids
        return ids

    def encode_all(self, texts: Sequence[str], first: bool = False) -> list[list[int]]:
        """Turn many texts into ids, on all cores; see `encode`."""
        spaced = [self._spaced(text, first, False) for text in texts]
        return [one.ids for one in self._tokenizer.encode_batch_fast(spaced, add_special_tokens=False)]

    def _spaced(self, text: str, first: bool, after_token: bool) -> str:
        """Text with the space that the tokenizer puts before it."""
        space = self._space and (first or (after_token and self._space == "always"))
        return encodable(" " + text if space and not text.startswith(" ") else text)

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text, without control tokens; bytes that are no character become U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token(self, name: str) -> int:
        """Id of a token by its name.

        Raises:
            QLIPError: no such token.
        """
        found: int | None = self._tokenizer.token_to_id(name)
        if found is None:
            raise QLIPError(f"{self.where}: its tokenizer has no token {name}")
        return found

    def with_tokens(self, names: Sequence[str]) -> Self:
        """Return a tokenizer that has special tokens of these names too: new ones get the ids from `size` on."""
        values = json.loads(self._json)
        new = [name for name in names if self._tokenizer.token_to_id(name) is None]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        values["added_tokens"] += [
            {"id": self.size + number, "content": name} | flags for number, name in enumerate(new)
        ]
        return type(self)(json.dumps(values, ensure_ascii=False), self.config, self.where)

    def token_texts(self) -> list[bytes]:
        """Text of each id in UTF-8, (size,); empty for control tokens and for ids without a token.

        Joined, the texts of a text's ids are the text, with the space before its first word where the tokenizer
        puts one.
        """
        values, found = json.loads(self._json), [b""] * self.size
        bytewise = any(step["type"] == "ByteLevel" for step in _steps(values, "decoder"))
        table = {code: byte for byte, code in enumerate(_byte_characters())}
        added = {token["id"]: token for token in values["added_tokens"]}
        for token, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if number in added:
                found[number] = b"" if added[number]["special"] else token.encode()
            elif bytewise:
                found[number] = bytes(table[one] for one in token)
            elif (byte := _BYTE.fullmatch(token)) is not None:
                found[number] = bytes([int(byte[1], 16)])
            else:
                found[number] = token.replace("\u2581", " ").encode()
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._json, self.config, self.where)


_BYTE = re.compile("<0x([0-9A-F]{2})>")
"""A token of one byte, in vocabularies that are not of bytes."""


def _byte_characters() -> str:
    """Characters that stand for the bytes 0 to 255 in byte-level vocabularies (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


def chat_template_of(config: Mapping[str, Any]) -> str | None:
    """Chat template in ``tokenizer_config.json``, or None; of several, which have names, the default one."""
    found = config.get("chat_template")
    if isinstance(found, list):
        found = next((one.get("template") for one in found if one.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def name_of(token: Any) -> str | None:
    """Name of a token in ``tokenizer_config.json``, where it is a string or holds one as ``content``; else None."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _remove_space(values: dict[str, Any]) -> Space:
    """Take the space before the first word out of a ``tokenizer.json``, and return where it was."""
    space: Space = ""
    for step in _steps(values, "pre_tokenizer"):
        if step["type"] == "Metaspace":
            scheme: Any = step.get("prepend_scheme") or ("always" if step.pop("add_prefix_space", True) else "never")
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
            space = space if scheme == "never" else scheme
        elif step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            step["add_prefix_space"], space = False, "always"
    prepended = [step for step in _steps(values, "normalizer") if step["type"] == "Prepend"]
    if prepended:
        _drop(values, "normalizer", prepended)
        space = "always"
    if space:
        strips = [step for step in _steps(values, "decoder") if step["type"] == "Strip" and step.get("start")]
        _drop(values, "decoder", strips)
    for step in _steps(values, "decoder"):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
    return space


_INNER = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def _steps(values: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    """Steps of a stage of ``tokenizer.json``."""
    found = values.get(stage)
    if not found:
        return []
    return list(found[_INNER[stage]]) if found["type"] == "Sequence" else [found]


def _drop(values: dict[str, Any], stage: str, steps: list[dict[str, Any]]) -> None:
    """Remove steps from a stage."""
    left = [step for step in _steps(values, stage) if step not in steps]
    values[stage] = {"type": "Sequence", _INNER[stage]: left} if left else None


class AnswerText:
    """Text of an answer whose ids come one after the other, in whole characters.

    A tokenizer of bytes gives a character in several ids; the text waits for the last of them, and behind tokens of
    one byte for one of another kind, because a fault turns all bytes of a run into U+FFFD.

    Args:
        tokenizer: decodes the ids.
        end: text that ends the answer; "" for none.
        strip: leave out spaces at the beginning, between a template's marks and the answer, and at the end.

    Attributes:
        ended: the end was read.
    """

    def __init__(self, tokenizer: LLMTokenizer, end: str = "", strip: bool = True) -> None:
        self._tokenizer, self._end, self._strip = tokenizer, end, strip
        self._settled = ""  # text that no later id changes
        self._context: list[int] = []  # its last ids: some tokenizers decode the first word otherwise than the next
        self._ids: list[int] = []  # those behind it
        self._given = ""
        self.ended = False

    def add(self, token: int) -> str:
        """Add an id, and return the text that is whole now and was not given before; it may be empty."""
        self._ids.append(token)
        if token in self._tokenizer.open_ids:
            return ""
        text = self._text()
        if not text.endswith(UNFINISHED):
            self._settled, self._context, self._ids = text, self._ids, []
        return self._new(text.rstrip(UNFINISHED))

    def rest(self) -> str:
        """Return what is left when no further id comes; bytes that are no character become U+FFFD."""
        return self._new(self._text())

    def _text(self) -> str:
        known = len(self._tokenizer.decode(self._context))
        return self._settled + self._tokenizer.decode([*self._context, *self._ids])[known:]

    def _new(self, text: str) -> str:
        if self._end and self._end in text:
            text, self.ended = text.partition(self._end)[0], True
        if self._strip:
            text = text.strip()  # later spaces are given with what follows
        if not text.startswith(self._given):  # a tokenizer that rewrites what it gave
            return ""
        new, self._given = text[len(self._given) :], text
        return new
