"""The table of a study: mean and range over seeds, as JSON and Markdown."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from qlip.files import write_text
from qlip.training.ablation import Ablation

METRICS = {
    "reconstruction": {
        "psnr": ("PSNR, dB", ".2f"),
        "ssim": ("SSIM", ".3f"),
        "lpips": ("LPIPS", ".3f"),
        "fd_vgg16": ("FD-VGG16", ".3g"),
        "bits_dead": ("dead bits", ".3g"),
    },
    "classification": {"top1": ("top-1, %", ".1f")},
}
"""What stands in the Markdown table, its heading and how it is written; the JSON has all values."""


def make_table(ablation: Ablation) -> dict[str, Any]:
    """All figures of a study: for each variant and value the mean, least and greatest over seeds, and how many."""
    rows, notes = [], dict[str, None]()
    for name, variant in ablation.study.variants.items():
        values: dict[str, list[float]] = {}
        seeds = []
        for one in ablation.runs([name]):
            found = ablation.measurements(one)
            seeds += [one.seed] if found else []
            for result in found:
                measure = result["measure"]
                for key, value in result["values"].items():
                    values.setdefault(f"{measure['data']}/{measure['kind']}/{key}", []).append(value)
                notes |= {
                    f"{measure['data']}, {key}: {note}": None for key, note in result["notes"].items() if _said(note)
                }
                notes |= {_about(result): None}
        summary = {
            key: {"mean": statistics.fmean(found), "min": min(found), "max": max(found), "seeds": len(found)}
            for key, found in values.items()
        }
        rows.append({"variant": name, "title": variant.title or name, "seeds": seeds, "values": summary})
    measure = [one.model_dump(mode="json") for one in ablation.study.measure]
    return {"title": ablation.study.title, "measure": measure, "rows": rows, "notes": list(notes)}


def write_table(table: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write ``table.json`` and ``table.md``; returns their paths."""
    numbers, text = folder / "table.json", folder / "table.md"
    write_text(numbers, json.dumps(table, indent=2, ensure_ascii=False) + "\n")
    write_text(text, to_markdown(table))
    return numbers, text


def columns(table: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(key, heading, format) of the figures that any row has."""
    found = []
    for measure in table["measure"]:
        for metric, (heading, form) in METRICS[measure["kind"]].items():
            key = f"{measure['data']}/{measure['kind']}/{metric}"
            if any(key in row["values"] for row in table["rows"]):
                found.append((key, f"{measure['data']} {heading}", form))
    return found


def cells(table: dict[str, Any]) -> list[list[str]]:
    """The rows, without headings: title, number of seeds, and each figure as ``mean (least to greatest)``."""
    shown = columns(table)
    return [
        [row["title"], str(len(row["seeds"])), *(_cell(row["values"].get(key), form) for key, _, form in shown)]
        for row in table["rows"]
    ]


def to_markdown(table: dict[str, Any]) -> str:
    """The table and what its figures are of."""
    headings = [table["title"], "seeds", *(heading for _, heading, _ in columns(table))]
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *cells(table)]
    text = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    notes = "".join(f"- {note}\n" for note in table["notes"])
    return f"{text}\n\nMean over seeds (least to greatest).\n\n{notes}"


def _cell(value: dict[str, float] | None, form: str) -> str:
    if value is None:
        return "–"
    mean, least, greatest = (f"{value[key]:{form}}" for key in ("mean", "min", "max"))
    return mean if value["seeds"] == 1 else f"{mean} ({least} to {greatest})"


def _about(result: dict[str, Any]) -> str:
    measure, broken = result["measure"], result["broken"]
    what = "" if measure["templates"] is None else f", prompts {measure['templates']}"
    left_out = f", {broken} broken left out" if broken else ""
    return (
        f"{measure['data']}, {measure['kind']}: {result['count']:,} pictures, {result['preparation']}{what}{left_out}"
    )


def _said(note: Any) -> bool:
    """Warnings, not counts."""
    return isinstance(note, str)
