"""CLIP's byte-level BPE, read from a checkpoint or trained on captions, with the ``tokenizers`` library."""

from __future__ import annotations

import gzip
import html
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from qlip.errors import QLIPError
from qlip.files import encodable, write_text

Padding = Literal["max_length", "longest"] | bool
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class CLIPTokenizer:
    """Lower-cased byte-level BPE, ``<|startoftext|> text <|endoftext|>``, padded and truncated to one length.

    The names of special tokens inside a text are text: a caption cannot cut itself off.

    Args:
        tokenizer: the BPE, with or without a post-processor.
        length: positions per text (the text tower's ``max_position_embeddings``).
        pad_token: padding token; CLIP's own tokenizer pads with the end token.
        unescape_html: read ``&amp;`` as ``&``, as open_clip does; transformers' processors, and so the published
            models, do not.
    """

    def __init__(self, tokenizer: Tokenizer, length: int, pad_token: str = EOS, unescape_html: bool = False) -> None:
        self.length, self.unescape_html = length, unescape_html
        self.bos, self.eos, self.pad = (self._id(tokenizer, token) for token in (BOS, EOS, pad_token))
        self.pad_token = pad_token
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A {EOS}", special_tokens=[(BOS, self.bos), (EOS, self.eos)]
        )
        tokenizer.encode_special_tokens = True  # as ordinary text
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=self.pad, pad_token=pad_token)
        self.tokenizer = tokenizer

    @staticmethod
    def _id(tokenizer: Tokenizer, token: str) -> int:
        index = tokenizer.token_to_id(token)
        if index is None:
            raise QLIPError(f"the tokenizer has no token {token!r}: not CLIP's vocabulary")
        return int(index)

    @property
    def vocab_size(self) -> int:
        """Number of ids; they are in [0, vocab_size)."""
        return int(self.tokenizer.get_vocab_size())

    def identity(self) -> str:
        """Return all that decides about the ids of a text, as one string."""
        return self.tokenizer.to_str() + ("unescape_html" if self.unescape_html else "")

    def __call__(
        self,
        texts: Sequence[str],
        *,
        padding: Padding = "max_length",
        truncation: bool = True,
        max_length: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Turn texts into ids and a mask.

        Args:
            texts: B strings; halves of surrogate pairs, which no file can hold, are replaced by U+FFFD.
            padding: "max_length" pads to N = ``max_length``; "longest" or True to the longest text; False not at all.
            truncation: shorten longer texts, which keep the end token; False refuses them.
            max_length: positions per text; by default, and at most, ``length``.

        Returns:
            ``input_ids`` and ``attention_mask``, (B, N) int64 each; the mask is 0 at padding.

        Raises:
            QLIPError: not strings, a text too long to stay whole, or texts of several lengths without padding.
        """
        most = self.length if max_length is None else max_length
        if not 2 <= most <= self.length:
            raise QLIPError(f"max_length {most}: the text tower has {self.length} positions, two for special tokens")
        if padding not in ("max_length", "longest", True, False):
            raise QLIPError(f"padding {padding!r}: take 'max_length', 'longest', True or False")
        encodings = self.tokenizer.encode_batch([self._cleaned(text, number) for number, text in enumerate(texts)])
        ids = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64).reshape(-1, self.length)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.int64)
        mask = mask.reshape(-1, self.length)
        counts = mask.sum(1)
        if not truncation:
            long = [at for at, one in enumerate(encodings) if one.overflowing or counts[at] > most]
            if long:
                raise QLIPError(f"text {long[0]} has more than {most} tokens; shorten it, or allow truncation")
        if padding != "max_length" and len(ids):
            if not padding and len(set(counts.clamp_max(most).tolist())) > 1:
                raise QLIPError("texts of several lengths are no tensor without padding; give padding=True")
            most = min(most, int(counts.max()))
        ids[counts > most, most - 1] = self.eos
        return ids[:, :most], mask[:, :most]

    def _cleaned(self, text: object, number: int) -> str:
        if not isinstance(text, str):
            raise QLIPError(f"text {number} is {text!r:.40}, not a string")
        if self.unescape_html:
            text = _unescaped(text)
        return encodable(text)

    def unread(self, text: str, cut: bool = False) -> str | None:
        """Why a text, or a part of it, cannot be read as captions are: strange letters, or its length; None if it can.

        A character of several bytes is known if a token, which was merged from training captions, holds it whole.

        Args:
            text: one text.
            cut: the end of a long text may be cut off.
        """
        text = self._cleaned(text, 0)
        strange = sorted({letter for letter in text.lower() if not letter.isspace()} - self._letters)
        if strange:
            return f"the captions of this vocabulary have no {' '.join(strange[:8])}; write it in their language"
        if not cut and self.tokenizer.encode(text).overflowing:
            return f"longer than the {self.length - 2} word pieces that are read; shorten it"
        return None

    @cached_property
    def _letters(self) -> set[str]:
        ids = self.tokenizer.get_vocab().values()
        return {letter for one in ids for letter in self.tokenizer.decode([one])} - {"\N{REPLACEMENT CHARACTER}"}

    def decode(self, input_ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return str(self.tokenizer.decode(list(input_ids), skip_special_tokens=True)).strip()

    # ---------------------------------------------------------------- files

    @classmethod
    def from_folder(cls, folder: Path, length: int) -> CLIPTokenizer | None:
        """Read ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``; None if the folder has neither.

        Raises:
            QLIPError: a file that cannot be read as its name says.
        """
        pad_token, unescape = _settings(folder)
        whole, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
        if vocab.is_file() and merges.is_file():
            return cls(_clip_bpe(*_read_bpe(vocab, merges)), length, pad_token, unescape)
        if whole.is_file():
            try:
                return cls(Tokenizer.from_file(str(whole)), length, pad_token, unescape)
            except QLIPError:
                raise
            except Exception as error:  # noqa: BLE001 (the library raises bare Exception for every fault)
                raise QLIPError(f"{whole}: not a tokenizer ({error}); fetch it again") from None
        return None

    @classmethod
    def from_merges(cls, path: Path, vocab_size: int, length: int) -> CLIPTokenizer:
        """Build CLIP's vocabulary from its file of merges (arXiv 2103.00020).

        The ids are the 256 bytes, the bytes that end a word, one per merge, and the two special tokens. The file's
        first line is its version; merges beyond the vocabulary's size are not used.

        Args:
            path: ``bpe_simple_vocab_16e6.txt.gz``, or the same file unpacked.
            vocab_size: 49,408 for CLIP's text towers.
            length: positions of the text tower.

        Raises:
            QLIPError: no such file, not such a file, or too few merges for the size.
        """
        try:
            data = path.read_bytes()
            lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8").split("\n")[1:]
        except FileNotFoundError:
            raise QLIPError(f"{path}: no such file; CLIP's merges are in bpe_simple_vocab_16e6.txt.gz") from None
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise QLIPError(f"{path}: not a list of merges ({type(error).__name__}); fetch it again") from None
        base = _byte_tokens()
        pairs = [line.split(" ") for line in lines if line][: max(0, vocab_size - len(base) - 2)]
        if len(base) + len(pairs) + 2 != vocab_size or any(len(pair) != 2 for pair in pairs):
            raise QLIPError(f"{path}: not the merges of a vocabulary of {vocab_size}; the text tower needs its own")
        merges = [(left, right) for left, right in pairs]
        tokens = [*base, *(left + right for left, right in merges), BOS, EOS]
        if unknown := {token for pair in merges for token in pair} - set(tokens):
            raise QLIPError(f"{path}: merges {min(unknown)!r}, which is not in the vocabulary; fetch it again")
        vocab = {token: index for index, token in enumerate(tokens)}
        return cls(_clip_bpe(vocab, merges), length, unescape_html=True)

    def save(self, folder: Path) -> None:
        """Write ``vocab.json``, ``merges.txt``, ``tokenizer.json`` and ``tokenizer_config.json``."""
        model = json.loads(self.tokenizer.to_str())["model"]
        vocab = dict(sorted(self.tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]))
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        write_text(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False, indent=0) + "\n")
        write_text(folder / "merges.txt", "#version: 0.2\n" + "\n".join(pairs) + "\n")
        write_text(folder / "tokenizer.json", self.tokenizer.to_str() + "\n")
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": BOS,
            "eos_token": EOS,
            "unk_token": EOS,
            "pad_token": self.pad_token,
            "model_max_length": self.length,
            "unescape_html": self.unescape_html,
        }
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, length: int) -> CLIPTokenizer:
        """Learn merges from captions. Ids are in CLIP's order: bytes, bytes that end a word, merges, special tokens.

        Every byte is in the vocabulary, also if no caption has it, so that no text is unknown.

        Args:
            captions: texts, repeated as often as they should count.
            vocab_size: largest number of ids, at least 514; fewer result if the captions have fewer pairs.
            length: positions of the text tower.
        """
        if vocab_size < 514:
            raise QLIPError(f"vocab_size {vocab_size} is too small: 512 bytes and 2 special tokens come first")
        base = _byte_tokens()
        learner = _clip_bpe({BOS: 0, EOS: 1}, [])
        # the library numbers tokens that end a word in the order of a hash map, and their numbers decide between pairs
        # of equal count; given as special tokens they have the same numbers in every process
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=base[:256],
            special_tokens=base[256:],
            end_of_word_suffix=WORD_END,
            show_progress=False,
        )
        learner.train_from_iterator((encodable(_unescaped(caption)) for caption in captions), trainer)
        learned = json.loads(learner.to_str())["model"]["merges"]
        merges = [(pair[0], pair[1]) for pair in learned][: vocab_size - len(base) - 2]
        tokens = [*base, *dict.fromkeys(left + right for left, right in merges), BOS, EOS]
        vocab = {token: index for index, token in enumerate(tokens)}
        return cls(_clip_bpe(vocab, merges), length, unescape_html=True)


def _unescaped(text: str) -> str:
    return html.unescape(html.unescape(text))  # captions of web pages are often escaped twice


def _byte_tokens() -> list[str]:
    """The 256 bytes, and the 256 bytes that end a word, in CLIP's order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*alphabet, *(symbol + WORD_END for symbol in alphabet)]


def _clip_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=WORD_END, unk_token=EOS))
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(WORD_END, " ")])
    return tokenizer


def _read_bpe(vocab: Path, merges: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    try:
        table = json.loads(vocab.read_text(encoding="utf-8"))
        if not isinstance(table, dict) or not all(isinstance(index, int) for index in table.values()):
            raise ValueError("not a table of ids")
    except (ValueError, OSError) as error:
        raise QLIPError(f"{vocab}: not a vocabulary ({error}); fetch it again") from None
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        learned = [(left, right) for left, right in pairs]
    except (ValueError, OSError) as error:
        raise QLIPError(f"{merges}: not a list of merges, two symbols per line ({error}); fetch it again") from None
    for left, right in learned:
        if not {left, right, left + right} <= table.keys():
            raise QLIPError(
                f"{merges}: {left!r}, {right!r} or their concatenation is not in {vocab.name}; fetch both again"
            )
    return table, learned


def _settings(folder: Path) -> tuple[str, bool]:
    """Padding token, and whether HTML entities are unescaped."""
    pad_token, unescape = None, False
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if path.is_file():
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
                token = values.get("pad_token")
            except (ValueError, AttributeError) as error:
                raise QLIPError(f"{path}: not JSON ({error}); fetch it again") from None
            unescape = unescape or values.get("unescape_html") is True
            token = token.get("content") if isinstance(token, dict) else token
            pad_token = pad_token or (token if isinstance(token, str) else None)
    return pad_token or EOS, unescape
