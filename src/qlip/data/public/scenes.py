"""Made scenes: coloured shapes on black or white, drawn when they are read, so that nothing is fetched or stored.

A `Scene` is a background and a few `Thing`s, of a `Design` (shapes, sizes, number of things). `random_scene` samples
one from a generator, `draw` renders it, and `SceneImages` is a source of fixed length: sample i is a function of the
split's name and i. Scenes with captions are in :mod:`qlip.data.public.scene_captions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qlip.data.public.builder import encode
from qlip.data.sources.base import CaptionedImages, RawSample
from qlip.runtime.rng import generator

SIDE = 64
"""Width and height of a scene, pixels."""
SUBPIXELS = 4
"""Coverage of a pixel is counted on a grid of 4 x 4; centres of things are on that grid."""
MARGIN = 2
"""Minimum distance of a thing from the edge, pixels."""
GAP = 4
"""Minimum distance between the bounding squares of two things, pixels."""
LENGTH = 100_000
"""Samples per split."""
TRIES = 50
"""Random places tried for a thing before the whole scene is drawn again."""

BACKGROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255)}
COLOURS = {
    "red": (225, 35, 35),
    "green": (25, 165, 60),
    "blue": (45, 85, 235),
    "purple": (150, 50, 200),
    "orange": (250, 140, 20),
    "cyan": (0, 190, 215),
}
"""Colours that stand out from both backgrounds and from each other."""

T = TypeVar("T")
Mask = NDArray[np.bool_]
Coordinates = NDArray[np.float64]


@dataclass(frozen=True)
class Design:
    """A family of scenes.

    Attributes:
        shapes: names of shapes.
        sizes: name -> side of the bounding square, pixels.
        max_things: maximum number of things in a scene.
    """

    shapes: tuple[str, ...]
    sizes: dict[str, int]
    max_things: int


STANDARD = Design(("circle", "square", "triangle", "cross"), {"small": 14, "medium": 18, "large": 26}, 5)
HARD = Design((*STANDARD.shapes, "ring", "bar"), {"small": 16, "medium": 20, "large": 28}, 3)


@dataclass(frozen=True)
class Thing:
    """A coloured shape; `x` and `y` are its centre in pixels from the left and upper edge."""

    shape: str
    colour: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """A background and things that do not touch."""

    background: str
    things: tuple[Thing, ...]
    design: Design = STANDARD

    def box(self, thing: Thing) -> tuple[float, float, float, float]:
        """Bounding square of a thing: left, upper, right, lower, pixels."""
        half = self.design.sizes[thing.size] / 2
        return (thing.x - half, thing.y - half, thing.x + half, thing.y + half)


def random_scene(rng: np.random.Generator, design: Design = STANDARD) -> Scene:
    """A scene of 1 to ``design.max_things`` things at free places; all choices are uniform.

    If the things do not fit, all are drawn again with new sizes, so crowded scenes have smaller ones.
    """
    background = choose(rng, tuple(BACKGROUNDS))
    count = 1 + int(rng.random() * design.max_things)
    while True:
        things: list[Thing] = []
        while len(things) < count and (thing := _placed(rng, things, design)) is not None:
            things.append(thing)
        if len(things) == count:
            return Scene(background, tuple(things), design)


def draw(scene: Scene) -> Image.Image:
    """Render a scene, RGB, 64 x 64; edges are blended by the share of a pixel that a shape covers."""
    pixels = np.broadcast_to(np.array(BACKGROUNDS[scene.background], np.float64), (SIDE, SIDE, 3))
    for thing in scene.things:
        coverage = coverage_of(thing.shape, scene.design.sizes[thing.size], thing.x, thing.y)[..., None]  # (H, W, 1)
        pixels = pixels + coverage * (np.array(COLOURS[thing.colour], np.float64) - pixels)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def coverage_of(shape: str, side: float, x: float, y: float, canvas: int = SIDE) -> NDArray[np.float64]:
    """Share of each pixel that a shape covers.

    Args:
        shape: name.
        side: of its bounding square, pixels.
        x, y: its centre, pixels from the left and upper edge.
        canvas: side of the square that is drawn on, pixels.

    Returns:
        (canvas, canvas) float64 in [0, 1].
    """
    covered = np.zeros((canvas, canvas))
    around = int(side / 2) + 2  # pixels from the centre's that the shape may touch
    starts, stops = ([min(canvas, max(0, int(at) + off)) for at in (x, y)] for off in (-around, around + 1))
    columns, rows = (
        (np.arange(start * SUBPIXELS, stop * SUBPIXELS) + 0.5) / SUBPIXELS  # sample points along an axis, pixels
        for start, stop in zip(starts, stops, strict=True)
    )
    across, down = np.meshgrid((columns - x) / (side / 2), (rows - y) / (side / 2))
    height, width = stops[1] - starts[1], stops[0] - starts[0]
    inside = _inside(shape, across, down).reshape(height, SUBPIXELS, width, SUBPIXELS)
    covered[starts[1] : stops[1], starts[0] : stops[0]] = inside.mean((1, 3))
    return covered


class SceneImages(CaptionedImages):
    """Scenes without captions, drawn when they are read; every fourth is of the hard design.

    Args:
        split: name of the split, which seeds the scenes.
    """

    def __init__(self, split: str) -> None:
        self.name, self.split = f"scenes:{split}", split

    def __len__(self) -> int:
        return LENGTH

    def key(self, index: int) -> str:
        """Number of the sample, six digits."""
        return f"{index:06d}"

    def scene(self, index: int) -> Scene:
        """Scene `index`, a function of the split and the index."""
        return random_scene(generator("scenes", self.split, index), HARD if index % 4 == 3 else STANDARD)

    def read(self, index: int) -> RawSample:
        """Draw sample `index`, a PNG file."""
        return RawSample(encode(draw(self.scene(index)), "png"), (), None, self.key(index))


def _placed(rng: np.random.Generator, others: list[Thing], design: Design) -> Thing | None:
    """A random thing at the minimum distance from the others; None if no place was found."""
    shape, colour, size = (choose(rng, names) for names in (design.shapes, tuple(COLOURS), tuple(design.sizes)))
    return placed(rng, shape, colour, size, others, design)


def placed(
    rng: np.random.Generator, shape: str, colour: str, size: str, others: Sequence[Thing], design: Design
) -> Thing | None:
    """A thing at a random place, at the minimum distance from the edge and the others; None if no place was found."""
    half = design.sizes[size] / 2
    low, span = MARGIN + half, SIDE - 2 * (MARGIN + half)
    for _ in range(TRIES):
        x, y = (round((low + rng.random() * span) * SUBPIXELS) / SUBPIXELS for _ in "xy")
        if all(max(abs(x - one.x), abs(y - one.y)) >= half + design.sizes[one.size] / 2 + GAP for one in others):
            return Thing(shape, colour, size, x, y)
    return None


def choose(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Choose an option; all are as probable."""
    return options[int(rng.random() * len(options))]  # random() alone, whose stream is equal in all numpy versions


def _inside(shape: str, x: Coordinates, y: Coordinates) -> Mask:
    """Sample points inside a shape, in coordinates where its bounding square is [-1, 1] x [-1, 1], y downwards."""
    square = np.maximum(abs(x), abs(y)) <= 1
    match shape:
        case "circle":
            return x**2 + y**2 <= 1
        case "square":
            return square
        case "triangle":
            return square & (2 * abs(x) <= y + 1)
        case "cross":
            return square & (np.minimum(abs(x), abs(y)) <= 1 / 3)
        case "ring":
            return (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.3)
        case "bar":
            return square & (abs(y) <= 0.36)
    raise AssertionError(shape)
