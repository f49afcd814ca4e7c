"""Classes of a labelled dataset: their labels in its files, and their names in prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qlip import assets
from qlip.errors import QLIPError, nearest
from qlip.files import read_lines

CLASSES = ("imagenet",)
"""Class tables in the package: ImageNet-1k's 1,000 WordNet ids with OpenAI's names."""


@dataclass(frozen=True)
class ClassTable:
    """Classes in order.

    Attributes:
        source: origin, for errors and results.
        labels: labels in the dataset's files, all different.
        names: names in prompts, one per label.
    """

    source: str
    labels: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def from_labels(cls, labels: Iterable[str]) -> ClassTable:
        """Make a table of a dataset's labels, sorted, each its own name."""
        found = tuple(sorted(set(labels)))
        return cls("the set's own labels", found, found)

    def index_of(self) -> dict[str, int]:
        """Position of every label."""
        return {label: number for number, label in enumerate(self.labels)}

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.labels)

    def label_of(self, value: int | str, where: str) -> str:
        """The label for a name or a number (from 0 on) in a dataset's files.

        Args:
            value: name or number.
            where: its place, for errors.

        Raises:
            QLIPError: a number outside the table, or a name that is not in it.
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
        """Source, number of classes and digest, for a result."""
        return {"source": self.source, "count": len(self), "sha256": self.digest}

    def shared_names(self) -> dict[str, tuple[str, ...]]:
        """Names of several labels, which no prompt can tell apart, with these labels."""
        by_name: dict[str, list[str]] = {}
        for label, name in zip(self.labels, self.names, strict=True):
            by_name.setdefault(name, []).append(label)
        return {name: tuple(labels) for name, labels in by_name.items() if len(labels) > 1}

    def check_holds(self, labels: Iterable[str]) -> None:
        """Refuse labels that the table does not have.

        Args:
            labels: of a dataset; may repeat.

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
                " write one class per line, or LABEL<tab>NAME where prompts should say something else"
            )
        raise QLIPError(
            f"{self.source}: has no class {unknown!r}{nearest(unknown, self.labels)}, which images of the set carry;"
            " write one class per line, or LABEL<tab>NAME where prompts should say something else"
        )


def load_classes(name: str) -> ClassTable:
    """Read a packaged table (`CLASSES`) or a UTF-8 text file with a line per class, ``LABEL`` or ``LABEL<tab>NAME``.

    Raises:
        QLIPError: neither a packaged table nor a file, fewer than two classes, a label or a name twice.
    """
    path = assets.path("classes", f"{name}.tsv") if name in CLASSES else Path(name)
    if not path.is_file():
        raise QLIPError(f"classes {name!r}: neither {' nor '.join(map(repr, CLASSES))} nor a text file")
    table: dict[str, str] = {}
    labels_at: dict[str, int] = {}
    names_at: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        label, _, prompt = (part.strip() for part in line.partition("\t"))
        prompt = prompt or label
        if not label:
            raise QLIPError(f"{name}: line {number} has a name and no label; write LABEL<tab>NAME")
        _refuse_twice(name, labels_at, label, number)
        if name not in CLASSES:  # ImageNet's own have two such pairs, which a result names
            _refuse_twice(name, names_at, prompt, number)
        table[label] = prompt
    if len(table) < 2:
        raise QLIPError(f"{name}: {len(table)} classes; classification needs two or more, one per line")
    return ClassTable(name, tuple(table), tuple(table.values()))


def _refuse_twice(source: str, seen: dict[str, int], text: str, number: int) -> None:
    first = seen.setdefault(text, number)
    if first != number:
        raise QLIPError(f"{source}: lines {first} and {number} both hold {text!r}; write each class once")
