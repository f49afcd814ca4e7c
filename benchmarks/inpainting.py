"""Inpainting with 1, 4 and 16 candidates, scored by the exact checker: ``python -m benchmarks.inpainting``.

One thing of each scene is masked with a margin, and drawn from the scene's caption. A scene is right if the caption
still holds for the whole image, so the drawn thing must be the one that is missing, fit its kept edges, and nothing may
be added. All numbers of candidates see equal scenes, masks and first candidates. The bound is the tokens of the true
scene. Other programs on the machine disturb the times only.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import measure
from benchmarks.report import publish
from qlip.data.public.scene_captions import CaptionedScenes, Description
from qlip.data.public.scenes import SIDE, Scene, Thing, choose, draw
from qlip.evaluation.metrics.intervals import proportion_interval
from qlip.evaluation.metrics.scenes import is_right, read_scene
from qlip.lm.guidance import parse
from qlip.runtime.rng import generator
from qlip.t2i import Drawer
from qlip.t2i.inpaint import Edit

PAGE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- inpainting: begin -->", "<!-- inpainting: end -->"
MARGIN = 2
"""Pixels around a thing that are masked too."""


def main() -> None:
    """Measure, print the table, and write the file that was asked for."""
    options = _options()
    measure.prepare(options.threads, True)
    drawer = Drawer.from_pretrained(options.model, device="cpu")
    guidance = drawer.settings.guidance if options.guidance is None else options.guidance
    drawer.settings = drawer.settings.model_copy(update={"guidance": str(parse(guidance))})
    about = (
        f"{options.scenes} scenes of scenes:{options.split}, {drawer.name}, guidance {drawer.settings.guidance},"
        f" temperature {drawer.settings.temperature:g}"
    )
    lines = table(drawer, cases(drawer, options.split, options.scenes), options.candidates)
    publish(about, lines, PAGE, BEGIN, END, options.write)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inpainting", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="bundled", help="drawer (default: bundled)")
    parser.add_argument("--scenes", type=int, default=300, metavar="N", help="number of scenes (default: 300)")
    parser.add_argument("--split", default="seen", help="split of made scenes (default: seen)")
    parser.add_argument("--candidates", nargs="+", type=int, default=[1, 4, 16], help="(default: 1 4 16)")
    parser.add_argument("--guidance", help="scale or schedule (default: the drawer's)")
    parser.add_argument("--threads", type=int, default=1, help="number of PyTorch threads (default: 1)")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/README.md")
    return parser.parse_args()


@dataclass(frozen=True)
class Case:
    """A scene of which one thing is drawn."""

    description: Description
    scene: Scene
    edit: Edit


def cases(drawer: Drawer, split: str, count: int) -> list[Case]:
    """First scenes of a split, each with one of its things masked."""
    source, found = CaptionedScenes(split), []
    for index in range(count):
        description, scene = source.scene(index)
        thing = choose(generator("inpainting", split, index), scene.things)
        found.append(Case(description, scene, drawer.edit(draw(scene), mask_of(scene, thing))))
    return found


def mask_of(scene: Scene, thing: Thing) -> Image.Image:
    """Mask that is white on a thing's bounding square and a margin around it."""
    left, top, right, bottom = scene.box(thing)
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(
        255,
        (math.floor(left) - MARGIN, math.floor(top) - MARGIN, math.ceil(right) + MARGIN, math.ceil(bottom) + MARGIN),
    )
    return mask


def table(drawer: Drawer, given: Sequence[Case], numbers: Sequence[int]) -> Iterator[str]:
    """Draw with each number of candidates, and make the lines of the table."""
    holes = np.array([int(case.edit.hole.sum()) for case in given])
    tokens = drawer.decoder.config.num_tokens
    yield f"{holes.mean():.1f} of {tokens} tokens are drawn per scene, {holes.min()} to {holes.max()}."
    yield ""
    yield "| candidates | scenes right, % | 95% interval | seconds per image |"
    yield "|---|---|---|---|"
    for candidates in numbers:
        began = time.perf_counter()
        drawn = [_drawn(drawer, case, number, candidates) for number, case in enumerate(given)]
        seconds = (time.perf_counter() - began) / len(given)
        yield _line(str(candidates), right(drawer, given, drawn), f"{seconds:.3f}")
    yield _line("true tokens", right(drawer, given, [case.edit.indices for case in given]), "-")


def _drawn(drawer: Drawer, case: Case, number: int, candidates: int) -> Tensor:
    condition = drawer.condition([case.description.caption])
    edit = replace(case.edit, candidates=candidates)
    return drawer.draw(condition, edit=edit, numbers=[number])[0]


def right(drawer: Drawer, given: Sequence[Case], indices: Sequence[Tensor]) -> np.ndarray:
    """Whether each image shows what its caption says, bool (N,)."""
    images = [image for some in torch.stack(list(indices)).split(drawer.AT_ONCE) for image in drawer.images(some)]
    return np.array(
        [
            is_right(case.description, read_scene(np.asarray(image), case.scene.design))
            for case, image in zip(given, images, strict=True)
        ]
    )


def _line(name: str, hits: np.ndarray, seconds: str) -> str:
    low, high = proportion_interval(hits.astype(np.float64))
    interval = "-" if low is None or high is None else f"{100 * low:.0f} to {100 * high:.0f}"
    return f"| {name} | {100 * hits.mean():.1f} | {interval} | {seconds} |"


if __name__ == "__main__":
    main()
