"""Tables of ``benchmarks.um3``, from its results alone.

Likelihoods of each seed stand side by side, since two seeds make no interval. Shares are over scenes or questions, the
seeds' together, with Wilson's interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.drawer_tables import NONE, Row, at, joined, line, paired, picked, share
from qlip.data.public.scene_captions import CaptionedScenes
from qlip.evaluation.report import drawing
from qlip.evaluation.run.scene_captions import ONE_OBJECT

FIGURES = ("caption_per_word", "caption_per_word_shuffled", "image_bits", "image_bits_shuffled", "text_bits_per_byte")
"""Likelihoods of held-out documents at each point of a curve, behind CPU seconds and rows."""
DRAWING_CONTROLS = ("other_caption", "contradicted")
"""Percentages over all scenes, beside blind drawings."""
TITLES = {
    "caption_per_word": "caption, nats per word",
    "image_bits": "bits per image",
    "text_bits_per_byte": "text, bits per byte",
}
"""Figures that are plotted and compared."""


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Format all tables that there are results of, line by line."""
    for part in dict.fromkeys(row["part"] for row in rows):
        own = picked(rows, part=part)
        by_variant = {name: picked(own, variant=name) for name in dict.fromkeys(row["variant"] for row in own)}
        yield from ("", f"## {part}", "")
        yield from likelihood_table(by_variant)
        yield ""
        yield from exact_table(by_variant)
        yield ""
        yield from verdicts(by_variant)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write the curves of all parts as a PNG, a line per seed.

    Raises:
        QLIPError: no matplotlib, or a path that cannot be written.
    """
    rows = [row for row in rows if _rows(row)]
    parts = list(dict.fromkeys(row["part"] for row in rows))
    figure = drawing.new_figure(11, 2.6 * len(parts))
    grid = figure.subplots(len(parts), len(TITLES), squeeze=False)
    for part, line_of_axes in zip(parts, grid, strict=True):
        own = picked(rows, part=part)
        variants = list(dict.fromkeys(row["variant"] for row in own))
        for (name, title), axes in zip(TITLES.items(), line_of_axes, strict=True):
            drawing.add_grid(axes)
            axes.set_title(f"{part}: {title}", fontsize=9)
            curves = [_curve(row, name) for row in own]
            last = max(one[-1][0] for one in curves)
            axes.set_xscale("log")
            axes.set_xticks([last / 8, last / 4, last / 2, last], [f"{last / of:.0f}" for of in (8, 4, 2, 1)])
            axes.minorticks_off()
            shown = [value for one in curves for seconds, _, value in one if seconds > last / 6]
            axes.set_ylim(0.95 * min(shown), 1.05 * max(shown))  # the begin would hide the end
            for row, curve in zip(own, curves, strict=True):
                colour = drawing.COLOURS[variants.index(row["variant"])]
                label = row["variant"] if row["seed"] == min(one["seed"] for one in own) else None
                seconds, _, values = zip(*curve, strict=True)
                axes.plot(seconds, values, color=colour, linewidth=1.2, label=label)
            axes.set_xlabel("CPU seconds", fontsize=8)
        drawing.add_legend_beside(line_of_axes[-1])
    drawing.save(figure, path, dpi=100)


def likelihood_table(by_variant: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Size, speed, and likelihoods at the last point of each seed; those with another scene are in brackets."""
    head = ["", "parameters, M", "rows", "CPU ms per row", "text ids, M", "caption, nats per word", "bits per image"]
    yield line([*head, "text, bits per byte"])
    yield line(["---", *["---:"] * len(head)])
    for name, several in by_variant.items():
        cells = [name, _each(several, lambda row: f"{row['parameters'] / 1e6:.2f}")]
        cells.append(_each(several, lambda row: f"{row['curve'][-1][1]:,}", separator="; "))
        cells.append(_each(several, lambda row: f"{1000 * row['curve'][-1][0] / row['curve'][-1][1]:.1f}"))
        cells.append(_each(several, lambda row: f"{row['text_ids'] / 1e6:.2f}"))
        cells.append(_each(several, lambda row: "{2:.3f} ({3:.3f})".format(*row["curve"][-1])))
        cells.append(
            _each(several, lambda row: "{:.0f} ({:.0f})".format(*row.get("image_bits", row["curve"][-1][4:6])))
        )
        cells.append(_each(several, lambda row: f"{_curve(row, 'text_bits_per_byte')[-1][2]:.3f}"))
        yield line(cells)


def exact_table(by_variant: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Captions, answers and drawings that are right, with their controls, and bits per byte of each text."""
    every = [row for several in by_variant.values() for row in several]
    texts = list(dict.fromkeys(name for row in every for name in row.get("text", {})))
    kinds = (
        "captions of one object, %",
        "all captions, %",
        "answers, %",
        "drawings of one object, %",
        "all drawings, %",
    )
    yield line(["", *(f"{kind} (interval)" for kind in kinds), *(f"{name}, bits per byte" for name in texts)])
    yield line(["---", *["---:"] * (len(kinds) + len(texts))])
    for name, several in by_variant.items():
        cells = [name, _shares(several, "captions", True), _shares(several, "captions", False)]
        cells += [_shares(several, "answers", False)]
        cells += [_shares(several, "drawings", True), _shares(several, "drawings", False)]
        cells += [_each(several, lambda row, text=text: f"{row['text'][text]:.3f}") for text in texts]
        yield line(cells)


def verdicts(by_variant: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Trainings that broke; the first variant against each other one; and what images cost text at equal ids."""
    for name, several in by_variant.items():
        if broke := [f"seed {row['seed']}: {row['broke']}" for row in several if "broke" in row]:
            yield f"{name} broke: {'; '.join(broke)}"
    first, *others = by_variant
    for name in others:
        for kind in ("captions", "answers", "drawings"):
            one, other = ([row for row in by_variant[who] if kind in row] for who in (first, name))
            if one and other:
                found = paired(one, other, lambda row, kind=kind: [100.0 * right for right in row[kind]["right"]])
                yield f"{first} less {name}, {kind}: {found} points"
        for row in by_variant[first]:
            if other := [one for one in picked(by_variant[name], seed=row["seed"]) if min(_rows(one), _rows(row))]:
                yield f"{first} against {name}, seed {row['seed']}, {_equal_rows(row, other[0])}"
    if "text alone" in by_variant:
        for row in by_variant[first]:
            alone = picked(by_variant["text alone"], seed=row["seed"])
            if alone and "broke" not in row and (cost := _cost(row, alone[0])) is not None:
                ids = row["text_ids"] / 1e6
                yield f"images cost {cost:+.3f} bits per byte at {ids:.2f} M ids of text, seed {row['seed']}"


def _curve(row: Row, name: str) -> list[tuple[float, float, float]]:
    """CPU seconds, rows and a figure at each point."""
    place = 2 + FIGURES.index(name)
    return [(point[0], point[1], point[place]) for point in row["curve"]]


def _rows(row: Row) -> float:
    """Rows that a UM3 was trained on; 0 of other models."""
    return float(row["curve"][-1][1]) if row["curve"] and len(row["curve"][-1]) == 2 + len(FIGURES) else 0.0


def _equal_rows(row: Row, other: Row) -> str:
    """Likelihoods of two UM3s after the rows that the one with fewer has read."""
    rows = min(_rows(row), _rows(other))
    caption, image, text = ([at(_curve(one, name), 1, rows) for one in (row, other)] for name in TITLES)
    if None in (*caption, *image, *text):
        return NONE
    return (
        f"{rows:,.0f} rows each: caption {caption[0]:.3f} and {caption[1]:.3f} nats per word, image {image[0]:.0f} and"
        f" {image[1]:.0f} bits, text {text[0]:.3f} and {text[1]:.3f} bits per byte"
    )


def _cost(row: Row, alone: Row) -> float | None:
    """Bits per byte above those of a training on text alone at as many ids; None where its curve does not reach."""
    if "text_ids" not in alone:
        return None
    per_row = alone["text_ids"] / _rows(alone)
    bits = at(_curve(alone, "text_bits_per_byte"), 1, row["text_ids"] / per_row)
    return None if bits is None else _curve(row, "text_bits_per_byte")[-1][2] - bits


def _shares(several: Sequence[Row], kind: str, one_object: bool) -> str:
    """Percentage right with its interval, and controls: shuffled and blind."""
    rows = [row for row in several if kind in row]
    if not rows:
        return NONE
    picked_rows = [{name: _picked(values, one_object) for name, values in row[kind].items()} for row in rows]
    if not picked_rows[0]["right"]:
        return NONE
    right = share(picked_rows)
    controls = [
        f"{name} {100 * np.mean([row[name] for row in picked_rows]):.1f}" for name in picked_rows[0] if name != "right"
    ]
    if kind == "drawings" and not one_object:
        common = [name for name in DRAWING_CONTROLS if all(name in row["drawing_controls"] for row in rows)]
        controls += [
            f"{name.replace('_', ' ')} {np.mean([row['drawing_controls'][name] for row in rows]):.1f}"
            for name in common
        ]
    return f"{right}; {', '.join(controls)}" if controls else right


def _picked(values: Sequence[int], one_object: bool) -> list[int]:
    """Values of the scenes of one object, or all."""
    if not one_object:
        return list(values)
    return [one for one, family in zip(values, _families(len(values)), strict=True) if family in ONE_OBJECT]


@cache
def _families(count: int) -> list[str]:
    """Families of the first scenes."""
    source = CaptionedScenes("seen")
    return [source.scene(number)[0].family for number in range(count)]


def _each(several: Sequence[Row], cell: Callable[[Row], str], separator: str = ", ") -> str:
    """A cell of each seed that has it."""
    found = []
    for row in several:
        try:
            found.append(cell(row))
        except (KeyError, IndexError, ZeroDivisionError):  # another model, or a training that broke
            continue
    return joined(found, separator)
