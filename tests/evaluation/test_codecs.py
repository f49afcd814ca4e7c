"""Codecs keep their bytes, count them honestly, and are worth more the more they get."""

from __future__ import annotations

import io
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch import Tensor

from qlip import QLIPError, assets
from qlip.evaluation.metrics.pixel import psnr
from qlip.evaluation.models.codecs import Codec, CodecEvalModel, at_equal_bytes, payload
from qlip.modeling import Preprocessing

PREPARED = Preprocessing((64, 64), 64)
CODECS: tuple[Codec, ...] = ("jpeg", "webp", *(("avif",) if features.check("avif") else ()))  # type: ignore[assignment]


@cache
def photographs(count: int = 3) -> tuple[Image.Image, ...]:
    paths = sorted(assets.path("images").glob("*.jpg"))[:count]
    return tuple(PREPARED.resized(Image.open(path).convert("RGB")) for path in paths)


def batch(count: int = 3) -> Tensor:
    return torch.stack([PREPARED.pixels(image) for image in photographs(count)])


def decibels(model: CodecEvalModel) -> Tensor:
    pixels = batch()
    return psnr(model.reconstruct(pixels).pixels, PREPARED.denormalize(pixels))


@pytest.mark.parametrize("codec", CODECS)
def test_codecs__the_budget_is_kept_and_more_bytes_are_worth_more(codec: Codec) -> None:
    figures = []
    for budget in (500, 1800) if codec == "avif" else (500, 900, 1800, 6000):
        model = CodecEvalModel(codec, budget, PREPARED)
        made = [model.best(image) for image in photographs()]
        for image, one in zip(photographs(), made, strict=True):
            assert one.num_bytes == payload(one.data, codec) <= budget
            if one.size == (64, 64) and one.quality < 100:  # the next file would not fit
                assert model.write(image, one.quality + 1).num_bytes > budget
        rebuilt = model.reconstruct(batch())
        assert rebuilt.num_bytes.tolist() == [one.num_bytes for one in made]
        assert rebuilt.pixels.shape == (3, 3, 64, 64) and rebuilt.pixels.dtype == torch.float32
        figures.append(decibels(model))
    for less, more in pairwise(figures):
        assert (more > less).all()


@pytest.mark.parametrize("codec", CODECS)
def test_codecs__what_is_rebuilt_is_what_pillow_reads_from_the_file(codec: Codec) -> None:
    model = CodecEvalModel(codec, 3000, PREPARED)
    one = model.best(photographs()[0])
    image = Image.open(io.BytesIO(one.data))
    assert image.format == codec.upper() and image.size == one.size == (64, 64)
    found = model.reconstruct(batch(1)).pixels[0].permute(1, 2, 0)
    np.testing.assert_allclose(found.numpy() * 255, np.asarray(image.convert("RGB")), atol=1e-3)


@pytest.mark.parametrize("codec", CODECS)
def test_codecs__few_bytes_are_kept_by_shrinking(codec: Codec) -> None:
    model = CodecEvalModel(codec, {"jpeg": 120, "webp": 100, "avif": 60}[codec], PREPARED)
    for image in photographs():
        one = model.best(image)
        assert one.size < (64, 64) and one.num_bytes <= model.num_bytes
    assert (decibels(model) > 10).all()
    assert "shrunk" in model.notes["psnr"] and "without headers" in model.notes["bits_per_pixel"]


def test_codecs__shrinking_is_only_done_where_it_is_nearer() -> None:
    model = CodecEvalModel("jpeg", 500, PREPARED)
    image = photographs()[1]
    kept, original = model.best(image), np.asarray(image, dtype=np.float64)
    for size in model.sizes[: model.sizes.index(kept.size)]:
        other = model._within(image, size)
        assert other is not None
        first, second = (np.square(model.decode(one) - original).mean() for one in (kept, other))
        assert first < second


@pytest.mark.parametrize("codec", CODECS)
def test_codecs__what_is_left_without_headers_is_the_images_own(codec: Codec) -> None:
    """Two images of one size and quality: what is not counted is equal, up to sizes written into it."""
    model = CodecEvalModel(codec, 4000, PREPARED)
    files = [model.write(image, 40) for image in photographs(2)]
    beside = 2 if codec == "jpeg" else 0
    left = [len(one.data) - (one.num_bytes - beside) for one in files]
    if codec == "webp":  # an odd chunk is filled up by a byte
        left = [number - one.num_bytes % 2 for number, one in zip(left, files, strict=True)]
    assert left[0] == left[1] > 15
    if codec == "jpeg":
        first, second = (one.data[: left[0] - 2] for one in files)
        assert first == second


def test_codecs__is_deterministic_and_its_fingerprint_says_what_it_is() -> None:
    model = CodecEvalModel("webp", 400, PREPARED)
    assert torch.equal(model.reconstruct(batch()).pixels, model.reconstruct(batch()).pixels)
    # alone as among others
    assert torch.equal(model.reconstruct(batch()).pixels[:1], model.reconstruct(batch(1)).pixels)
    others = [CodecEvalModel("webp", 401, PREPARED), CodecEvalModel("jpeg", 400, PREPARED)]
    prints = {one.fingerprint for one in (model, CodecEvalModel("webp", 400, PREPARED), *others)}
    assert len(prints) == 3


def test_codec__impossible_budgets_are_refused() -> None:
    with pytest.raises(QLIPError, match=r"^jpeg cannot keep 64x64 pixels within 4 bytes, not even grey ones at 4x4"):
        CodecEvalModel("jpeg", 4, PREPARED)
    assert CodecEvalModel("jpeg", 224, PREPARED).best(photographs()[0]).num_bytes <= 224
    with pytest.raises(QLIPError, match="gif: no such codec; choose jpeg, webp or avif"):
        CodecEvalModel("gif", 224, PREPARED)  # type: ignore[arg-type]
    models, others = at_equal_bytes(4, PREPARED)
    assert not models and set(others) == {"jpeg", "webp", "avif"}
    models, others = at_equal_bytes(224, PREPARED)
    assert [one.codec for one in models] == list(CODECS)


def test_codecs__an_image_that_does_not_fit_is_refused() -> None:
    patches = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).round() * 2 - 1
    loud = patches.repeat_interleave(16, 2).repeat_interleave(16, 3)
    with pytest.raises(QLIPError, match=r"^WebP, 22 bytes without headers: an image does not fit, not even 4x4"):
        CodecEvalModel("webp", 22, PREPARED).reconstruct(loud)
