"""Documents of texts and images in JSON Lines: each line is a list of texts and of references to images.

    ["Two birds.", {"image": "birds.jpg"}, "They left:", {"image": "sky.jpg"}]

A reference is the key of an image in a token dataset, or the path of a file in a folder.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

from qlip.files import encodable
from qlip.um3.data.documents import DocumentBuilder
from qlip.um3.data.stored import IMAGE
from qlip.um3.data.texts import Broken, files_of, json_lines

SUFFIXES = (".jsonl",)


def read_interleaved(
    file: str, images: Container[str], builder: DocumentBuilder
) -> Iterator[tuple[list[int], list[str]] | Broken]:
    """Iterate over the documents of a file as `qlip.um3.data.stored.store` takes them.

    Args:
        file: path or address.
        images: names of images that exist.
        builder: makes ids of texts.

    Raises:
        QLIPError: a file cannot be read.
    """
    for where, item in json_lines(file):
        if isinstance(item, Broken):
            yield item
        elif (fault := _fault(item, images)) is not None:
            yield Broken(where, f"{where}: {fault}")
        else:
            yield _document(item, builder)


def texts_of(pattern: str) -> Iterator[str]:
    """Iterate over the texts of the documents that are well-formed, to train a vocabulary on."""
    for file in files_of(pattern, SUFFIXES):
        for _, item in json_lines(file):
            if isinstance(item, list):
                yield from (one for one in item if isinstance(one, str) and one and encodable(one) == one)


def _fault(item: Any, images: Container[str]) -> str | None:
    """Say why a line is no document, or None."""
    if not isinstance(item, list):
        return 'not a list of texts and {"image": ...}'
    for one in item:
        reference = isinstance(one, dict) and list(one) == ["image"]
        text = one["image"] if reference else one
        if not isinstance(text, str):
            return f'{str(one)[:70]} is neither a text nor {{"image": ...}}'
        if encodable(text) != text:
            return "a text has half a surrogate pair"
        if reference and text not in images:
            return f"there is no image {text!r}"
    if not any(isinstance(one, dict) or one.strip() for one in item):
        return "the document is empty"
    return None


def _document(item: list[Any], builder: DocumentBuilder) -> tuple[list[int], list[str]]:
    """Ids of a document, with numbers from `IMAGE` down for its images, and their names."""
    ids, names, text = list(builder.first), list[str](), ""
    for one in [*item, None]:
        if isinstance(one, str):
            text += one
            continue
        if text:
            ids += builder.tokenizer.encode(text, first=not names, after_token=bool(names))
            text = ""
        if one is not None:
            ids.append(IMAGE - len(names))
            names.append(one["image"])
    return [*ids, builder.tokenizer.eos], names
