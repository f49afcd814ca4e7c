"""A result's folder: metrics as JSON, arrays as safetensors, images and plots as PNG, and a report of them.

Layout::

    result.json          qlip.evaluation.report.result.Result
    arrays.safetensors   <row>/<name>: what images are drawn from, row being the place in result.measured
    pictures/            <row>-<plot>.png, and <row>-<digest of a key>-original.png and -rebuilt.png
    report.html          see qlip.evaluation.report.html
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import MetricResult
from qlip.evaluation.report.result import Result
from qlip.files import write_bytes

RESULT, ARRAYS, IMAGES, REPORT = "result.json", "arrays.safetensors", "pictures", "report.html"
DRAWN = {
    "codebook": ("codebook", "evaluators.codebook:draw"),
    "zero_shot": ("confusion", "evaluators.zero_shot:draw_confusion"),
}
"""By evaluator: name of its plot, and ``module:function`` that draws a `MetricResult` to a path."""
Side = Literal["original", "rebuilt"]
Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""Original and reconstruction by an image's key, (3, H, W) uint8; see `reconstruct_by_key`."""


@dataclass(frozen=True)
class Bundle:
    """Contents of a result's folder.

    Attributes:
        result: the metrics.
        metric_results: one for each of ``result.measured``, with its arrays.
        images: PNG files by name, without ``.png``.
    """

    result: Result
    metric_results: list[MetricResult]
    images: dict[str, Path] = field(default_factory=dict)


def image_name(row: int, key: str, side: Side) -> str:
    """Name of an image in a bundle; keys may hold characters that file names may not."""
    return f"{row:02d}-{hashlib.sha256(key.encode()).hexdigest()[:12]}-{side}"


def plot_name(row: int, plot: str) -> str:
    """Name of a row's plot in a bundle."""
    return f"{row:02d}-{plot}"


def write_bundle(
    folder: Path,
    result: Result,
    metric_results: Sequence[MetricResult],
    *,
    pairs: Mapping[int, Pairs] | None = None,
) -> None:
    """Write a measurement; a folder of an earlier one is written over, and its images go.

    Thumbnails of a metric result (``worst_psnr`` and the like, (n, 2, 3, h, w) uint8, beside a table of that name
    with keys) become images. Plots are drawn of what :data:`DRAWN` names.

    Args:
        folder: made if it is not there.
        result: of the measurement.
        metric_results: one for each of ``result.measured``.
        pairs: by a row's place, images to show.

    Raises:
        QLIPError: metric_results of another result, or a folder that cannot be written.
    """
    if len(metric_results) != len(result.measured):
        raise QLIPError(
            f"{folder}: {len(metric_results)} metric results do not fit a result of {len(result.measured)} rows"
        )
    (folder / RESULT).unlink(missing_ok=True)  # until the last file is there, the folder holds no measurement
    for old in (folder / IMAGES).glob("*.png"):
        old.unlink()
    arrays: dict[str, Tensor] = {}
    for row, metric_result in enumerate(metric_results):
        shown = dict((pairs or {}).get(row, {}))
        for name, array in metric_result.arrays.items():
            if (taken := _thumbnails(metric_result, name, array)) is None:
                arrays[f"{row}/{name}"] = array.contiguous()
            else:
                shown = taken | shown
        for key, pair in shown.items():
            for side, image in zip(("original", "rebuilt"), pair, strict=True):
                _write_image(folder / IMAGES / f"{image_name(row, key, side)}.png", image)  # type: ignore[arg-type]
        _draw(folder, row, result.measured[row].evaluator, metric_result)
    write_bytes(folder / ARRAYS, save(arrays))
    result.save(folder / RESULT)


def read_bundle(folder: Path) -> Bundle:
    """Read what :func:`write_bundle` wrote; a ``result.json`` alone will do.

    Args:
        folder: of the measurement, or its ``result.json``, or that of a result alone.

    Raises:
        QLIPError: no such folder, no result in it, or arrays that cannot be read.
    """
    path = folder / RESULT if folder.is_dir() or folder.suffix != ".json" else folder
    home, result = path.parent, Result.load(path)
    metric_results = [MetricResult(dict(row.values), dict(row.notes), dict(row.tables)) for row in result.measured]
    for name, array in _arrays(home / ARRAYS).items():
        row, _, array_name = name.partition("/")
        if not row.isdigit() or int(row) >= len(metric_results):
            raise QLIPError(f"{home / ARRAYS}: {name} is of no row of {path.name}; was the result replaced?")
        metric_results[int(row)].arrays[array_name] = array
    images = {one.stem: one for one in sorted((home / IMAGES).glob("*.png"))}
    return Bundle(result, metric_results, images)


def _arrays(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        raise QLIPError(f"{path}: cannot be read as safetensors; measure again") from None


def _thumbnails(metric_result: MetricResult, name: str, array: Tensor) -> dict[str, tuple[Tensor, Tensor]] | None:
    """Return an array's pairs of images by key; None if it is not thumbnails of the table of its name."""
    keys = [record.get("key") for record in metric_result.tables.get(name, [])]
    if array.dtype != torch.uint8 or array.dim() != 5 or array.shape[1:3] != (2, 3) or len(keys) != len(array):
        return None
    return {str(key): (pair[0], pair[1]) for key, pair in zip(keys, array, strict=True)}


def _write_image(path: Path, image: Tensor) -> None:
    data = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(data, "PNG", optimize=True)
    write_bytes(path, data.getvalue())


def _draw(folder: Path, row: int, evaluator: str, metric_result: MetricResult) -> None:
    if evaluator not in DRAWN:
        return
    plot, (module, _, function) = DRAWN[evaluator][0], DRAWN[evaluator][1].partition(":")
    draw = getattr(import_module(f"qlip.evaluation.{module}"), function)
    draw(metric_result, folder / IMAGES / f"{plot_name(row, plot)}.png")
