"""Class names that occur in the training captions; accuracy on those is prompt accuracy, not zero-shot.

A class was seen if its name occurs, as whole words, in a label or a caption of the training sources. If these are not
known, no metric is called zero-shot.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml

from qlip import assets
from qlip.data.public import DATASETS, cache_folder, open_named, read_manifest
from qlip.data.sources.base import CaptionedImages
from qlip.data.sources.open import open_path
from qlip.errors import QLIPError
from qlip.evaluation.models.base import EvalModel, QLIPEvalModel
from qlip.files import write_text
from qlip.modeling import QLIPModel, QLIPProcessor

BUNDLED_SOURCES = ("cifar10:train", "emoji:train", "clipart:train")
"""Sets whose words the bundled model was trained on (its card; `recipes/nano/stage1.yaml`)."""
RECORD = "training_data.json"
"""Beside a checkpoint's weights: ``{"sources": ["SET:SPLIT or PATH", ...], "complete": true}``."""
MOST = 200_000
"""Most images of a source that is scanned; a larger one leaves open which classes it named."""
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


@dataclass(frozen=True)
class SeenClasses:
    """Classes whose names occur in the training captions.

    Attributes:
        named: those of the classes asked about that stand in the training's words.
        complete: the others stand nowhere in them; False where not all of the words could be looked through.
        sources: what was looked through, in words.
    """

    named: frozenset[str]
    complete: bool
    sources: str

    def knows(self, name: str) -> bool | None:
        """Return whether training saw a class name; None if unknown."""
        return True if name in self.named else False if self.complete else None


UNKNOWN = SeenClasses(frozenset(), False, "nothing")


def seen_classes_of(model: EvalModel, names: Sequence[str], sources: Sequence[str] | None = None) -> SeenClasses:
    """Find the classes whose names occur in a model's training captions.

    Args:
        model: under test.
        names: of classes, as prompts say them.
        sources: public sets such as ``cifar10:train``, or paths, whose words training used, all of them; None looks
            whether the model is the bundled model, of which that is known.
    """
    if sources is None:
        if not _is_bundled(model):
            return UNKNOWN
        sources = BUNDLED_SOURCES
    return _looked_through(tuple(sources), tuple(names))


def training_sources(model: str) -> list[str] | None:
    """Training sources of a model by its name or folder; None if unknown; see :func:`sources_of`."""
    if model in ("bundled", assets.BUNDLED):
        return list(BUNDLED_SOURCES)
    return sources_of(Path(model)) if Path(model).is_dir() else None


def write_training_sources(checkpoint: Path, sources: Sequence[str]) -> None:
    """Write beside a checkpoint's weights that its training used the words of these sources, and no others."""
    write_text(checkpoint / RECORD, json.dumps({"sources": list(sources), "complete": True}, indent=1) + "\n")


def sources_of(checkpoint: Path) -> list[str] | None:
    """Read the training sources of a checkpoint's folder, for :func:`seen_classes_of`.

    That is `RECORD` in the folder, else the recipe of the run that the folder lies in.

    Returns:
        Sources; None where nothing is said, or what is said is not all.

    Raises:
        QLIPError: a record that cannot be read.
    """
    record = checkpoint / RECORD
    if record.is_file():
        said = _load(record, json.loads)
        sources = said.get("sources")
        if not isinstance(sources, list) or not all(isinstance(one, str) for one in sources):
            raise QLIPError(f'{record}: should hold {{"sources": ["SET:SPLIT or PATH", ...], "complete": true}}')
        return sources if said.get("complete") is True else None
    recipe = checkpoint.parent / "recipe.yaml"
    if not recipe.is_file():
        return None
    said = _load(recipe, yaml.safe_load)
    init = said.get("model", {}).get("init")
    earlier = [] if init is None else training_sources(str(init))
    found = [one for one in said.get("data", {}).get("sources", []) if one.get("captions", True)]
    if any(one.get("caption_field") for one in found):
        return None  # words of a field that is not looked through
    own = [str(one.get("name") or one.get("path")) for one in found]
    return None if earlier is None else list(dict.fromkeys([*earlier, *own]))


def _load(path: Path, parse: Any) -> dict[str, Any]:
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise QLIPError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict):
        raise QLIPError(f"{path}: holds no object")
    return found


@lru_cache(maxsize=8)
def _looked_through(sources: tuple[str, ...], names: tuple[str, ...]) -> SeenClasses:
    left = {phrase_of(name) for name in names}
    complete, seen = True, []
    for source in sources:
        texts = _words_of(source)
        if texts is None:
            complete = False
            continue
        seen.append(source)
        left -= phrases_in(texts, left)
        if not left:
            break
    named = frozenset(name for name in names if phrase_of(name) not in left)
    return SeenClasses(named, complete, ", ".join(seen) or "nothing")


@lru_cache(maxsize=8)
def _words_of(source: str) -> tuple[str, ...] | None:
    """All different words of a source; those of a public set are looked for once on a machine. None: not to be had."""
    set_name, _, split = source.partition(":")
    try:
        images = open_named(source) if set_name in DATASETS else open_path(source)
    except QLIPError:
        return None  # not on this machine
    if len(images) > MOST:
        return None
    manifest = read_manifest(set_name) if set_name in DATASETS else None
    if manifest is None:
        return tuple(texts_of(images))
    digest = hashlib.sha256(json.dumps(manifest["splits"][split], sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "training_texts" / f"{set_name}-{split}-{digest[:16]}.json"
    with suppress(OSError, ValueError):
        return tuple(json.loads(path.read_text(encoding="utf-8")))
    texts = tuple(texts_of(images))
    with suppress(QLIPError):  # a cache that cannot be written costs time, nothing else
        write_text(path, json.dumps(texts))
    return texts


def texts_of(images: CaptionedImages) -> Iterator[str]:
    """All different labels and captions of a source."""
    seen: set[str] = set()
    for index in range(len(images)):
        try:
            raw = images.read(index)
        except QLIPError:
            continue  # broken for training too
        for text in (raw.label, *raw.captions):
            if text is not None and text not in seen:
                seen.add(text)
                yield text


def phrases_in(texts: Iterable[str], wanted: Iterable[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Return the phrases that occur in the texts as whole adjacent words, in any case."""
    left = set(wanted)
    longest = max((len(phrase) for phrase in left), default=0)
    found: set[tuple[str, ...]] = set()
    for text in texts:
        words = phrase_of(text)
        for start in range(len(words)):
            for stop in range(start + 1, min(start + longest, len(words)) + 1):
                if words[start:stop] in left:
                    found.add(words[start:stop])
    return found


def phrase_of(text: str) -> tuple[str, ...]:
    """A text's words in lower case, signs left out."""
    return tuple(_WORD.findall(text.lower()))


def _is_bundled(model: EvalModel) -> bool:
    return isinstance(model, QLIPEvalModel) and model.cacheable and model.fingerprint == _bundled_fingerprint()


@cache
def _bundled_fingerprint() -> str:
    model, processor = QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled")
    return QLIPEvalModel(model, processor, assets.BUNDLED).fingerprint
