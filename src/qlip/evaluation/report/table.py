"""A table as it is shown, and its three text formats: Markdown, LaTeX (booktabs) and HTML.

A `Table` holds text only: how a number is written, what is bold and which notes a cell refers to are decided when it
is made (`Comparison.table`, `text_table`), so all formats agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal, get_args

from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import MetricValue

Format = Literal["markdown", "latex", "html"]
MISSING = "\u2013"
TITLES = {
    "psnr": "PSNR",
    "psnr_exact": "exact",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "l1": "L1",
    "lpips_vgg": "LPIPS (VGG)",
    "lpips_alex": "LPIPS (Alex)",
    "rfid": "rFID",
    "kid": "KID",
    "fd_vgg16": "FD-VGG16",
    "fd_resnet50": "FD-ResNet50",
    "kd_vgg16": "KD-VGG16",
    "kd_resnet50": "KD-ResNet50",
    "precision_vgg16_relu5": "precision (VGG16 relu5)",
    "precision_resnet50": "precision (ResNet50)",
    "recall_vgg16_relu5": "recall (VGG16 relu5)",
    "recall_resnet50": "recall (ResNet50)",
    "bits_per_pixel": "bits/pixel",
    "compression_ratio": "ratio",
    "zero_shot_top1": "zero-shot top-1",
    "zero_shot_top5": "zero-shot top-5",
    "shrink_psnr": "PSNR if shrunk",
    "shrink_ssim": "SSIM if shrunk",
    "clean_psnr": "PSNR, clean",
}
"""Titles of metrics in tables; other metrics go by their own names, with spaces for underscores."""
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\u2191": r"$\uparrow$",
    "\u2193": r"$\downarrow$",
    "\u2013": "--",
    "\u2192": r"$\to$",
    "\u00d7": r"$\times$",
    **{sign: rf"\{sign}" for sign in "&%$#_{}"},
}


@dataclass(frozen=True)
class Cell:
    """Text of a cell, the 95% interval behind it or "", whether it is bold, and numbers of the notes about it."""

    text: str
    interval: str = ""
    bold: bool = False
    notes: Sequence[int] = ()


@dataclass(frozen=True)
class Table:
    """A table to be shown.

    Attributes:
        caption: above it.
        head: headings of the columns; all empty if it has none.
        rows: a cell per column; the first one is the heading of the row.
        notes: below it, numbered from 1.
        prose: cells are text, aligned left, rather than numbers.
    """

    caption: str
    head: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    prose: bool = False


def text_table(caption: str, head: list[str], rows: Iterable[Iterable[str]], *, prose: bool = False) -> Table:
    """Return a table of plain text."""
    return Table(caption, head, [[Cell(one) for one in row] for row in rows], prose=prose)


def titled(name: str) -> str:
    """Title of a metric."""
    if name in TITLES:
        return TITLES[name]
    name = re.sub(r"_top(\d+)", r" top-\1", re.sub(r"_r(\d+)", r" R@\1", name)).replace("_", " ")
    return re.sub(r"\b(psnr|jpeg)\b", lambda one: one[0].upper(), name)


def heading(name: str, metric: MetricValue) -> str:
    """Title of a metric with its unit and an arrow to the better side."""
    arrow = {"higher": " \u2191", "lower": " \u2193"}.get(metric.better, "")
    unit = f", {metric.unit}" if metric.unit else ""
    return f"{titled(name)}{unit}{arrow}"


def number(value: float, unit: str) -> str:
    """Format a value: dB and percent with two and one decimals, counts whole, others with four digits."""
    if unit == "dB":
        return f"{value:.2f}"
    if unit == "%":
        return f"{value:.1f}"
    if abs(value) < 1e15 and value == int(value):
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def interval(metric: MetricValue) -> str:
    """Format the 95% interval of a metric; "" if it has none."""
    if metric.low is None or metric.high is None:
        return ""
    return f"[{number(metric.low, metric.unit)}, {number(metric.high, metric.unit)}]"


def spelled(value: object) -> str:
    """Format a cell: numbers with four digits, nothing as a dash."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write(tables: Iterable[Table], format: Format) -> str:
    """Write tables as text.

    Args:
        format: ``markdown``, ``latex`` (needs the package booktabs) or ``html`` (a fragment: no head, no style).

    Raises:
        QLIPError: no such format.
    """
    writers: dict[str, Callable[[Table], str]] = {"markdown": markdown, "latex": latex, "html": html}
    if format not in writers:
        raise QLIPError(f"tables are written as {', '.join(get_args(Format))}; got {format}")
    return "\n".join(writers[format](one) for one in tables)


def markdown(table: Table) -> str:
    """Return a pipe table below its caption."""

    def text(plain: str) -> str:
        return plain.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")

    lines = _lines(table, text, "**{}**", " ({})")
    lines.insert(1, ["---", *("---:" for _ in table.head[1:])])
    notes = [f"({at}) {text(note)}  " for at, note in enumerate(table.notes, 1)]
    pipes = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([f"**{text(table.caption)}**", "", *pipes, *(["", *notes] if notes else [])]) + "\n"


def latex(table: Table) -> str:
    """Return a ``table`` with a ``tabular`` of booktabs' rules."""

    def text(plain: str) -> str:
        return "".join(_LATEX.get(sign, sign) for sign in plain)

    head, *rows = (
        f"    {' & '.join(line)} \\\\" for line in _lines(table, text, r"\textbf{{{}}}", r"\textsuperscript{{{}}}")
    )
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{text(table.caption)}}}",
        rf"  \begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
        r"    \toprule",
        head,
        r"    \midrule",
        *rows,
        r"    \bottomrule",
        r"  \end{tabular}",
        *(rf"  \par\footnotesize \textsuperscript{{{at}}} {text(note)}" for at, note in enumerate(table.notes, 1)),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def html(table: Table) -> str:
    """Return a ``figure`` with a table that has a caption, headings of rows and columns, and its notes."""
    head, *rows = _lines(table, escape, "<strong>{}</strong>", " <sup>{}</sup>", gap="<br>")
    opened = '<table class="prose">' if table.prose else "<table>"
    lines = ['<figure class="table">', opened, f"<caption>{escape(table.caption)}</caption>"]
    if any(head):
        lines += ["<thead><tr>", *(f'<th scope="col">{one}</th>' for one in head), "</tr></thead>"]
    lines += ["<tbody>"]
    for first, *rest in rows:
        lines += [f'<tr><th scope="row">{first}</th>', *(f"<td>{one}</td>" for one in rest), "</tr>"]
    lines += ["</tbody>", "</table>"]
    if table.notes:
        lines += ["<ol>", *(f"<li>{escape(note)}</li>" for note in table.notes), "</ol>"]
    return "\n".join([*lines, "</figure>"]) + "\n"


def _lines(table: Table, text: Callable[[str], str], bold: str, mark: str, gap: str = " ") -> list[list[str]]:
    """Return the heading and the rows, escaped by ``text``; ``gap`` stands between a value and its interval."""

    def written(cell: Cell) -> str:
        found = text(cell.text) + (gap + text(cell.interval) if cell.interval else "")
        return (bold.format(found) if cell.bold else found) + "".join(mark.format(at) for at in cell.notes)

    return [[text(one) for one in table.head], *([written(cell) for cell in row] for row in table.rows)]
