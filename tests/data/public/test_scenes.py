"""Made scenes: repeatable, things apart and inside, exact colours, edges covered in proportion."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from qlip.data.public import DATASETS, get, open_named, scenes
from qlip.data.public.scenes import HARD, SIDE, STANDARD, Design, Scene, Thing, draw, random_scene
from qlip.errors import QLIPError
from qlip.modeling.images import load_image


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(draw(scene))


def one(shape: str, size: str = "large", background: str = "black", x: float = 30, y: float = 33) -> Scene:
    return Scene(background, (Thing(shape, "red", size, x, y),), HARD)


def ink(scene: Scene) -> np.ndarray:
    """Red's share of each pixel of a scene on black, (H, W)."""
    return pixels(scene)[..., 0] / scenes.COLOURS["red"][0]


def test_scene_images__each_sample_is_a_function_of_its_number() -> None:
    source, again = open_named("scenes:train"), scenes.SceneImages("train")
    assert len(source) == 100_000 and source.name == "scenes:train"
    for index in (99_999, 3, 0):
        raw = source.read(index)
        assert raw == again.read(index) and raw.key == source.key(index)
        assert raw.captions == () and raw.label is None
        assert np.array_equal(np.asarray(load_image(raw.image)), pixels(again.scene(index)))
    assert source.read(0).image != source.read(1).image
    assert scenes.SceneImages("train").scene(5) != scenes.SceneImages("test").scene(5)


def test_scene_images__need_no_cache(cache: object) -> None:
    assert len(open_named("scenes:train")) == 100_000
    assert DATASETS["scenes"].build is None
    with pytest.raises(QLIPError, match="scenes: is drawn when it is read; there is nothing to fetch"):
        get("scenes", progress=False)


@pytest.mark.parametrize("design", [STANDARD, HARD])
def test_random_scene__things_are_apart_and_inside(design: Design) -> None:
    made = [random_scene(np.random.default_rng(seed), design) for seed in range(150)]
    for scene in made:
        for thing in scene.things:
            box = scene.box(thing)
            assert min(box) >= 2 and max(box) <= SIDE - 2
            assert (4 * thing.x).is_integer() and (4 * thing.y).is_integer()
        for first, second in itertools.combinations(map(scene.box, scene.things), 2):
            gaps = (second[0] - first[2], second[1] - first[3], first[0] - second[2], first[1] - second[3])
            assert max(gaps) >= 4
    things = [thing for scene in made for thing in scene.things]
    assert {len(scene.things) for scene in made} == set(range(1, design.max_things + 1))
    assert {thing.shape for thing in things} == set(design.shapes)
    assert {(thing.colour, thing.size) for thing in things} == set(itertools.product(scenes.COLOURS, design.sizes))


@pytest.mark.parametrize("background", ["black", "white"])
def test_draw__colours_are_exact(background: str) -> None:
    things = (Thing("square", "orange", "large", 20, 20), Thing("circle", "cyan", "small", 50, 50))
    array = pixels(Scene(background, things))
    assert array.shape == (SIDE, SIDE, 3)
    assert tuple(array[20, 20]) == scenes.COLOURS["orange"] and tuple(array[50, 50]) == scenes.COLOURS["cyan"]
    assert tuple(array[0, 0]) == tuple(array[63, 63]) == scenes.BACKGROUNDS[background]


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("square", 1.0),
        ("circle", np.pi / 4),
        ("triangle", 0.5),
        ("cross", 5 / 9),
        ("ring", np.pi / 4 * 0.7),
        ("bar", 0.36),
    ],
)
def test_draw__covers_the_area_of_the_shape_within_its_box(shape: str, area: float) -> None:
    scene = one(shape)
    left, upper, right, lower = map(int, scene.box(scene.things[0]))
    share = ink(scene)
    assert share[upper:lower, left:right].sum() == pytest.approx(area * 28**2, rel=0.03)
    assert share.sum() == pytest.approx(share[upper:lower, left:right].sum())


def test_draw__an_edge_between_pixels_is_blended() -> None:
    share = ink(one("square", x=30.25))
    assert share[33, 16] == pytest.approx(0.75, abs=0.01) and share[33, 44] == pytest.approx(0.25, abs=0.01)


def test_draw__a_shift_of_whole_pixels_shifts_the_image() -> None:
    scene = one("triangle", "small")
    thing = scene.things[0]
    moved = replace(scene, things=(replace(thing, x=thing.x + 9, y=thing.y - 5),))
    assert np.array_equal(np.roll(pixels(scene), (-5, 9), (0, 1)), pixels(moved))


@pytest.mark.parametrize("shape", HARD.shapes)
def test_coverage_of__near_the_shape_alone_equals_the_whole_canvas(shape: str) -> None:
    rng = np.random.default_rng(0)
    for side, canvas in itertools.product((7, 18, 40), (44, SIDE)):
        x, y = rng.integers(-40, 4 * canvas + 40, 2) / 4
        steps = (np.arange(canvas * 4) + 0.5) / 4
        across, down = np.meshgrid((steps - x) / (side / 2), (steps - y) / (side / 2))
        whole = scenes._inside(shape, across, down).reshape(canvas, 4, canvas, 4).mean((1, 3))
        np.testing.assert_array_equal(scenes.coverage_of(shape, side, x, y, canvas), whole)
