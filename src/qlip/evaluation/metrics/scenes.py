"""Exact checker of made scenes: which things an image shows, and whether they are what a caption says.

`read_scene` finds the things by distance from the background, and names each by the nearest colour of the palette and
the best of blurred templates of all shapes, sizes and offsets; `is_right` compares them with a `Description`. No
learned model takes part. Colours may be faded and edges soft: coverage is measured along each thing's own colour.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from qlip.data.public.scene_captions import RELATIONS, Description, Item, cell_of, holds
from qlip.data.public.scene_questions import NUMBERS, THIRDS, parse_question
from qlip.data.public.scenes import BACKGROUNDS, COLOURS, SIDE, Design, Scene, Thing, coverage_of
from qlip.errors import QLIPError, require

Floats = NDArray[np.float64]

CONTRAST = 0.3
"""Share of the palette's least distance from the background that a pixel of a thing has at least."""
NOISE = 3.0
"""Multiple of the background's noise that it has at least."""
LEAST = 18.0
"""RGB distance that it has at least."""
MIN_PIXELS, MIN_SIDE = 16, 6
"""Smallest component that counts as a thing."""
MIN_DICE = 0.80
"""Smallest soft Dice coefficient of a shape; below it the shape is unknown."""
BLUR = 0.8
"""Standard deviation of the templates' blur, pixels."""
SIDES = 3
"""Pixels by which a template's side may differ from the component's."""
SHIFTS = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Offsets of a template's centre from the component's, pixels."""
WINDOW = 44
"""Side of the square in which a component is compared with templates, pixels."""
UNKNOWN = "unknown"


@dataclass(frozen=True)
class SeenThing:
    """A thing in an image.

    Attributes:
        shape: name, or "unknown".
        colour, size: nearest names.
        side: of the bounding square, pixels.
        x, y: centre, pixels from the left and upper edge.
        dice: soft Dice coefficient with the best template.
    """

    shape: str
    colour: str
    size: str
    side: float
    x: float
    y: float
    dice: float


@dataclass(frozen=True)
class SeenScene:
    """Background and things of an image."""

    background: str
    things: tuple[SeenThing, ...]


def known_scene(scene: Scene) -> SeenScene:
    """Return a scene as :func:`read_scene` would see it without any error."""
    sides = scene.design.sizes
    things = (SeenThing(one.shape, one.colour, one.size, sides[one.size], one.x, one.y, 1.0) for one in scene.things)
    return SeenScene(scene.background, tuple(things))


def read_scene(image: NDArray[np.uint8], design: Design) -> SeenScene:
    """Find the things in an image.

    Args:
        image: uint8 (64, 64, 3), RGB.
        design: shapes and sizes that may occur.

    Returns:
        The nearest background, and the things in raster order of their first pixels.

    Raises:
        QLIPError: an image of another size or type.
    """
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise QLIPError(f"a made scene is {SIDE} x {SIDE} RGB in bytes, got {image.shape} {image.dtype}")
    ndimage = require("scipy.ndimage", extra="eval")
    pixels = image.astype(np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])  # (252, 3)
    level = np.median(border, 0)
    background = min(BACKGROUNDS, key=lambda name: float(np.linalg.norm(level - BACKGROUNDS[name])))
    away = np.linalg.norm(pixels - level, axis=-1)  # (H, W)
    noise = float(np.median(np.linalg.norm(border - level, axis=-1)))
    palette = {name: np.array(rgb, np.float64) for name, rgb in COLOURS.items()}
    contrast = min(float(np.linalg.norm(rgb - BACKGROUNDS[background])) for rgb in palette.values())
    inked = away > max(CONTRAST * contrast, NOISE * noise, LEAST)
    inked = ndimage.binary_opening(inked, np.ones((2, 2), bool))
    labels, count = ndimage.label(inked, np.ones((3, 3), bool))
    things = list[SeenThing]()
    for number, box in enumerate(ndimage.find_objects(labels, count), 1):
        mask = labels == number
        height, width = (one.stop - one.start for one in box)
        if mask.sum() < MIN_PIXELS or max(height, width) < MIN_SIDE:
            continue
        distances = away[mask]
        colour = np.median(pixels[mask][distances >= np.median(distances)], 0)
        name = min(palette, key=lambda one: float(np.linalg.norm(palette[one] - colour)))
        others = (labels > 0) & ~mask
        coverage = np.clip((pixels - level) @ (colour - level) / ((colour - level) @ (colour - level)), 0, 1)
        coverage[others | ~ndimage.binary_dilation(mask, np.ones((3, 3), bool), 2)] = 0
        things.append(_named(coverage, box, max(height, width), name, design))
    return SeenScene(background, tuple(things))


def _named(coverage: Floats, box: Sequence[slice], side: int, colour: str, design: Design) -> SeenThing:
    """The thing with the best template for a coverage map (H, W)."""
    centre_y, centre_x = ((one.start + one.stop) / 2 for one in box)  # pixels, multiples of a half
    top, left = (int(np.floor(one)) - WINDOW // 2 for one in (centre_y, centre_x))
    window = np.zeros((WINDOW, WINDOW))
    rows, columns = (slice(max(0, at), min(SIDE, at + WINDOW)) for at in (top, left))
    window[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = coverage[rows, columns]
    flat = window.ravel()
    own = flat @ flat
    best, found = -1.0, ("", 0.0, 0.0, 0.0)
    for shape in design.shapes:
        for one in range(max(MIN_SIDE, side - SIDES), side + SIDES + 1):
            templates, energy = _templates(shape, one)
            for down in SHIFTS:
                for right in SHIFTS:
                    y, x = centre_y - np.floor(centre_y) + down, centre_x - np.floor(centre_x) + right
                    place = int(2 * (y + 1)), int(2 * (x + 1))
                    dice = 2 * float(templates[place] @ flat) / float(own + energy[place])
                    if dice > best:
                        best = dice
                        found = (shape, float(one), np.floor(centre_x) + x, np.floor(centre_y) + y)
    shape, fitted, x, y = found
    size = min(design.sizes, key=lambda name: abs(design.sizes[name] - fitted))
    return SeenThing(shape if best >= MIN_DICE else UNKNOWN, colour, size, fitted, x, y, best)


@cache
def _templates(shape: str, side: int) -> tuple[Floats, Floats]:
    """Blurred coverage of a shape at offsets -1, -0.5, ..., 1.5 of its centre from the window's, down and right.

    Returns:
        (6, 6, WINDOW^2) templates, and their sums of squares (6, 6).
    """
    blurred = require("scipy.ndimage", extra="eval").gaussian_filter
    offsets = np.arange(-1, 2, 0.5)
    found = np.zeros((len(offsets), len(offsets), WINDOW * WINDOW))
    for i, down in enumerate(offsets):
        for j, right in enumerate(offsets):
            centre = WINDOW // 2
            found[i, j] = blurred(coverage_of(shape, side, centre + right, centre + down, WINDOW), BLUR).ravel()
    return found, (found**2).sum(-1)


def answer_question(text: str, things: Sequence[SeenThing | Thing]) -> str:
    """Answer a question about a made scene from the things that an image shows.

    Args:
        text: of :mod:`qlip.data.public.scene_questions`.
        things: in the image.

    Returns:
        The answer; "" if a thing that is named in the singular is not there once.

    Raises:
        QLIPError: not such a question.
    """
    kind, subjects = parse_question(text)
    named = [[one for one in things if subject.matches((one.colour, one.shape))] for subject in subjects]
    if kind == "exists":
        return "yes" if named[0] else "no"
    if kind == "count":
        return NUMBERS[len(named[0]) - 1] if 0 < len(named[0]) <= len(NUMBERS) else ""
    if any(len(one) != 1 for one in named):
        return ""
    first, last = named[0][0], named[-1][0]
    if kind == "colour" or kind == "shape":
        return first.colour if kind == "colour" else first.shape
    if kind == "relation":
        return next((one for one in RELATIONS if holds(one, last.x - first.x, last.y - first.y)), "")
    row, column = divmod(cell_of(first.x, first.y), 3)
    return THIRDS[kind][row if kind == "row" else column]


def is_right(description: Description, scene: SeenScene) -> bool:
    """Return whether an image shows what a caption says, and nothing else.

    The multiset of (colour, shape) must be the caption's, and so must the background, where it names one, and the size,
    cell, relation or order of sizes, for some assignment of the things to the caption's.
    """
    if description.background is not None and scene.background != description.background:
        return False
    wanted = Counter((one.colour, one.shape) for one in description.items)
    if wanted != Counter((one.colour, one.shape) for one in scene.things):
        return False
    if len(wanted) == 1:  # equal things: any order is as good
        return _fits(description, scene.things)
    return any(_fits(description, things) for things in permutations(scene.things))


def _fits(description: Description, things: Sequence[SeenThing]) -> bool:
    items = description.items
    if any((one.colour, one.shape) != (seen.colour, seen.shape) for one, seen in zip(items, things, strict=True)):
        return False
    first, last = things[0], things[-1]
    if description.family == "binding":
        return _in_order(items, first, last)
    if any(one.size not in (None, seen.size) for one, seen in zip(items, things, strict=True)):
        return False
    if description.cell is not None:
        return cell_of(first.x, first.y) == description.cell
    return description.relation is None or holds(description.relation, last.x - first.x, last.y - first.y)


def _in_order(items: Sequence[Item], first: SeenThing, last: SeenThing) -> bool:
    """Return whether the things named small and large differ in size that way; others must have the size named."""
    order = {"small": 0, "medium": 1, "large": 2}
    one, other = items[0].size, items[-1].size
    if one is None or other is None or one == other:
        return all(item.size in (None, seen.size) for item, seen in zip(items, (first, last), strict=True))
    return (first.side < last.side) == (order[one] < order[other]) and first.side != last.side
