"""Table of an ablation: mean and range over seeds, as JSON and Markdown."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from qlip.evaluation.report.result import EvalResult
from qlip.evaluation.report.table import titled
from qlip.files import write_text
from qlip.training.studies.ablation import Ablation
from qlip.training.studies.ablation_metrics import RESULTS

DISTANCES = ("fd_vgg16", "fd_resnet50", "rfid", "rfid_pytorch_fid")
SHOWN: dict[str, tuple[str, ...]] = {
    "reconstruction": ("psnr", "ssim", "ms_ssim", "lpips_vgg", "lpips_alex"),
    "sets": DISTANCES,
    "sets_resnet50": DISTANCES,
    "sets_fid": DISTANCES,
    "codebook": ("bit_entropy_min", "dead_bits"),
    "zero_shot": ("prompt_top1", "zero_shot_top1"),
    "probe": ("linear_cls_top1", "linear_mean_top1", "linear_both_top1", "knn_cls_top1"),
}
"""Metrics in the Markdown table, by evaluator; all metrics of other evaluators. The JSON has all values."""
FORMS = {"psnr": ".2f", "ssim": ".3f", "ms_ssim": ".3f", "lpips_vgg": ".3f", "lpips_alex": ".3f"}
ABOUT_ALL = ("protocol", "left out", "classes")
"""Notes that are not about a single metric."""


def make_table(ablation: Ablation) -> dict[str, Any]:
    """Collect all metrics of an ablation.

    Returns:
        ``title`` and ``measure`` of the definition; ``rows``, one per variant, with ``seeds``, ``results`` (seed ->
        path of its result, relative to the ablation's folder) and ``values`` (``data/evaluator/metric`` -> mean, min
        and max over seeds, number of seeds, and value per seed); ``notes``; and ``about``, descriptions of the
        evaluated data. Notes and descriptions are listed once each.
    """
    rows: list[dict[str, Any]] = []
    notes, about = dict[tuple[str, str, str], None](), dict[str, None]()
    for name, variant in ablation.study.variants.items():
        values: dict[str, dict[str, Any]] = {}
        results: dict[str, str] = {}
        for one in ablation.runs([name]):
            found = ablation.measurements(one)
            if found:
                results[str(one.seed)] = (ablation.place(one) / RESULTS).relative_to(ablation.folder).as_posix()
            for measured in found:
                prefix = f"{measured.data}/{measured.evaluator}"
                for figure, value in measured.values.items():
                    kept = values.setdefault(f"{prefix}/{figure}", {"unit": value.unit, "by_seed": {}})
                    kept["by_seed"][str(one.seed)] = value.value
                notes |= {(prefix, of, note): None for of, note in measured.notes.items()}
                about |= {_about(measured): None}
        summary = {key: _summary(kept["by_seed"]) | kept for key, kept in values.items()}
        seeds = [int(seed) for seed in results]
        row = {"variant": name, "title": variant.title or name, "seeds": seeds, "results": results, "values": summary}
        rows.append(row)
    return {
        "title": ablation.study.title,
        "measure": [one.model_dump(mode="json") for one in ablation.study.measure],
        "rows": rows,
        "notes": [{"measure": measure, "about": of, "note": note} for measure, of, note in notes],
        "about": list(about),
    }


def write_table(table: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write ``table.json`` and ``table.md``; returns their paths."""
    numbers, text = folder / "table.json", folder / "table.md"
    write_text(numbers, json.dumps(table, indent=2, ensure_ascii=False) + "\n")
    write_text(text, to_markdown(table))
    return numbers, text


def columns(table: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Columns (key, heading, format) of the metrics that any row has, in the order of the definition."""
    units = {key: value["unit"] for row in table["rows"] for key, value in row["values"].items()}
    found = []
    for measure in table["measure"]:
        prefix = f"{measure['data']}/{measure['evaluator']}/"
        there = [key.removeprefix(prefix) for key in units if key.startswith(prefix)]
        for figure in SHOWN.get(measure["evaluator"], there):
            if figure in there:
                unit = units[prefix + figure]
                heading = f"{measure['data']} {titled(figure)}{f', {unit}' if unit else ''}"
                found.append((prefix + figure, heading, FORMS.get(figure) or _form(unit)))
    return found


def cells(table: dict[str, Any]) -> list[list[str]]:
    """Format the rows, without headings: title, number of seeds, and each metric as ``mean (min to max)``.

    The range is omitted if both ends are equal when rounded.
    """
    shown = columns(table)
    return [
        [row["title"], str(len(row["seeds"])), *(_cell(row["values"].get(key), form) for key, _, form in shown)]
        for row in table["rows"]
    ]


def to_markdown(table: dict[str, Any]) -> str:
    """Format the table and its notes as Markdown."""
    shown = columns(table)
    headings = [table["title"], "seeds", *(heading for _, heading, _ in shown)]
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *cells(table)]
    text = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    keys = {key for key, _, _ in shown}
    notes = [
        f"{one['measure']}, {one['about']}: {one['note']}"
        for one in table["notes"]
        if one["about"] in ABOUT_ALL or f"{one['measure']}/{one['about']}" in keys
    ]
    below = "".join(f"- {note}\n" for note in [*table["about"], *notes])
    return f"{text}\n\nMean over seeds (min to max).\n\n{below}"


def _summary(by_seed: dict[str, float]) -> dict[str, Any]:
    found = list(by_seed.values())
    return {"mean": statistics.fmean(found), "min": min(found), "max": max(found), "seeds": len(found)}


def _cell(value: dict[str, Any] | None, form: str) -> str:
    if value is None:
        return "–"
    mean, least, greatest = (_written(value[key], form) for key in ("mean", "min", "max"))
    return mean if least == greatest else f"{mean} ({least} to {greatest})"


def _form(unit: str) -> str:
    return {"dB": ".2f", "%": ".1f"}.get(unit, "")


def _written(value: float, form: str) -> str:
    """Format a value; without a format, integers in full and other values with three digits."""
    return f"{value:{form or (',.0f' if value.is_integer() or abs(value) >= 99.95 else '#.3g')}}"


def _about(measured: EvalResult) -> str:
    prompts = measured.options.get("templates")
    what = f", prompts {prompts}" if isinstance(prompts, str) else ""
    left_out = f", {len(measured.broken)} unreadable left out" if measured.broken else ""
    what_of = f"{measured.data}/{measured.evaluator}"
    return f"{what_of}: {measured.count:,} images, {measured.prepared}{what}{left_out}"
