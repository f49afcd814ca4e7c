"""Images as a download may have damaged them: an error in one line or an image, never a crash of the training."""

from __future__ import annotations

import io
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from qlip.data import TrainTransform
from qlip.errors import QLIPError
from qlip.modeling.images import load_image
from tests.data.samples import encoded, make_image

TRANSFORM = TrainTransform((16, 16), (0.4, 1.0), flip=0.5)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on broken EXIF data
def test_load_image__mutated_files_are_errors_or_images_but_never_a_crash() -> None:
    """Training survives 3,000 files with changed, lost and added bytes."""
    whole = []
    for kind in ("png", "jpeg", "webp"):
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = 6, "a maker"
        buffer = io.BytesIO()
        make_image(3).save(buffer, kind, exif=exif)
        whole += [buffer.getvalue(), encoded(2, kind)]
    draw = random.Random(0)
    outcomes = Counter[bool]()
    for _ in range(3000):
        data = bytearray(draw.choice(whole))
        for _ in range(draw.choice((1, 1, 4, 16))):
            place, kind_of_harm = draw.randrange(len(data)), draw.random()
            if kind_of_harm < 0.6:
                data[place] = draw.randrange(256)
            elif kind_of_harm < 0.8:
                del data[max(1, place) :]
            else:
                data[place:place] = draw.randbytes(draw.randrange(1, 8))
        try:
            outcomes[TRANSFORM(load_image(bytes(data)), np.random.default_rng(0)).isfinite().all().item()] += 1
        except QLIPError as error:
            assert "\n" not in str(error)
            outcomes[False] += 1
    assert outcomes[True] > 100 and outcomes[False] > 100
