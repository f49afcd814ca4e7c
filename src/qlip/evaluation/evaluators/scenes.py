"""Share of made scenes that are still what their caption says after a model rebuilt them.

Shapes: B images of 64 x 64 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qlip.data.public.scene_captions import FAMILIES, contradiction, parse_caption
from qlip.data.public.scenes import HARD, STANDARD
from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import Columns, Evaluator, MetricResult, Rows, mean
from qlip.evaluation.metrics.scenes import is_right, read_scene
from qlip.evaluation.models.base import RECONSTRUCT, EvalModel
from qlip.evaluation.models.batch import ModelBatch
from qlip.modeling import to_uint8


class ScenesRight(Evaluator):
    """The checker of :mod:`qlip.evaluation.metrics.scenes` on rebuilt images of captioned scenes.

    Metrics, in percent: ``scenes_right``, all images, and ``scenes_right_<family>``; ``scenes_drawn``, the same for the
    images that the model was given; and the control ``scenes_contradicted``, rebuilt images for which a caption with
    one change passes: another colour, size, cell or number, or the inverted relation.

    Args:
        design: ``standard``, four shapes; ``hard``, six.
    """

    name: ClassVar[str] = "scenes"
    needs: ClassVar[frozenset[str]] = frozenset({RECONSTRUCT})

    def __init__(self, design: Literal["standard", "hard"] = "standard") -> None:
        self.design = design

    def settings(self) -> Mapping[str, object]:
        """The design whose shapes are told apart."""
        return {"design": self.design}

    def rows(self, batch: ModelBatch) -> Columns:
        """``right``, ``drawn``, ``contradicted`` (B,) bool, and ``family`` (B,) int64, the place in `FAMILIES`."""
        design = HARD if self.design == "hard" else STANDARD
        images = {"right": batch.reconstruction.pixels, "drawn": batch.originals}
        seen = {
            name: [read_scene(one, design) for one in to_uint8(pixels).permute(0, 2, 3, 1).cpu().numpy()]
            for name, pixels in images.items()
        }
        descriptions = []
        for key, captions in zip(batch.keys, batch.captions, strict=True):
            if not captions:
                raise QLIPError(f"{self.name}: {key} has no caption; evaluate on captioned scenes, such as scenes:seen")
            descriptions.append(parse_caption(captions[0]))
        found = {
            name: [is_right(one, scene) for one, scene in zip(descriptions, scenes, strict=True)]
            for name, scenes in seen.items()
        }
        found["contradicted"] = [
            is_right(contradiction(one), scene) for one, scene in zip(descriptions, seen["right"], strict=True)
        ]
        columns = {name: torch.tensor(values) for name, values in found.items()}
        return columns | {"family": torch.tensor([FAMILIES.index(one.family) for one in descriptions])}

    def summarize(self, model: EvalModel, rows: Rows) -> MetricResult:
        """See :class:`Evaluator`."""
        result = MetricResult({})
        add_right(result, rows.column("right"), rows.column("family"))
        result.values["scenes_drawn"] = mean(rows.column("drawn"), unit="%", scale=100)
        result.values["scenes_contradicted"] = mean(rows.column("contradicted"), unit="%", better="lower", scale=100)
        return result


def add_right(result: MetricResult, right: Tensor, family: Tensor) -> None:
    """Add ``scenes_right`` and ``scenes_right_<family>``, percent.

    Args:
        result: gets the metrics.
        right: bool (N,).
        family: int64 (N,), the place in `FAMILIES`.
    """
    result.add_mean("scenes_right", right, unit="%", better="higher", scale=100)
    for number, name in enumerate(FAMILIES):
        if (family == number).any():
            result.values[f"scenes_right_{name}"] = mean(right[family == number], unit="%", better="higher", scale=100)
