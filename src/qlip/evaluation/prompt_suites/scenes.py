"""Made scenes as a suite: drawn from their captions, and scored by the exact checker, without a judge model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qlip.data.public.scene_captions import (
    FAMILIES,
    SPLITS,
    CaptionedScenes,
    Description,
    contradiction,
)
from qlip.data.public.scenes import HARD, SIDE, STANDARD, draw
from qlip.evaluation.evaluators.base import MetricResult, mean
from qlip.evaluation.evaluators.scenes import add_right
from qlip.evaluation.metrics.scenes import is_right, read_scene
from qlip.evaluation.prompt_suites.layouts import Suite, captioned
from qlip.evaluation.prompt_suites.prompts import Prompt
from qlip.evaluation.report.result import EvalResult, Result
from qlip.evaluation.run.evaluate import new_result
from qlip.registry import unknown_name
from qlip.runtime.progress import OnProgress, no_progress

DRAWER = "Drawer"
"""Kind of model in a result of drawn scenes."""
Rebuild = Callable[[Sequence[Image.Image]], Sequence[Image.Image]]
"""From images to the same images after the tokenizer."""
AT_ONCE = 64


def scenes(split: str = "seen", limit: int | None = None) -> Suite:
    """Captions of made scenes, one image each, in the layout of COCO-30k.

    Args:
        split: one of :data:`qlip.data.public.scene_captions.SPLITS`.
        limit: number of scenes, the first ones; None takes all.

    Raises:
        QLIPError: no such split.
    """
    if split not in SPLITS:
        raise unknown_name(split, "split of scenes", SPLITS)
    source = CaptionedScenes(split)
    count = len(source) if limit is None else min(limit, len(source))
    prompts = [Prompt(source.scene(at)[0].caption, f"{source.name}, {at}") for at in range(count)]
    return captioned(f"scenes:{split}", prompts, SIDE)


def score_scenes(
    suite: Suite, out: Path, rebuild: Rebuild | None, *, on_progress: OnProgress = no_progress
) -> MetricResult:
    """Check drawn scenes.

    Args:
        suite: of :func:`scenes`, with all images in ``out``.
        out: its folder.
        rebuild: encodes and decodes images by the drawer's tokenizer; None leaves out the bound.
        on_progress: called with the number of scenes checked since the last call.

    Returns:
        Metrics in percent, and the table ``images`` of each caption, family and verdict:

        - ``scenes_right``, and ``scenes_right_<family>``: the image shows what the caption says, and nothing else;
        - ``scenes_rebuilt``: true scenes that are right after the tokenizer, the bound of any drawer with its tokens;
        - ``scenes_contradicted``: control, images for which the caption with one change passes;
        - ``scenes_other_caption``: control, images for which the next scene's caption passes.
    """
    split = suite.name.partition(":")[2]
    source, design = CaptionedScenes(split), HARD if split == "hard" else STANDARD
    described = [source.scene(at)[0] for at in range(len(suite.files))]
    others = [_next_other(described, at) for at in range(len(described))]
    columns: dict[str, list[bool]] = {name: [] for name in ("right", "contradicted", "other", "rebuilt")}
    for start in range(0, len(described), AT_ONCE):
        places = range(start, min(start + AT_ONCE, len(described)))
        for at in places:
            with Image.open(out / suite.files[at].path) as image:
                seen = read_scene(np.array(image.convert("RGB")), design)
            columns["right"].append(is_right(described[at], seen))
            columns["contradicted"].append(is_right(contradiction(described[at]), seen))
            columns["other"].append(is_right(others[at], seen))
        if rebuild is not None:
            true = rebuild([draw(source.scene(at)[1]) for at in places])
            columns["rebuilt"] += [
                is_right(described[at], read_scene(np.array(one), design)) for at, one in zip(places, true, strict=True)
            ]
        on_progress(len(places))
    return _metrics(described, {name: torch.tensor(values) for name, values in columns.items() if values})


def scenes_result(
    name: str, found: MetricResult, suite: Suite, settings: Mapping[str, object], device: torch.device
) -> Result:
    """Make a result that ``qlip compare`` takes.

    Args:
        name: name of the drawer in tables.
        found: of :func:`score_scenes`.
        suite: scenes that were drawn.
        settings: JSON of all that images depend on.
        device: that drew.
    """
    row = scenes_row(found, suite, settings)
    fingerprint = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()
    return new_result({"name": name, "kind": DRAWER, "fingerprint": fingerprint, "device": device.type}, [row], device)


def scenes_row(found: MetricResult, suite: Suite, settings: Mapping[str, object]) -> EvalResult:
    """Make a row of a result; see :func:`scenes_result`."""
    return EvalResult(
        evaluator="drawn_scenes",
        options=dict(settings),
        settings={"split": suite.name.partition(":")[2]},
        title="made scenes, drawn",
        data=suite.name,
        count=len(suite.files),
        limit=len(suite.files),
        broken=[],
        preparation=f"{SIDE}x{SIDE}",
        as_shipped=True,
        digest=suite.digest,
        values=found.values,
        notes=found.notes,
        tables=found.tables,
    )


def _next_other(described: Sequence[Description], at: int) -> Description:
    """Description of the next scene with another caption; of the same scene if there is none."""
    own, count = described[at], len(described)
    following = (described[(at + step) % count] for step in range(1, count))
    return next((one for one in following if one.caption != own.caption), contradiction(own))


def _metrics(described: Sequence[Description], columns: Mapping[str, Tensor]) -> MetricResult:
    family = torch.tensor([FAMILIES.index(one.family) for one in described])
    result = MetricResult({})
    add_right(result, columns["right"], family)
    if "rebuilt" in columns:
        result.values["scenes_rebuilt"] = mean(columns["rebuilt"], unit="%", scale=100)
        result.notes["scenes_rebuilt"] = "true scenes after the tokenizer: no drawer with its tokens can do better"
    for name, column in (("scenes_contradicted", "contradicted"), ("scenes_other_caption", "other")):
        result.values[name] = mean(columns[column], unit="%", better="lower", scale=100)
    result.tables["images"] = [
        {"caption": one.caption, "family": one.family, "right": right}
        for one, right in zip(described, columns["right"].tolist(), strict=True)
    ]
    result.keep_keys([f"{at:06d}" for at in range(len(described))])
    return result
