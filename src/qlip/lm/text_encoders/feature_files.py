"""Files of features: one per text, with its n real positions, as an array of NumPy, float32 (1, n, C).

LlamaGen's scripts store features in this form, and `StoredFeatures` reads them. `CachedTextEncoder` writes and reads
such files too.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.files import cache_folder, encodable, write_bytes
from qlip.lm.text_encoders.base import AT_ONCE, TextEncoder, TextFeatures, check_texts
from qlip.runtime.finite import is_finite

CHECKSUM = 4
"""Bytes of the CRC-32 at the end of a file of the cache."""


class CachedTextEncoder:
    """A text encoder whose features of a text are computed once, and then read from disk.

    Files are whole or absent, so processes may share them. They end with a checksum, which NumPy does not read: the
    features of a damaged file are computed again.

    Args:
        encoder: to compute features with.
        folder: of the files of all encoders; by default in the cache folder.
    """

    def __init__(self, encoder: TextEncoder, folder: Path | None = None) -> None:
        self.encoder = encoder
        self.name, self.size, self.length = encoder.name, encoder.size, encoder.length
        self.fingerprint = encoder.fingerprint
        self.folder = (folder or cache_folder() / "text-features") / self.fingerprint

    def features(self, texts: Sequence[str]) -> TextFeatures:
        """See :class:`TextEncoder`; equal to the encoder's to the bit."""
        check_texts(texts)
        rows = {text: self._stored(text) for text in dict.fromkeys(texts)}
        absent = [text for text, row in rows.items() if row is None]
        for start in range(0, len(absent), AT_ONCE):
            block = absent[start : start + AT_ONCE]
            for text, values, mask in zip(block, *self.encoder.features(block), strict=True):
                rows[text] = row = values[mask]
                with suppress(QLIPError):  # a cache that cannot be written costs time, nothing else
                    self._store(text, row)
        return padded([row for text in texts if (row := rows[text]) is not None], self.length, self.size)

    def unread(self, text: str, cut: bool = False) -> str | None:
        """See :class:`TextEncoder`."""
        return self.encoder.unread(text, cut)

    def _stored(self, text: str) -> Tensor | None:
        path = self._path(text)
        try:
            data = path.read_bytes()
            if zlib.crc32(data[:-CHECKSUM]) == int.from_bytes(data[-CHECKSUM:]):
                return features_of(data, str(path), self.length, self.size)
        except (OSError, QLIPError):
            pass
        return None

    def _store(self, text: str, values: Tensor) -> None:
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, values[None].numpy(), allow_pickle=False)
        data = buffer.getvalue()
        write_bytes(self._path(text), data + zlib.crc32(data).to_bytes(CHECKSUM), durable=False)

    def _path(self, text: str) -> Path:
        key = hashlib.sha256(encodable(text).encode()).hexdigest()
        return self.folder / key[:2] / f"{key[2:]}.npy"


class StoredFeatures:
    """Features of captions that were computed before, as LlamaGen's ``FOLDER/{stem of the list}/{line}.npy``.

    Args:
        folder: of the files.
        size: C; LlamaGen's FLAN-T5-XL has 2,048.
        length: T; positions behind it are cut off, as LlamaGen does.

    Attributes:
        faults: number of files so far that were absent or broken.
    """

    def __init__(self, folder: Path, size: int = 2048, length: int = 120) -> None:
        if not folder.is_dir():
            raise QLIPError(f"{folder}: no such folder; give the folder of the features")
        self.folder, self.size, self.length, self.faults = folder, size, length, 0

    def features(self, names: Sequence[str]) -> tuple[Tensor, Tensor, list[str | None]]:
        """Read the features of captions.

        Args:
            names: B paths in the folder, without the suffix: ``{stem}/{line}``.

        Returns:
            Features and mask, see `TextFeatures`, and per caption what is wrong with its file, or None. A caption with
            a fault has no real position: leave it out.
        """
        rows, faults = list[Tensor](), list[str | None]()
        for name in names:
            try:
                rows.append(self._read(self.folder / f"{name}.npy"))
                faults.append(None)
            except QLIPError as error:
                rows.append(torch.empty(0, self.size))
                faults.append(str(error))
                self.faults += 1
        return *padded(rows, self.length, self.size), faults

    def _read(self, path: Path) -> Tensor:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise QLIPError(f"{path}: {error.strerror or error}; write the features of this caption") from None
        return features_of(data, str(path), self.length, self.size)


def features_of(data: bytes, where: str, length: int, size: int) -> Tensor:
    """Read the features of a text.

    Args:
        data: content of a file.
        where: its name, for errors.
        length: T; positions behind it are cut off.
        size: C.

    Returns:
        float32 (n, C).

    Raises:
        QLIPError: no array, one of another shape or type, or values that are not finite.
    """
    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception:  # noqa: BLE001 (a damaged header fails in many ways)
        raise QLIPError(f"{where}: not an array of NumPy, or cut off; write it again") from None
    if array.ndim != 3 or len(array) != 1 or array.shape[-1] != size or not array.shape[1] or array.dtype.kind != "f":
        raise QLIPError(f"{where}: {array.dtype} {array.shape}: need features (1, n, {size}) of floating point")
    values = torch.from_numpy(array[0, :length].astype(np.float32))
    if not is_finite(values):
        raise QLIPError(f"{where}: features hold NaN or infinite values; write it again")
    return values


def padded(rows: Sequence[Tensor], length: int, size: int) -> TextFeatures:
    """Join the features of texts, (n, C) each with n at most T, to (B, T, C) and their mask (B, T)."""
    values, mask = torch.zeros(len(rows), length, size), torch.zeros(len(rows), length, dtype=torch.bool)
    for place, row in enumerate(rows):
        values[place, length - len(row) :] = row
        mask[place, length - len(row) :] = True
    return values, mask
