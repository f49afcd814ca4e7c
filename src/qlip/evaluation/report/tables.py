"""Compared metrics as Markdown, LaTeX (booktabs) and HTML: the best in bold, notes below."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Literal, get_args

from qlip.errors import QLIPError, nearest
from qlip.evaluation.report.compare import Row, Table, say_pairs, written

Format = Literal["markdown", "latex", "html"]
MISSING = "\u2013"
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


def write(tables: Iterable[Table], format: Format, *, intervals: bool = False) -> str:
    """Tables as text, in one of three formats.

    Args:
        tables: of :func:`qlip.evaluation.report.compare.compare`.
        format: ``markdown``, ``latex`` (needs the package booktabs) or ``html`` (a fragment: no head, no style).
        intervals: write 95% intervals behind metrics that have one.

    Raises:
        QLIPError: no such format.
    """
    makers: dict[str, Callable[[Table, bool], str]] = {"markdown": markdown, "latex": latex, "html": html}
    if format not in makers:
        raise QLIPError(f"tables are written as {', '.join(get_args(Format))}; got {format}")
    return "\n".join(makers[format](one, intervals) for one in tables)


def markdown(table: Table, intervals: bool = False) -> str:
    """A pipe table below its caption."""

    def cell(text: str) -> str:
        return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")

    def bold(text: str) -> str:
        return f"**{text}**"

    head, body = _cells(table, intervals, cell, bold, lambda number: f" ({number})")
    sides = ["---", *("---:" for _ in head[1:])]
    lines = [f"**{cell(_title(table))}**", "", *(f"| {' | '.join(line)} |" for line in (head, sides, *body))]
    lines += ["", *(f"({number}) {cell(note)}  " for number, note in enumerate(table.notes, 1))] if table.notes else []
    return "\n".join(lines) + "\n"


def latex(table: Table, intervals: bool = False) -> str:
    """A ``table`` with a ``tabular`` of booktabs' rules."""

    def cell(text: str) -> str:
        return "".join(_LATEX.get(sign, sign) for sign in text)

    def bold(text: str) -> str:
        return rf"\textbf{{{text}}}"

    head, body = _cells(table, intervals, cell, bold, lambda number: rf"\textsuperscript{{{number}}}")
    rows = [" & ".join(line) + r" \\" for line in (head, *body)]
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{cell(_title(table))}}}",
        rf"  \begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"    \toprule",
        f"    {rows[0]}",
        r"    \midrule",
        *(f"    {row}" for row in rows[1:]),
        r"    \bottomrule",
        r"  \end{tabular}",
        *(rf"  \par\footnotesize \textsuperscript{{{at}}} {cell(note)}" for at, note in enumerate(table.notes, 1)),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def html(table: Table, intervals: bool = False) -> str:
    """A ``metric`` with a table that has a caption, heads of rows and columns, and its notes."""

    def bold(text: str) -> str:
        return f"<strong>{text}</strong>"

    head, body = _cells(table, intervals, escape, bold, lambda number: f" <sup>{number}</sup>")
    lines = ['<figure class="table">', "<table>", f"<caption>{escape(_title(table))}</caption>"]
    lines += ["<thead><tr>", *(f'<th scope="col">{one}</th>' for one in head), "</tr></thead>", "<tbody>"]
    for first, *rest in body:
        cells = (one.replace(" [", "<br>[") for one in rest)  # an interval below its metric
        lines += [f'<tr><th scope="row">{first}</th>', *(f"<td>{one}</td>" for one in cells), "</tr>"]
    lines += ["</tbody>", "</table>"]
    if table.notes:
        lines += ["<ol>", *(f"<li>{escape(note)}</li>" for note in table.notes), "</ol>"]
    return "\n".join([*lines, "</figure>"]) + "\n"


def _title(table: Table) -> str:
    return table.caption if table.title in ("", table.data) else f"{table.title}: {table.caption}"


def _cells(
    table: Table,
    intervals: bool,
    cell: Callable[[str], str],
    bold: Callable[[str], str],
    mark: Callable[[int], str],
) -> tuple[list[str], list[list[str]]]:
    """Head and rows, escaped; a column says how images were prepared where that differs."""
    best = {column.name: table.best(column.name) for column in table.columns}
    head = ["", *(["preparation"] if not table.preparation else []), *(cell(one.title) for one in table.columns)]

    def line(row: Row) -> list[str]:
        found = [cell(row.model) + "".join(mark(number) for number in row.marks)]
        found += [cell(row.preparation)] if not table.preparation else []
        for column in table.columns:
            figure = row.metrics.get(column.name)
            text = cell(MISSING if figure is None else written(figure, intervals))
            found.append(bold(text) if row.model in best[column.name] else text)
        return found

    return head, [line(row) for row in table.rows]


def chosen(tables: Sequence[Table], columns: Sequence[str]) -> list[Table]:
    """Select metrics, in that order; tables that have none of them are left out.

    Raises:
        QLIPError: a metric that no table has.
    """
    known = list(dict.fromkeys(column.name for table in tables for column in table.columns))
    for name in columns:
        if name not in known:
            raise QLIPError(f"no result has a metric {name}{nearest(name, known)}; there are {', '.join(known)}")
    found = []
    for table in tables:
        by_name = {column.name: column for column in table.columns}
        if kept := [by_name[name] for name in columns if name in by_name]:
            found.append(Table(**{**vars(table), "columns": kept}))
            say_pairs(found[-1])
    return found
