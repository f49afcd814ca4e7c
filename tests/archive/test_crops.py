"""Views of an image: equal to the processor, and crops and mirror images equal to literal ones."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from qlip import QLIPError, QLIPProcessor
from qlip.archive.dataset.schema import Views
from qlip.archive.tokenize.crops import Normalizer, ViewMaker
from qlip.modeling import Preprocessing
from qlip.tokens import Fit, ImageCodec
from tests.data.samples import make_image

OWN = Preprocessing(
    (32, 32), 36, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), patch_size=8
)
SIZES = [(48, 40), (31, 90), (32, 32), (400, 33), (7, 9)]


def normalizer(dtype: torch.dtype = torch.float32) -> Normalizer:
    return Normalizer(OWN, torch.device("cpu"), dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fit", ["square", "keep-aspect"])
def test_view_maker__square_equals_the_processor(size: tuple[int, int], fit: str) -> None:
    image = make_image(3, size)
    (view,) = ViewMaker(OWN, Views(fit=fit))(image)  # type: ignore[arg-type]
    found = normalizer()(view[None])
    expected = QLIPProcessor(OWN)(image, keep_aspect=fit == "keep-aspect")["pixel_values"]
    assert torch.equal(found, expected)


def test_normalizer__equals_the_processor_for_every_value() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, None, :, None], 3, -1)  # (1, 1, 256, 3)
    plain = OWN.normalize(torch.from_numpy(ramp).permute(0, 3, 1, 2).float() / 255)
    assert torch.equal(normalizer()(ramp), plain)
    assert torch.equal(normalizer(torch.bfloat16)(ramp), plain.to(torch.bfloat16))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keep_aspect", [False, True])
def test_view_maker__size_equals_qlip_encode(size: tuple[int, int], keep_aspect: bool) -> None:
    image = make_image(4, size)
    views = Views(fit="keep-aspect" if keep_aspect else "square", size=(48, 64))
    (view,) = ViewMaker(OWN, views)(image)
    codec = ImageCodec(None, QLIPProcessor(OWN), "any")  # type: ignore[arg-type]  # the model is not asked
    fit = Fit("keep-aspect" if keep_aspect else "square", (48, 64))
    assert np.array_equal(view, np.asarray(codec.prepare(image, fit).image))


def test_view_maker__flip_is_the_mirror_image() -> None:
    image = make_image(5, (60, 44))
    one, two = ViewMaker(OWN, Views(crops="flip"))(image)
    assert np.array_equal(one, ViewMaker(OWN, Views())(image)[0]) and np.array_equal(two, one[:, ::-1])
    assert not np.array_equal(one, two)


@pytest.mark.parametrize("size", [None, (16, 24)])
def test_view_maker__ten_crops_of_the_image_and_its_mirror_image(size: tuple[int, int] | None) -> None:
    image = make_image(6, (70, 50))
    views = Views(crops="ten", crop_range=1.5, size=size)
    found = ViewMaker(OWN, views)(image)
    height, width = size or OWN.size
    if size is None:
        whole = replace(OWN, size=(48, 48), shortest_edge=54).resized(image)
    else:
        from PIL import ImageOps

        whole = ImageOps.fit(image, (36, 24), Image.Resampling.BICUBIC)

    def five(image: Image.Image) -> list[np.ndarray]:
        right, bottom = image.width - width, image.height - height
        corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), (round(right / 2), round(bottom / 2))]
        return [np.asarray(image.crop((x, y, x + width, y + height))) for x, y in corners]

    expected = [*five(whole), *five(whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT))]
    assert len(found) == 10 == views.count
    assert all(np.array_equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("given", [None, (64, 100)])
@pytest.mark.parametrize("size", SIZES)
def test_view_maker__tiles_are_the_codecs_in_raster_order(size: tuple[int, int], given: tuple[int, int] | None) -> None:
    image, views = make_image(7, size), Views(fit="tiles", tile=32, size=given)
    codec = ImageCodec(SimpleNamespace(image_size=32), QLIPProcessor(OWN), "any")  # type: ignore[arg-type]
    prepared = codec.prepare(image, Fit("tiles", given))
    rows, columns = prepared.tiles
    assert views.tiles_of(size) == (rows, columns) and (given is None or (rows, columns) == (2, 3))
    whole, found = np.asarray(prepared.image), ViewMaker(OWN, views)(image)
    assert len(found) == views.count_of(size) == rows * columns and ViewMaker(OWN, views).size == (32, 32)
    for number, tile in enumerate(found):
        top, left = (32 * place for place in divmod(number, columns))
        assert np.array_equal(tile, whole[top : top + 32, left : left + 32])


def test_view_maker__refuses_too_many_tiles() -> None:
    maker = ViewMaker(OWN, Views(fit="tiles", tile=1))
    assert len(maker(make_image(1, (64, 64)))) == 4096
    with pytest.raises(QLIPError, match="64 x 65 tiles of 1 x 1 pixels, and an image may have 4,096"):
        maker(make_image(1, (65, 64)))
    with pytest.raises(QLIPError, match="64 x 65 tiles"):
        ViewMaker(OWN, Views(fit="tiles", tile=1, size=(64, 65)))


def test_views__refuse_tiles_with_crops() -> None:
    with pytest.raises(ValueError, match="neither cropped nor mirrored"):
        Views(fit="tiles", crops="flip")
    with pytest.raises(ValueError, match="tile goes with fit: tiles"):
        Views(tile=32)
    assert Views(fit="tiles", tile=32).count is None and "tile" not in Views().model_dump()


def test_view_maker__refuses_a_size_that_is_no_multiple_of_the_patch() -> None:
    with pytest.raises(QLIPError, match="size 30 44: must be multiples of the patch, 8; try --size 32 48"):
        ViewMaker(OWN, Views(size=(30, 44)))
    assert ViewMaker(OWN, Views(size=(40, 48))).size == (40, 48)
    assert ViewMaker(OWN, Views(fit="keep-aspect")).size is None
