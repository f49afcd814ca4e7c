"""Images in one array of a NumPy file, ``arr_0`` (N, H, W, 3) uint8, as ADM's samples and references have them."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from qlip.data.sources.base import CaptionedImages, RawSample, stamp_of
from qlip.data.storage.storage import local_path
from qlip.errors import QLIPError
from qlip.files import refuse_special

IMAGES = "arr_0"
_DAMAGE = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)
"""Errors of reading a damaged file."""


class NpzImages(CaptionedImages):
    """Images of an ``.npz`` file in order, without captions; keys are ``NAME-000000``. Nothing is unpickled.

    Args:
        path: of the file.
        name: of the source; by default the path.

    Raises:
        QLIPError: no such file, or no images (N, H, W, 3) uint8 in ``arr_0``.
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path, self.name = str(local_path(path)), name or str(path)
        self._images: Any = None
        self._count = len(self._opened())

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"_images": None}

    def key(self, index: int) -> str:
        return f"{Path(self.path).stem}-{index:06d}"

    def read(self, index: int) -> RawSample:
        image = np.ascontiguousarray(self._opened()[index])
        height, width = image.shape[:2]
        return RawSample(b"P6 %d %d 255\n" % (width, height) + image.tobytes(), (), None, self.key(index))  # PPM

    def stamp(self, index: int) -> str:
        return stamp_of(self.path)

    def _opened(self) -> Any:
        if self._images is None:
            self._images = _mapped(self.path) if _is_stored(self.path) else read_npz(self.path, IMAGES)[IMAGES]
            shape = self._images.shape
            if self._images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
                raise QLIPError(f"{self.path}: {IMAGES} is {shape} {self._images.dtype}; images are (N, H, W, 3) uint8")
        return self._images


def arrays_in(path: str | Path) -> list[str]:
    """Names of the arrays in an ``.npz`` file. Raises QLIPError: no such file, or none of NumPy's."""
    refuse_special(path)
    try:
        with zipfile.ZipFile(path) as file:
            return [name.removesuffix(".npy") for name in file.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise QLIPError(f"{path}: {getattr(error, 'strerror', None) or 'no .npz file'}; fetch it again") from None


def read_npz(path: str | Path, *names: str) -> dict[str, Any]:
    """Read arrays of an ``.npz`` file. Raises QLIPError: they are not there, damaged, or would have to be unpickled."""
    if missing := [name for name in names if name not in (found := arrays_in(path))]:
        raise QLIPError(f"{path}: has no array {missing[0]}; it has {', '.join(found) or 'none'}")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except _DAMAGE as error:
        raise QLIPError(f"{path}: cannot be read ({error}); fetch it again") from None


def _is_stored(path: str) -> bool:
    """Return whether the images are not compressed, so that they can be read in place."""
    if IMAGES not in arrays_in(path):
        return False
    with zipfile.ZipFile(path) as file:
        return file.getinfo(f"{IMAGES}.npy").compress_type == zipfile.ZIP_STORED


def _mapped(path: str) -> Any:
    """Map the images of a file into memory: there may be more than fit."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read_header(file)
            in_entry, entry = file.tell(), archive.getinfo(f"{IMAGES}.npy").header_offset
        with open(path, "rb") as raw:
            raw.seek(entry + 26)
            lengths = raw.read(4)
        offset = entry + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little") + in_entry
        return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
    except _DAMAGE as error:
        raise QLIPError(f"{path}: cannot be read ({error}); fetch it again") from None
