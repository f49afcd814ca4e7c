"""Classes of a labelled set: how its files call them, and what a prompt calls them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qlip import assets
from qlip.errors import QLIPError, nearest

CLASSES = ("imagenet",)
"""Class tables in the package: ImageNet-1k's 1,000 ids and OpenAI's names for them."""


@dataclass(frozen=True)
class ClassTable:
    """Classes in order.

    Attributes:
        source: where they come from, as errors and results call it.
        labels: what the set's files say, all different.
        names: what prompts say, one a label.
    """

    source: str
    labels: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def from_labels(cls, labels: Iterable[str]) -> ClassTable:
        """The different labels of a set, sorted, each its own name."""
        found = tuple(sorted(set(labels)))
        return cls("the set's own labels", found, found)

    def index_of(self) -> dict[str, int]:
        """Position of every label."""
        return {label: number for number, label in enumerate(self.labels)}

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.labels)

    def label_of(self, value: int | str, where: str) -> str:
        """The label that a set's files mean by a name, or by a number from 0 on.

        Args:
            value: as the files have it.
            where: it stands, as errors say it.

        Raises:
            QLIPError: a number outside of the table, or a name that it has not.
        """
        if isinstance(value, int):
            if not 0 <= value < len(self):
                raise QLIPError(
                    f"{where}: class {value} of {self.source}'s {len(self):,}; numbers run from 0 in the order of its"
                    " lines (those of ImageNet's development kit run from 1 in another order: use its WordNet ids)"
                )
            return self.labels[value]
        if value not in self._known:
            raise QLIPError(f"{where}: {value!r} is no class of {self.source}{nearest(value, self.labels)}")
        return value

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of its lines."""
        lines = "".join(f"{label}\t{name}\n" for label, name in zip(self.labels, self.names, strict=True))
        return hashlib.sha256(lines.encode()).hexdigest()

    def described(self) -> dict[str, object]:
        """For a result: where it is from, how many, and its digest."""
        return {"source": self.source, "count": len(self), "sha256": self.digest}

    def shared_names(self) -> dict[str, tuple[str, ...]]:
        """Names that several labels have, which no prompt can tell apart."""
        by_name: dict[str, list[str]] = {}
        for label, name in zip(self.labels, self.names, strict=True):
            by_name.setdefault(name, []).append(label)
        return {name: tuple(labels) for name, labels in by_name.items() if len(labels) > 1}

    def check_holds(self, labels: Iterable[str]) -> None:
        """Refuse labels that the table does not have.

        Args:
            labels: of a set; may repeat.

        Raises:
            QLIPError: fewer classes than labels, or an unknown label.
        """
        wanted = dict.fromkeys(labels)
        unknown = next((label for label in wanted if label not in self._known), None)
        if unknown is None:
            return
        if len(self) < len(wanted):
            raise QLIPError(
                f"{self.source}: {len(self):,} classes for a set of {len(wanted):,} labels, {unknown!r} is missing;"
                " write one class a line, or LABEL<tab>NAME where prompts should say something else"
            )
        raise QLIPError(
            f"{self.source}: has no class {unknown!r}{nearest(unknown, self.labels)}, which pictures of the set carry;"
            " write one class a line, or LABEL<tab>NAME where prompts should say something else"
        )


def load_classes(name: str) -> ClassTable:
    """A table of the package (`CLASSES`) or of a UTF-8 text file: a class a line, ``LABEL`` or ``LABEL<tab>NAME``.

    Raises:
        QLIPError: neither a table of ours nor a file, nothing in it, a label or a name twice.
    """
    path = assets.path("classes", f"{name}.tsv") if name in CLASSES else Path(name)
    if not path.is_file():
        raise QLIPError(f"classes {name!r}: neither {' nor '.join(map(repr, CLASSES))} nor a text file")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise QLIPError(f"{name}: not UTF-8 text; save it as UTF-8") from None
    table: dict[str, str] = {}
    labels_at: dict[str, int] = {}
    names_at: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        label, _, said = (part.strip() for part in line.partition("\t"))
        said = said or label
        if not label:
            raise QLIPError(f"{name}: line {number} has a name and no label; write LABEL<tab>NAME")
        _refuse_twice(name, labels_at, label, number)
        if name not in CLASSES:  # ImageNet's own have two such pairs, which a result names
            _refuse_twice(name, names_at, said, number)
        table[label] = said
    if len(table) < 2:
        raise QLIPError(f"{name}: {len(table)} classes; naming pictures needs two or more, one a line")
    return ClassTable(name, tuple(table), tuple(table.values()))


def _refuse_twice(source: str, seen: dict[str, int], text: str, number: int) -> None:
    first = seen.setdefault(text, number)
    if first != number:
        raise QLIPError(f"{source}: lines {first} and {number} both say {text!r}; a class is there once")
