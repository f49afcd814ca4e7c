"""Record of the captions and labels that a text tower was trained with: tells seen class names from unseen ones.

`training_text.json` lies beside a checkpoint's weights. It holds no text, but a 32-bit hash of every phrase of one to
five adjacent words, without regard to case and punctuation. A name was seen if its words occur in this order in a
caption or label; of a longer name, if all its phrases of five words do. A wrong "seen" by equal hashes is rarer than
one in 4,000. The comparison is literal: `tabby cat` counts as unseen after training with `cat`, and so do synonyms,
plurals and translations.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from qlip.errors import QLIPError, validate_json
from qlip.files import write_text
from qlip.modeling.checkpoint import resolve

RECORD = "training_text.json"
MAX_WORDS = 5
MAX_PHRASES = 1_000_000
"""The longest phrases are left out of a record of more than this, about 4 MB; longer names are then judged by the
phrases that are left, which finds more of them seen, never fewer."""
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
Hashes = np.ndarray[tuple[int], np.dtype[np.uint32]]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")
    version: int = 1
    sources: list[str]
    complete: bool
    phrases: list[str]
    """Per length, base64 of zlib of little-endian 32-bit differences between sorted hashes."""


@dataclass(frozen=True)
class TrainingText:
    """Phrases of the captions and labels of a training.

    Attributes:
        sources: names of the sources that were read.
        complete: no other text was used; if False, a name that does not occur may have been seen all the same.
        phrases: sorted hashes of the phrases of one word, of two words, and so on.
    """

    sources: tuple[str, ...]
    complete: bool
    phrases: tuple[Hashes, ...]

    @classmethod
    def of(cls, texts: Iterable[str], sources: Iterable[str] = (), complete: bool = True) -> TrainingText:
        """Make the record of texts."""
        found: list[set[str]] = [set() for _ in range(MAX_WORDS)]
        for text in texts:
            words = words_of(text)
            for length, phrases in enumerate(found, start=1):
                phrases.update(_phrases(words, length))
        return cls(tuple(sources), complete, _within_limit([_hashes(phrases) for phrases in found]))

    def merged(self, other: TrainingText) -> TrainingText:
        """Return the record of both trainings, one of which started from the other's weights."""
        sources = tuple(dict.fromkeys((*self.sources, *other.sources)))
        both = [np.union1d(one, two) for one, two in zip(self.phrases, other.phrases, strict=False)]
        return TrainingText(sources, self.complete and other.complete, _within_limit(both))

    def knows(self, name: str) -> bool | None:
        """Return whether training saw a class name; None if that is unknown, or the name has no letter or digit."""
        words = words_of(name)
        length = min(len(words), len(self.phrases))
        if not length:
            return None
        seen = bool(np.isin(_hashes(_phrases(words, length)), self.phrases[length - 1]).all())
        return True if seen else False if self.complete else None

    def save(self, folder: Path) -> None:
        """Write the record into a checkpoint's folder."""
        steps = [np.diff(one, prepend=np.uint32(0)).astype("<u4").tobytes() for one in self.phrases]
        encoded = [base64.b64encode(zlib.compress(one, 9)).decode() for one in steps]
        record = _Record(sources=list(self.sources), complete=self.complete, phrases=encoded)
        write_text(folder / RECORD, record.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, checkpoint: str | Path) -> TrainingText:
        """Read the record of a checkpoint: a folder, a Hub id or "bundled"; `UNKNOWN` if it has none.

        Raises:
            QLIPError: no such checkpoint, or a damaged record.
        """
        path = resolve(checkpoint) / RECORD
        if not path.is_file():
            return UNKNOWN
        record = validate_json(_Record, path.read_bytes(), str(path), remedy="fetch it again", of="this record")
        try:
            steps = [np.frombuffer(zlib.decompress(base64.b64decode(one)), "<u4") for one in record.phrases]
        except (ValueError, zlib.error):
            raise QLIPError(f"{path}: its phrases are damaged; fetch it again") from None
        return cls(tuple(record.sources), record.complete, tuple(np.cumsum(one, dtype=np.uint32) for one in steps))


UNKNOWN = TrainingText((), False, tuple(np.empty(0, np.uint32) for _ in range(MAX_WORDS)))
"""Record of a model about whose training nothing is known."""


def words_of(text: str) -> list[str]:
    """Words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def _phrases(words: list[str], length: int) -> set[str]:
    return {" ".join(words[start : start + length]) for start in range(len(words) - length + 1)}


def _hashes(phrases: Iterable[str]) -> Hashes:
    digests = (hashlib.blake2b(phrase.encode(), digest_size=4).digest() for phrase in phrases)
    return np.unique(np.frombuffer(b"".join(digests), "<u4").astype(np.uint32))


def _within_limit(phrases: list[Hashes]) -> tuple[Hashes, ...]:
    while len(phrases) > 1 and sum(map(len, phrases)) > MAX_PHRASES:
        phrases = phrases[:-1]
    return tuple(phrases)
