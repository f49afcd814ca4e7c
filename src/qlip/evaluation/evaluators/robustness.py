"""What a subject makes of images that are not at their best: the same figures under JPEG, blur, noise and resizing.

Shapes: B images, S severities, N tokens of K groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from qlip.data.loader.eval_set import EvalBatch
from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import Columns, Evaluator, Finding, Rows, Value, mean
from qlip.evaluation.evaluators.degradations import KINDS, PARAMETERS, SEVERITIES, Kind, degraded
from qlip.evaluation.metrics.pixel import psnr
from qlip.evaluation.models.base import EMBED, REBUILD, Rebuilt, Subject
from qlip.evaluation.report import drawing
from qlip.evaluation.run.batch_cache import eight_bit, embedded_of, originals_of, rebuilt_of
from qlip.modeling import indices_to_bits

CEILING = 100.0
"""dB that an image counts at most, such as a flat one that no blur changes."""
UNITS = {"psnr": "dB", "psnr_seen": "dB", "psnr_input": "dB", "bits_equal": "%", "cosine": ""}
"""Figures and their units; ``bits_equal`` needs tokens, ``cosine`` embeddings."""
COLOURS = dict(zip(KINDS, drawing.COLOURS, strict=False))
TITLES = {
    "psnr": "PSNR to the clean picture, dB\n(dotted: nothing rebuilt)",
    "bits_equal": "token bits as the\nclean picture's, %",
    "cosine": "cosine to the clean\npicture's embedding",
}


class Robustness(Evaluator):
    """Figures of degraded images (:mod:`qlip.evaluation.evaluators.degradations`), against their clean selves.

    For each kind, means over images and severities: ``<kind>_psnr``, what is rebuilt of the degraded image against
    the clean one; ``<kind>_psnr_seen``, against the degraded one; ``<kind>_psnr_input``, the degraded image itself
    against the clean one, for comparison; ``<kind>_bits_equal``, the share of token bits that are the clean image's;
    ``<kind>_cosine`` between the embeddings of both. ``clean_psnr`` is without any degradation. An image counts at
    most 100 dB. Pixels are compared as 8-bit RGB at the subject's size.

    Table ``curves``: a record a kind and severity with ``parameter`` and each figure's mean, ``<figure>_low`` and
    ``<figure>_high``; severity 0 is the clean image.

    Args:
        kinds: of ``jpeg``, ``blur``, ``noise``, ``resize``.
        severities: of 1 to 5; each takes a pass of the model a kind.
    """

    name: ClassVar[str] = "robustness"
    needs: ClassVar[frozenset[str]] = frozenset({REBUILD})

    def __init__(self, kinds: Sequence[Kind] = KINDS, severities: Sequence[int] = SEVERITIES) -> None:
        wrong = [str(one) for one in (*kinds, *severities) if one not in KINDS and one not in SEVERITIES]
        if wrong or not kinds or not severities:
            got = wrong[0] if wrong else "none"
            raise QLIPError(f"robustness is under {', '.join(KINDS)} at severities 1 to 5; got {got}")
        self.kinds, self.severities = tuple(dict.fromkeys(kinds)), tuple(sorted(set(severities)))

    def settings(self) -> Mapping[str, object]:
        """What is done to images."""
        parameters = {kind: [PARAMETERS[kind][one - 1] for one in self.severities] for kind in self.kinds}
        return {"severities": list(self.severities), "parameters": parameters}

    def rows(self, subject: Subject, batch: EvalBatch) -> Columns:
        """``<kind>_<figure>`` of each image, (B, S) float64, and ``clean_psnr`` (B,)."""
        originals, clean = originals_of(subject, batch), rebuilt_of(subject, batch)
        embedded = embedded_of(subject, batch) if EMBED in subject.can else None
        columns = {"clean_psnr": _decibels(clean.pixels, originals)}
        for kind in self.kinds:
            found: dict[str, list[Tensor]] = {}
            for severity in self.severities:
                worse = degraded(originals, batch.keys, kind, severity)
                seen = subject.preprocessing.normalize(worse)
                rebuilt = subject.rebuild(seen)
                pixels = eight_bit(rebuilt.pixels.clamp(0, 1))
                figures = {
                    "psnr": _decibels(pixels, originals),
                    "psnr_seen": _decibels(pixels, worse),
                    "psnr_input": _decibels(worse, originals),
                }
                if (share := _equal(rebuilt, clean, subject.group_size)) is not None:
                    figures["bits_equal"] = share
                if embedded is not None:
                    figures["cosine"] = (subject.embed(seen).cpu().double() * embedded.cpu().double()).sum(1)
                for name, values in figures.items():
                    found.setdefault(name, []).append(values.cpu())
            columns |= {f"{kind}_{name}": torch.stack(values, 1) for name, values in found.items()}
        return {name: column.cpu() for name, column in columns.items()}

    def finding(self, subject: Subject, rows: Rows) -> Finding:
        """Means over severities as figures, and one by one as a table."""
        clean = _mean("psnr", rows.column("clean_psnr"))
        finding = Finding({"clean_psnr": clean}, {}, {"curves": []})
        measured = [name for name in UNITS if f"{self.kinds[0]}_{name}" in rows.names]
        for kind in self.kinds:
            columns = {name: rows.column(f"{kind}_{name}") for name in measured}
            finding.values |= {f"{kind}_{name}": _mean(name, column.mean(1)) for name, column in columns.items()}
            best = {"bits_equal": Value(100.0, 100.0, 100.0), "cosine": Value(1.0, 1.0, 1.0)}
            start = {"psnr": clean, "psnr_seen": clean} | {name: best[name] for name in measured if name in best}
            finding.tables["curves"].append({"kind": kind, "severity": 0, "parameter": None, **_record(start)})
            for place, severity in enumerate(self.severities):
                means = {name: _mean(name, column[:, place]) for name, column in columns.items()}
                head = {"kind": kind, "severity": severity, "parameter": PARAMETERS[kind][severity - 1]}
                finding.tables["curves"].append(head | _record(means))
        return finding


def _decibels(rebuilt: Tensor, originals: Tensor) -> Tensor:
    return psnr(rebuilt, originals).clamp_max(CEILING)


def _equal(first: Rebuilt, second: Rebuilt, group_size: int | None) -> Tensor | None:
    """(B,) share of token bits that are equal; None where there are no tokens."""
    if first.indices is None or second.indices is None or group_size is None:
        return None
    different = indices_to_bits(first.indices ^ second.indices, group_size)
    return 1 - different.flatten(1).cpu().double().mean(1)


def _mean(name: str, column: Tensor) -> Value:
    unit = UNITS[name]
    return mean(column, unit=unit, better="higher", scale=100.0 if unit == "%" else 1.0)


def _record(means: Mapping[str, Value]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, one in means.items():
        record |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
    return record


class HasTables(Protocol):
    """A finding, or a row of a result's file."""

    tables: dict[str, list[dict[str, object]]]


def plot(finding: HasTables, path: Path, title: str = "") -> Path:
    """Write a PNG of figures over severity, a line a kind, bands of 95% intervals; returns its path.

    Args:
        finding: of :class:`Robustness`, or its row in a result.
        path: of the image.
        title: above it.

    Raises:
        QLIPError: no finding of robustness, no matplotlib, or a path that cannot be written.
    """
    curves: Sequence[Mapping[str, Any]] = finding.tables.get("curves", [])
    if not curves or not {"kind", "severity", "psnr"} <= set(curves[0]):
        raise QLIPError(f"{path}: nothing to draw, for robustness was not measured; run qlip eval with robustness")
    names = [name for name in TITLES if name in curves[0]]
    figure = drawing.new_figure(3.7 * len(names), 3.4)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        _draw(axes, curves, name)
        axes.set_ylabel(TITLES[name])
        axes.set_xlabel("severity")
        axes.set_xticks(sorted({record["severity"] for record in curves}))
        drawing.add_grid(axes)
    drawing.add_legend_beside(axes)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    drawing.save(figure, path)
    return path


def _draw(axes: Any, curves: Sequence[Mapping[str, Any]], name: str) -> None:
    for kind in dict.fromkeys(record["kind"] for record in curves):
        drawn = [record for record in curves if record["kind"] == kind]
        x, y = [record["severity"] for record in drawn], [record[name] for record in drawn]
        axes.plot(x, y, color=COLOURS.get(kind, drawing.GREY), marker="o", markersize=3, label=kind)
        bounds = [(record[f"{name}_low"], record[f"{name}_high"]) for record in drawn]
        if all(low is not None and high is not None for low, high in bounds):
            axes.fill_between(x, *zip(*bounds, strict=True), color=COLOURS.get(kind, drawing.GREY), alpha=0.15, lw=0)
        if name == "psnr":  # what the degradation itself leaves, for comparison
            sides = [(record["severity"], record["psnr_input"]) for record in drawn if "psnr_input" in record]
            axes.plot(*zip(*sides, strict=True), color=COLOURS.get(kind, drawing.GREY), linestyle=":", linewidth=1)
    if name == "psnr":
        axes.set_ylim(top=max(record["psnr"] for record in curves) + 6)
