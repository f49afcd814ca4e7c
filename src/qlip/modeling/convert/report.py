"""The report of a conversion: what became of every tensor, as a list of `Row`s and as a short table of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Any, Literal

Status = Literal["mapped", "resampled", "fresh", "dropped"]
STATUSES: tuple[Status, ...] = ("mapped", "resampled", "fresh", "dropped")

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_LEAF = re.compile(r"\.(weight|bias)$")
_MOST_NAMES = 3


@dataclass(frozen=True)
class Row:
    """Fate of one tensor. Each key of a source, and each parameter of the result, is in exactly one row.

    Attributes:
        status: ``mapped`` (unchanged, split or transposed), ``resampled``, ``fresh`` (random, or a neutral value), or
            ``dropped``.
        file: the source as the caller named it; None for fresh parameters.
        source_keys: names in that file.
        target_keys: parameters of the QLIP.
        how: the operation, or the reason.
    """

    status: Status
    file: str | None
    source_keys: tuple[str, ...]
    target_keys: tuple[str, ...]
    how: str = ""


@dataclass(frozen=True)
class Recognised:
    """The format that a source was recognised as.

    Attributes:
        part: ``vision`` or ``text``.
        file: the source as the caller named it.
        layout: name of the format, with variant, prefix and wrapping.
    """

    part: str
    file: str
    layout: str


@dataclass
class Report:
    """Everything that a conversion did.

    Attributes:
        sources: one per tower.
        rows: every source key and every parameter, once.
        notes: assumptions, changed settings, and where the result computes something else than its source; a line each.
    """

    sources: list[Recognised] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Number of tensors by status: source keys if dropped, parameters of the QLIP otherwise."""
        return {status: sum(_number(row) for row in self.rows if row.status == status) for status in STATUSES}

    def to_dict(self) -> dict[str, Any]:
        """The whole report, for JSON."""
        return asdict(self) | {"counts": self.counts()}

    def table(self) -> list[dict[str, str]]:
        """Rows of ``status``, ``source``, ``target``, ``tensors`` and ``how``.

        All layers share a row, and so does everything that is fresh or dropped for one reason.
        """
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            merged = row.status in ("fresh", "dropped")
            names = () if merged else (*_leaves(row.source_keys), "->", *_leaves(row.target_keys))
            groups.setdefault((STATUSES.index(row.status), row.file, row.how, *names), []).append(row)
        return [_summary(rows) for _, rows in sorted(groups.items(), key=lambda group: group[0][0])]


def _number(row: Row) -> int:
    return len(row.target_keys or row.source_keys)


def _summary(rows: list[Row]) -> dict[str, str]:
    source = _names(key for row in rows for key in row.source_keys)
    file = "" if rows[0].file is None or not source else f"{PurePath(rows[0].file).name}: "
    return {
        "status": rows[0].status,
        "source": file + source,
        "target": _names(key for row in rows for key in row.target_keys),
        "tensors": str(sum(map(_number, rows))),
        "how": rows[0].how,
    }


def _leaves(keys: Iterable[str]) -> dict[str, list[str]]:
    """Names with ``*`` for the layer and without weight or bias; which of the two each has."""
    leaves: dict[str, list[str]] = {}
    for key in dict.fromkeys(_LAYER.sub("*", key) for key in keys):
        leaves.setdefault(_LEAF.sub("", key), []).extend(_LEAF.findall(key))
    return leaves


def _names(keys: Iterable[str]) -> str:
    """A few names in full, such as ``blocks.*.norm1.{weight,bias}``; many by their beginnings."""
    leaves = _leaves(keys)
    if len(leaves) <= _MOST_NAMES:
        ends = ("", ".{0}", ".{{{1},{0}}}")
        return ", ".join(stem + ends[len(some)].format(*sorted(some)) for stem, some in leaves.items())
    for depth in (2, 1):
        beginnings = list(dict.fromkeys(".".join(stem.split(".")[:depth]) for stem in leaves))
        if len(beginnings) <= _MOST_NAMES:
            break
    shown = [name if name in leaves and not leaves[name] else f"{name}.*" for name in beginnings]
    return ", ".join([*shown[: _MOST_NAMES + 1], *(["..."] if len(shown) > _MOST_NAMES + 1 else [])])
