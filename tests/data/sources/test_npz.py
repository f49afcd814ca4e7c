"""Images in one array of a NumPy file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlip.data.sources.npz import NpzImages
from qlip.data.sources.open import open_path
from qlip.errors import QLIPError
from qlip.modeling.images import load_image

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_images__every_pixel(tmp_path: Path, save: Any, order: Any) -> None:
    save(tmp_path / "samples.npz", np.asarray(IMAGES, order=order), np.zeros(3, np.int64))
    source = pickle.loads(pickle.dumps(open_path(f"{tmp_path}/samples.npz")))
    assert len(source) == 3 and source.key(2) == "samples-000002"
    for index in (2, 0, 1):
        assert np.array_equal(np.asarray(load_image(source.read(index).image)), IMAGES[index])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "has no array arr_0; it has mu"),
        ({"arr_0": IMAGES.astype(float)}, r"arr_0 is \(3, 4, 6, 3\) float64; images are \(N, H, W, 3\) uint8"),
        ({"arr_0": IMAGES[..., 0]}, r"arr_0 is \(3, 4, 6\) uint8"),
        ({"arr_0": np.array([{}], object)}, "cannot be read|arr_0 is"),
    ],
)
def test_npz_images__other_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(QLIPError, match=f"x.npz: ({message})"):
        NpzImages(tmp_path / "x.npz")


def test_npz_images__a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"nothing")
    np.savez(tmp_path / "cut.npz", IMAGES)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-30])
    for name in ("x.npz", "cut.npz", "gone.npz"):
        with pytest.raises(QLIPError, match=name):
            NpzImages(tmp_path / name)


@pytest.mark.parametrize("at", [0.3, 0.6])
def test_npz_images__damage_in_compressed_images_is_one_line(tmp_path: Path, at: float) -> None:
    np.savez_compressed(tmp_path / "x.npz", IMAGES.repeat(20, 0))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[int(at * len(data)) : int(at * len(data)) + 40] = b"\xff" * 40
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(QLIPError, match=r"x\.npz: cannot be read"):
        NpzImages(tmp_path / "x.npz")
