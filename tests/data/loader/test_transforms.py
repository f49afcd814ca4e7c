"""Transforms: deterministic, in bounds, and what the processor does where nothing is drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qlip.data import EvalTransform, TrainTransform
from qlip.data.loader.transforms import MAX_BLUR, blurred, centre_box, sharpened
from qlip.modeling.processor import Preprocessing, QLIPProcessor
from tests.data.samples import make_image


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_train_transform__equal_generators_give_equal_pixels() -> None:
    transform = TrainTransform((16, 20), (0.2, 1.0), flip=0.5)
    first, again, other = (transform(make_image(1, (50, 40)), rng(seed)) for seed in (3, 3, 4))
    assert first.shape == (3, 16, 20) and first.dtype == torch.float32
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_train_transform__number_of_draws_does_not_depend_on_the_image() -> None:
    """So that a caption drawn after the pixels is the same whatever the image's size."""
    transform = TrainTransform((16, 16), (0.2, 1.0), flip=0.5)
    after = []
    for size in ((50, 40), (1, 300), (300, 1)):
        generator = rng(1)
        transform(make_image(1, size), generator)
        after.append(generator.random())
    assert len(set(after)) == 1


@given(
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    target=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    scale=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(sorted),
    seed=st.integers(0, 2**32),
)
def test_crop__inside_the_image_and_of_the_asked_share(
    size: tuple[int, int], target: tuple[int, int], scale: list[float], seed: int
) -> None:
    transform = TrainTransform(target, (scale[0], scale[1]))
    left, upper, right, lower = transform.crop(size, rng(seed))
    assert 0 <= left < right <= size[0] and 0 <= upper < lower <= size[1]
    width, height = right - left, lower - upper
    if min(width, height) > 20 and (left, upper) != ((size[0] - width) // 2, (size[1] - height) // 2):
        share, aspect = width * height / (size[0] * size[1]), width / height * target[0] / target[1]
        assert scale[0] - 0.1 <= share <= scale[1] + 0.1
        assert 3 / 4 * 0.9 <= aspect <= 4 / 3 * 1.1


def test_crop__covers_scales_and_places_evenly() -> None:
    transform = TrainTransform((8, 8), (0.25, 1.0), (1.0, 1.0))
    boxes = [transform.crop((400, 400), rng(seed)) for seed in range(2000)]
    shares = [(right - left) * (lower - upper) / 160_000 for left, upper, right, lower in boxes]
    assert abs(np.mean(shares) - 0.625) < 0.02 and min(shares) < 0.27 and max(shares) > 0.98
    centres = [(left + right) / 2 for left, _, right, _ in boxes]
    assert abs(np.mean(centres) - 200) < 4


def test_train_transform__whole_image_of_the_target_size_is_unchanged() -> None:
    image = make_image(5, (32, 32))
    pixels = TrainTransform((32, 32), (1.0, 1.0), (1.0, 1.0))(image, rng())
    expected = torch.from_numpy(np.asarray(image, np.float32)).permute(2, 0, 1) / 255
    assert torch.equal(pixels, (expected - 0.5) / 0.5)


def test_train_transform__flips_as_often_as_asked() -> None:
    image = make_image(5, (32, 32))
    plain = TrainTransform((32, 32), (1.0, 1.0), (1.0, 1.0))(image, rng())
    transform = TrainTransform((32, 32), (1.0, 1.0), (1.0, 1.0), flip=0.3)
    results = [transform(image, rng(seed)) for seed in range(400)]
    flipped = [result for result in results if not torch.equal(result, plain)]
    assert 0.2 < len(flipped) / 400 < 0.4
    assert all(torch.equal(result, plain.flip(-1)) for result in flipped)
    assert all(result.is_contiguous() for result in results)


def test_to_pixels__normalises_per_channel() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)
    image = Image.new("RGB", (8, 8), (51, 102, 153))
    pixels = TrainTransform((8, 8), mean=mean, std=std)(image, rng())
    expected = [(value / 255 - m) / s for value, m, s in zip((51, 102, 153), mean, std, strict=True)]
    assert torch.allclose(pixels[:, 3, 3], torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("size", [(1000, 900), (64, 64), (300, 7), (1, 1)])
def test_resize__reducing_gap_changes_almost_nothing(size: tuple[int, int]) -> None:
    image = make_image(7, size)
    transform = TrainTransform((32, 32), (0.5, 1.0))
    box = transform.crop(image.size, rng(2))
    exact = image.resize((32, 32), Image.Resampling.BICUBIC, box=box)
    difference = (
        transform(image, rng(2)) * 127.5 + 127.5 - torch.from_numpy(np.asarray(exact, np.float32)).permute(2, 0, 1)
    )
    assert difference.abs().mean() < 1.0


def test_eval_transform__equals_the_processor() -> None:
    for preprocessing in (Preprocessing((32, 32), 32), Preprocessing((24, 40), None)):
        processor, transform = QLIPProcessor(preprocessing), EvalTransform(preprocessing)
        for size in ((64, 48), (20, 33), (500, 31)):
            image = make_image(3, size)
            assert torch.equal(transform(image), processor(images=image)["pixel_values"][0])
        assert transform.size == preprocessing.size


@given(size=st.tuples(st.integers(1, 500), st.integers(1, 500)), aspect=st.floats(0.1, 10))
def test_centre_box__is_the_largest_of_its_shape(size: tuple[int, int], aspect: float) -> None:
    left, upper, right, lower = centre_box(size, aspect)
    width, height = right - left, lower - upper
    assert left >= 0 and upper >= 0 and right <= size[0] and lower <= size[1] and width >= 1 and height >= 1
    assert width == size[0] or height == size[1] or math.isclose(width / height, aspect, rel_tol=0.5)
    assert abs(left - (size[0] - right)) <= 1 and abs(upper - (size[1] - lower)) <= 1


def detailed() -> Image.Image:
    """Noise around middle grey, enlarged from 40 to 64 pixels."""
    noise = rng(3).integers(90, 166, (40, 40, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)


def detail(image: Image.Image) -> float:
    """Mean absolute difference of neighbouring pixels."""
    array = np.asarray(image, np.float64)
    return float(np.abs(np.diff(array, axis=0)).mean() + np.abs(np.diff(array, axis=1)).mean())


def test_blurred_and_sharpened__lose_and_gain_detail() -> None:
    image = detailed()
    levels = [detail(blurred(image, factor)) for factor in (1.0, 1.5, MAX_BLUR)]
    assert levels[0] == detail(image) and levels[0] > levels[1] > levels[2]
    strengths = [detail(sharpened(image, 1.0, percent)) for percent in (0, 40, 200)]
    assert strengths[0] == detail(image) and strengths[0] < strengths[1] < strengths[2]
    assert blurred(Image.new("RGB", (1, 1)), 2.0).size == (1, 1)


def test_filtered__no_draws_without_filters() -> None:
    """Neither pixels nor the numbers drawn afterwards change."""
    image, generator, expected = make_image(1, (50, 40)), rng(7), rng(7)
    TrainTransform((16, 16), flip=0.5)(image, generator)
    expected.random((10, 4)), expected.random()
    assert generator.random() == expected.random()


def test_filtered__draws_three_numbers_in_any_case() -> None:
    image, done = make_image(1, (50, 40)), set()
    for seed in range(30):
        generator, expected = rng(seed), rng(seed)
        plain = TrainTransform((16, 16))(image, rng(seed))
        filtered = TrainTransform((16, 16), blur=0.3, sharpen=0.3)(image, generator)
        expected.random((10, 4)), expected.random(), expected.random(3)
        assert generator.random() == expected.random()
        done.add(torch.equal(plain, filtered))
    assert done == {True, False}


def test_filtered__filters_are_as_frequent_as_their_probabilities() -> None:
    image = detailed()
    transform, usual = TrainTransform((64, 64), blur=0.2, sharpen=0.5), detail(image)
    found = [detail(transform.filtered(image, rng(seed))) for seed in range(300)]
    assert 0.12 < sum(level < usual for level in found) / 300 < 0.25, "a blur by nearly 1 changes nothing"
    assert 0.44 < sum(level > usual for level in found) / 300 < 0.56
