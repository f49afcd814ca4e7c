"""Tables of ``benchmarks.drawers``, from its results alone.

Bits of each seed stand side by side, since two seeds make no interval. Scores are shares over the captions, the seeds'
images together, with Wilson's interval over captions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import log
from typing import Any

import numpy as np

from qlip.evaluation.metrics.intervals import paired_difference, proportion_interval

Row = dict[str, Any]
NONE = "-"
CONTROL = 1.0
"""Guidance without a second branch."""


def tables(rows: Sequence[Row], parts: Mapping[str, Mapping[str, str]], scales: Sequence[float]) -> Iterator[str]:
    """Format all tables that there are results of, line by line.

    Args:
        rows: of ``results.jsonl``.
        parts: titles of the variants, by table.
        scales: of guidance.
    """
    for row in picked(rows, kind="bound"):
        yield f"Bound of {row['variant']}, {row['split']}: {share([row])}; FD {distance([row])}"
    twins = [row["variant"] for row in picked(rows, kind="bound") if row["variant"] != "bundled"]
    for part, titles in {**parts, "twins": {name: name for name in twins}}.items():
        if any(row["kind"] == "training" and row["variant"] in titles for row in rows):
            yield from ("", f"## {part}", "")
            yield from bits_table(rows, titles, comparable=part != "twins")
            yield ""
            yield from score_table(rows, titles, scales)
    for name in dict.fromkeys(row["variant"] for row in rows if row["variant"].startswith("sampling:")):
        yield from ("", f"## {name}", "")
        yield from sampling_table(picked(rows, variant=name))


def bits_table(rows: Sequence[Row], titles: Mapping[str, str], comparable: bool = True) -> Iterator[str]:
    """Bits per image at equal CPU times and at equal images, and the difference to the first variant at the end.

    Args:
        rows: of the results.
        titles: of the variants.
        comparable: the variants have the same tokens.
    """
    found = {name: picked(rows, kind="training", variant=name) for name in titles}
    curves = [row["curve"] for several in found.values() for row in several]
    seconds = min(curve[-1][0] for curve in curves)
    images = min(curve[-1][1] for curve in curves)
    head = [f"{seconds * part:.0f} CPU s" for part in (0.25, 0.5, 1)]
    head += [f"{int(images * part):,} images" for part in (0.5, 1)]
    first, *others = list(titles)
    splits = list(next(several for several in found.values() if several)[0]["bits"])
    yield line(
        [
            *("", "parameters, M", "images", "CPU ms per image", *head),
            *(f"all of {split} at the end" for split in splits),
            "more with other captions",
            *[f"less {titles[first]}"] * comparable,
        ]
    )
    yield line(["---", *["---:"] * (4 + len(head) + len(splits) + comparable)])
    for name, several in found.items():
        if not several:
            continue
        cells = [titles[name], f"{several[0]['parameters'] / 1e6:.2f}"]
        cells.append(joined([f"{row['curve'][-1][1]:,}" for row in several], "; "))
        cells.append(joined([f"{1000 * row['curve'][-1][0] / row['curve'][-1][1]:.1f}" for row in several]))
        for column, most, shares in ((0, seconds, (0.25, 0.5, 1)), (1, images, (0.5, 1))):
            for part in shares:
                cells.append(joined([_number(at(row["curve"], column, most * part)) for row in several]))
        cells += [joined([f"{np.mean(row['bits'][split]):.1f}" for row in several]) for split in splits]
        heard = picked(rows, kind="captions", variant=name)
        cells.append(joined([f"{row['other'] - row['own']:.1f}" for row in heard]))
        if comparable:
            cells.append(NONE if name == first else difference(several, found[first], splits[0]))
        yield line(cells)


def at(curve: Sequence[Sequence[float]], column: int, place: float) -> float | None:
    """Bits of a curve at a CPU time (column 0) or number of images (column 1), linear in its logarithm.

    Args:
        curve: points of CPU seconds, images and bits, in order.
        column: of the point that the place is of.
        place: where.

    Returns:
        Bits; None where the curve does not reach.
    """
    known = [point[column] for point in curve]
    if not known[0] <= place <= known[-1] * (1 + 1e-9):
        return None
    return float(np.interp(log(place), np.log(known), [point[2] for point in curve]))


def difference(several: Sequence[Row], first: Sequence[Row], split: str) -> str:
    """Mean difference in bits of the seeds that both variants have, with its interval over images."""
    return paired(several, first, lambda row: row["bits"][split])


def paired(several: Sequence[Row], first: Sequence[Row], values: Callable[[Row], Sequence[float]]) -> str:
    """Mean difference of the seeds that both variants have, with its interval over samples.

    Args:
        several, first: rows of the two variants.
        values: of a row, one per sample, the same samples in all rows.
    """
    seeds = {row["seed"] for row in several} & {row["seed"] for row in first}
    if not seeds:
        return NONE
    means = [np.mean([values(row) for row in one if row["seed"] in seeds], 0) for one in (several, first)]
    found = paired_difference(*means)
    return NONE if found is None else f"{found.difference:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def score_table(rows: Sequence[Row], titles: Mapping[str, str], scales: Sequence[float]) -> Iterator[str]:
    """Scores without guidance and at the best scale on seen scenes; of twins also the distances between sets."""
    drawn = [row for row in picked(rows, kind="drawing") if row["variant"] in titles]
    splits = list(dict.fromkeys(row["split"] for row in drawn))
    distances = any("fd" in row for row in drawn)
    head = ["", "best scale"]
    for split in splits:
        head += [
            f"{split}, guidance 1, %",
            "at the best scale, %",
            *["FD, guidance 1", "at the best scale"] * distances,
        ]
    yield line(head)
    yield line(["---", *["---:"] * (len(head) - 1)])
    for name, title in titles.items():
        own = picked(drawn, variant=name)
        if not own:
            continue
        best = best_scale(own, scales)
        cells = [title, f"{best:g}"]
        for split in splits:
            at_scales = [picked(own, split=split, guidance=scale) for scale in (CONTROL, best)]
            cells += [share(several) for several in at_scales]
            cells += [distance(several) for several in at_scales] if distances else []
        yield line(cells)


def best_scale(rows: Sequence[Row], scales: Sequence[float]) -> float:
    """Scale with the most right images on seen scenes, over all seeds; the smaller of equal ones."""
    right = {scale: _right(picked(rows, split="seen", guidance=scale)) for scale in scales}
    return max(scales, key=lambda scale: float(right[scale].mean()) if right[scale].size else -1.0)


def share(rows: Sequence[Row]) -> str:
    """Percentage right with its interval over captions, and that of each seed where there are several."""
    if not rows:
        return NONE
    right = _right(rows)  # (seeds, images)
    low, high = proportion_interval(right.sum(0), np.full(right.shape[1], float(len(right))))
    seeds = f"; {joined([f'{100 * one.mean():.1f}' for one in right])}" if len(right) > 1 else ""
    interval = "" if low is None or high is None else f" ({100 * low:.1f} to {100 * high:.1f}{seeds})"
    return f"{100 * right.mean():.1f}{interval}"


def distance(rows: Sequence[Row]) -> str:
    """Distance between sets of each seed, with its interval."""
    found = [row["fd"] for row in rows if "fd" in row]
    return joined(
        [f"{one[0]:.1f}" + (f" ({one[1]:.1f} to {one[2]:.1f})" if one[1] is not None else "") for one in found]
    )


def sampling_table(rows: Sequence[Row]) -> Iterator[str]:
    """Scores by temperature and top-k in rows, guidance in columns."""
    scales = sorted({row["guidance"] for row in rows})
    yield line(["temperature", "top-k", *(f"guidance {scale:g}, %" for scale in scales)])
    yield line(["---:"] * (2 + len(scales)))
    for temperature, top_k in sorted({(row["temperature"], row["top_k"]) for row in rows}):
        cells = [share(picked(rows, temperature=temperature, top_k=top_k, guidance=scale)) for scale in scales]
        yield line([f"{temperature:g}", "all" if top_k == 0 else str(top_k), *cells])


def picked(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Rows with these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def _right(rows: Sequence[Row]) -> np.ndarray:
    return np.array([row["right"] for row in rows], dtype=float)


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"


def joined(cells: Sequence[str], separator: str = ", ") -> str:
    """Cells of the seeds as one."""
    return separator.join(cells) or NONE


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
