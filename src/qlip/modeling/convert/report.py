"""What became of every tensor: the conversion's account, whole and in the short form that is printed."""

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


@dataclass(frozen=True)
class Row:
    """One entry of the account. A source's key, and a parameter of the result, is in exactly one row.

    Attributes:
        status: ``mapped`` (as it is, or split or transposed), ``resampled``, ``fresh`` (random, or a neutral value), or
            ``dropped``.
        file: the source, as it was named; None for fresh parameters.
        source_keys: of that file.
        target_keys: parameters of the QLIP.
        how: what was done, or the reason.
    """

    status: Status
    file: str | None
    source_keys: tuple[str, ...]
    target_keys: tuple[str, ...]
    how: str = ""


@dataclass(frozen=True)
class Recognised:
    """What a source was taken for.

    Attributes:
        part: ``vision`` or ``text``.
        file: the source, as it was named.
        layout: in words.
    """

    part: str
    file: str
    layout: str


@dataclass
class Report:
    """The account of a conversion.

    Attributes:
        sources: what each source was taken for.
        rows: every source key and every parameter, once.
        notes: what was assumed or set, and where the result computes something else than its source; a line each.
    """

    sources: list[Recognised] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Tensors by status: source keys where they were dropped, parameters of the QLIP otherwise."""
        return {
            status: sum(
                len(row.source_keys if status == "dropped" else row.target_keys)
                for row in self.rows
                if row.status == status
            )
            for status in STATUSES
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self) | {"counts": self.counts()}

    def table(self) -> list[dict[str, str]]:
        """A short form: layers together; what is fresh or dropped for one reason together.

        Returns:
            Rows of ``status``, ``source``, ``target``, ``tensors`` and ``how``.
        """
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            merged = row.status in ("fresh", "dropped")
            names = () if merged else (_stems(row.source_keys), _stems(row.target_keys))
            groups.setdefault((STATUSES.index(row.status), row.file, row.how, *names), []).append(row)
        by_status = sorted(groups.values(), key=lambda rows: STATUSES.index(rows[0].status))
        return [_together(rows) for rows in by_status]


def _together(rows: list[Row]) -> dict[str, str]:
    status, file = rows[0].status, rows[0].file
    sources = [key for row in rows for key in row.source_keys]
    targets = [key for row in rows for key in row.target_keys]
    prefix = "" if file is None else f"{PurePath(file).name}: "
    return {
        "status": status,
        "source": prefix + _named(sources) if sources else "",
        "target": _named(targets),
        "tensors": str(len(targets) or len(sources)),
        "how": rows[0].how,
    }


def _patterns(keys: Iterable[str]) -> tuple[str, ...]:
    """Names with ``*`` for the layer, once each."""
    return tuple(dict.fromkeys(_LAYER.sub("*", key) for key in keys))


def _stems(keys: Iterable[str]) -> tuple[str, ...]:
    """Patterns without weight and bias, once each."""
    return tuple(dict.fromkeys(_LEAF.sub("", pattern) for pattern in _patterns(keys)))


def _named(keys: list[str]) -> str:
    """A few patterns in full, many by what they begin with."""
    patterns, stems = _patterns(keys), _stems(keys)
    if len(stems) <= 3:
        leaves = [[found[1] for p in patterns if (found := _LEAF.fullmatch(p.removeprefix(stem)))] for stem in stems]
        ends = (
            "" if not some else f".{some[0]}" if len(some) == 1 else f".{{{','.join(sorted(some, reverse=True))}}}"
            for some in leaves
        )
        return ", ".join(stem + end for stem, end in zip(stems, ends, strict=True))
    beginnings = tuple(dict.fromkeys(".".join(stem.split(".")[:2]) for stem in stems))
    if len(beginnings) > 3:
        beginnings = tuple(dict.fromkeys(stem.split(".")[0] for stem in stems))
    shown = ", ".join(name if name in patterns else f"{name}.*" for name in beginnings[:4])
    return shown + (", ..." if len(beginnings) > 4 else "")
