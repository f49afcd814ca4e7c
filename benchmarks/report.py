"""Benchmark results as Markdown: three tables, and the aims with those that were missed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.measure import machine, median

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
NAMES = {"encode": "encode", "decode": "decode", "forward": "full forward", "train": "train step"}


@dataclass
class Row:
    """Measurements of one operation of one case.

    Attributes:
        shape, group_size, operation: the case and the operation.
        seconds: all rounds of each implementation.
        peaks: peak memory of each implementation in bytes; empty if it was not measured.
        flops: floating-point operations of its matrix products.
        rate: the machine's fp32 matrix-multiply rate, measured between the rounds of this case.
    """

    shape: str
    group_size: int
    operation: str
    seconds: dict[str, list[float]]
    flops: float
    rate: float
    peaks: dict[str, int] = field(default_factory=dict)

    def speedup(self, contender: str = "qlip") -> float:
        """Return the ratio of the literal implementation's median time to this one's."""
        return median(self.seconds["literal"]) / median(self.seconds[contender])

    def share(self, contender: str = "qlip") -> float:
        """Return the share of the machine's matrix-multiply rate."""
        return self.flops / median(self.seconds[contender]) / self.rate

    def memory(self, contender: str = "qlip") -> float | None:
        """Return the peak memory relative to the literal implementation's; None if it was not measured."""
        return self.peaks[contender] / self.peaks["literal"] if self.peaks else None


@dataclass
class StackRow:
    """Times of the literal transformer stack and ``nn.TransformerEncoder`` of its size."""

    shape: str
    what: str
    seconds: dict[str, list[float]]


@dataclass
class Report:
    """All measurements of one run."""

    machine: str
    date: str
    rounds: int
    rows: list[Row] = field(default_factory=list)
    stacks: list[StackRow] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return all measurements, of every round, as JSON values."""
        return asdict(self)

    def add(self, earlier: dict[str, Any]) -> None:
        """Add the rows of an earlier run, from :meth:`as_json`, so that a long benchmark can run in parts.

        Raises:
            ValueError: the earlier run was on another machine or with other rounds.
        """
        for key in ("machine", "date", "rounds"):
            if earlier[key] != getattr(self, key):
                raise ValueError(f"the earlier results have another {key}: {earlier[key]}, not {getattr(self, key)}")
        self.rows += [Row(**row) for row in earlier["rows"]]
        self.stacks += [StackRow(**row) for row in earlier["stacks"]]

    def markdown(self) -> str:
        """Format the tables."""
        self.rows.sort(key=lambda row: (row.shape, row.group_size))
        rates = [row.rate for row in self.rows]
        lines = [
            f"{self.date}; {self.machine}.",
            f"Medians of {self.rounds} interleaved rounds after a warm-up. This machine multiplies fp32 matrices"
            f" at {min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f} GFLOP/s (2048 x 2048, measured between the rounds).",
            "",
            *self._speed(),
            "",
            *self._stacks(),
            "",
            *self._aims(),
        ]
        return "\n".join(lines) + "\n"

    def _speed(self) -> list[str]:
        lines = [
            "| shape | G | operation | literal, s | qlip, s | speed-up | of matmul rate | literal peak, GiB"
            " | qlip peak, GiB | peak ratio |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            for contender in [name for name in row.seconds if name != "literal"]:
                what = NAMES[row.operation] + contender.removeprefix("qlip")
                lines.append(
                    f"| {row.shape} | {row.group_size} | {what} | {median(row.seconds['literal']):.3f}"
                    f" | {median(row.seconds[contender]):.3f} | {row.speedup(contender):.2f}x"
                    f" | {row.share(contender):.2f} | {_gib(row, 'literal')} | {_gib(row, contender)}"
                    f" | {_times(row.memory(contender))} |"
                )
        return lines

    def _stacks(self) -> list[str]:
        names = list(self.stacks[0].seconds) if self.stacks else []
        lines = [
            "The transformer stack alone, in seconds:",
            "",
            "| shape | pass | " + " | ".join(names) + " |",
            "|---|---|" + "---|" * len(names),
        ]
        for row in self.stacks:
            cells = " | ".join(f"{median(row.seconds[name]):.3f}" for name in names)
            lines.append(f"| {row.shape} | {row.what} | {cells} |")
        return lines

    def _aims(self) -> list[str]:
        lines = ["| aim | measured | met |", "|---|---|---|"]
        for text, value, limit, at_least in self._measured_aims():
            met = "-" if value is None else "yes" if (value >= limit if at_least else value <= limit) else "**no**"
            lines.append(f"| {text} | {'-' if value is None else f'{value:.2f}'} | {met} |")
        return lines

    def _measured_aims(self) -> list[tuple[str, float | None, float, bool]]:
        found = {(row.shape, row.group_size, row.operation): row for row in self.rows}
        aims: list[tuple[str, float | None, float, bool]] = []

        def add(text: str, key: tuple[str, int, str], measure: Any, limit: float, at_least: bool = True) -> None:
            row = found.get(key)
            aims.append((text, None if row is None else measure(row), limit, at_least))

        for operation in ("encode", "decode"):
            key = ("B-16", 7, operation)
            add(f"B-16 {operation} at least 1.1x", key, Row.speedup, 1.1)
            add(f"B-16 {operation} at least 0.85 of the matmul rate", key, Row.share, 0.85)
        add("B-16 encode, G = 14, at least 1.4x", ("B-16", 14, "encode"), Row.speedup, 1.4)
        add("B-8 encode at least 1.4x", ("B-8", 7, "encode"), Row.speedup, 1.4)
        for shape in ("B-16", "B-8"):
            key = (shape, 14, "train")
            add(f"{shape} train step, G = 14, at least 1.3x", key, Row.speedup, 1.3)
            add(f"{shape} train step, G = 14, at most 0.6x the peak memory", key, Row.memory, 0.6, False)
            add(
                f"{shape} train step, G = 14, checkpointed, at most 0.4x the peak memory",
                key,
                lambda row: row.memory("qlip, checkpointed"),
                0.4,
                False,
            )
        for stack in self.stacks:
            ours, theirs = (median(stack.seconds[name]) for name in ("literal", "nn.TransformerEncoder"))
            aims.append(
                (f"{stack.shape} {stack.what}: the literal stack no slower than PyTorch's", theirs / ours, 1.0, True)
            )
        return aims


def publish(about: str, lines: Iterable[str], page: Path, begin: str, end: str, write: bool) -> None:
    """Print machine and date, then tables line by line as they are measured; optionally write them into a page.

    Args:
        about: further conditions of the measurements.
        lines: lines of the tables.
        page, begin, end: as in `write_into`.
        write: write the tables into the page.
    """
    printed = []
    for line in chain([f"{machine()}; {date.today().isoformat()}; {about}.", ""], lines):
        print(line, flush=True)
        printed.append(line)
    if write:
        write_into(page, "\n".join(printed).rstrip() + "\n", begin, end)


def write_into(path: Path, markdown: str, begin: str = BEGIN, end: str = END) -> None:
    """Write tables between the markers of a page."""
    page = path.read_text(encoding="utf-8")
    before, rest = page.split(begin, 1)
    _, after = rest.split(end, 1)
    path.write_text(f"{before}{begin}\n{markdown}{end}{after}", encoding="utf-8")


def _gib(row: Row, contender: str) -> str:
    return f"{row.peaks[contender] / 2**30:.2f}" if row.peaks else "-"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
