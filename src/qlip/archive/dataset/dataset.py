"""Read a token dataset: `TokenDataset(path)[i]` is the indices of row i.

Shapes: B rows, N tokens a row, K groups a token, E numbers in an embedding.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from qlip.archive.dataset.completeness import warn_if_partial
from qlip.archive.dataset.layout import Layout
from qlip.archive.dataset.parquet_reader import CACHE_BYTES, Numbers, RowGroups, values_of
from qlip.archive.dataset.schema import DatasetInfo
from qlip.data.storage.storage import Storage
from qlip.errors import QLIPError, check_integer
from qlip.tokens.packing import packed_size, unpack_rows

NUMBERS = 4096
"""Rows of embeddings that are read at once."""


@dataclass(frozen=True)
class Row:
    """One row of a dataset.

    Attributes:
        key: the image's name in its source.
        view: index of the view among the image's views.
        tokens: packed bits, as `qlip.tokens.pack` makes them.
        grid: (height, width) in tokens.
        original_size: (width, height) of the image in pixels.
        captions: may be empty.
        label: or None.
        embedding: float16 (E,), or None.
        extra: text of the dataset's further columns by name; None where an image had none.
    """

    key: str
    view: int
    tokens: bytes = field(repr=False)
    grid: tuple[int, int]
    original_size: tuple[int, int]
    captions: tuple[str, ...] = ()
    label: str | None = None
    embedding: NDArray[np.float16] | None = field(default=None, repr=False, compare=False)
    extra: Mapping[str, str | None] = field(default_factory=dict)


class TokenDataset(Dataset[Tensor]):
    """Rows of a dataset by number, in the order of its parts; a map-style dataset of PyTorch.

    `dataset[i]` is int64 (N, K); `dataset[a:b]` and `dataset.batch(rows)` are int64 (B, N, K) if the rows have one
    grid. Pickles into workers. `missing` says which parts of the dataset are not there; a `QLIPWarning` does too.

    Args:
        address: the dataset's folder: a path, or an address that fsspec knows.
        group_size: bits per group of the indices, any divisor of a token's bits; the model's by default.
        storage: reads the files.
        cache_bytes: size of the cache of decoded columns.

    Raises:
        QLIPError: no dataset there, none of its parts is finished, or the group size does not divide.
    """

    def __init__(
        self,
        address: str | Path,
        group_size: int | None = None,
        *,
        storage: Storage | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.layout = Layout(str(address), storage)
        self.info: DatasetInfo = self.layout.read_info()
        self.group_size = self.info.group_size if group_size is None else check_integer("group_size", group_size)
        if self.info.bits_per_token % self.group_size:
            bits = self.info.bits_per_token
            divisors = ", ".join(str(size) for size in range(1, bits + 1) if bits % size == 0)
            raise QLIPError(
                f"{self.layout.address}: group_size {group_size} does not divide {bits} bits; take one of {divisors}"
            )
        entries = self.layout.manifest()
        self.missing = warn_if_partial(self.layout, entries)
        self.entries = [entry for entry in entries if entry.rows]
        self.groups = RowGroups(self.layout, self.info, self.entries, cache_bytes)
        if self.info.coding != "raw":
            _ = self._coder  # fails now if the tables are missing

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Tensor: ...
    def __getitem__(self, index: int | slice) -> Tensor:
        if isinstance(index, slice):
            try:
                return self.batch(range(*index.indices(len(self))))
            except (TypeError, ValueError):
                raise QLIPError(f"{self.layout.address}: {index}: slice with integers") from None
        return self.batch([index])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Tensor]:
        """Return indices of many rows of any grids; called by PyTorch's DataLoader."""
        return self.indices(rows)

    def __iter__(self) -> Iterator[Tensor]:
        for rows in self._runs():
            yield from self.indices(rows)

    def __repr__(self) -> str:
        return f"TokenDataset({self.layout.address!r}, {len(self):,} rows, groups of {self.group_size} bits)"

    def batch(self, rows: Sequence[int] | Numbers) -> Tensor:
        """Return indices of rows of one grid, int64 (B, N, K), in the given order.

        Raises:
            QLIPError: the rows are of several grids, or a part is damaged.
            IndexError: no such row.
        """
        wanted = self._rows(rows)
        if not len(wanted):
            height, width = self.info.grid or (0, 0)
            return unpack_rows(np.empty((0, 0), np.uint8), height * width, self.info.bits_per_token, self.group_size)
        if self.info.grid is None:
            grids = self.grids(wanted)
            if len({tuple(grid) for grid in grids.tolist()}) > 1:
                raise QLIPError(
                    f"{self.layout.address}: these rows are of several grids; ask for one at a time, or for "
                    "indices(rows), a list"
                )
            num_tokens = int(grids[0].prod())
        else:
            num_tokens = self.info.grid[0] * self.info.grid[1]
        return self._unpacked(self._matrix(wanted, num_tokens), num_tokens)

    def indices(self, rows: Sequence[int] | Numbers) -> list[Tensor]:
        """Indices of rows of any grids, int64 (N, K) each, in the order asked for."""
        wanted = self._rows(rows)
        if self.info.grid is not None:
            return list(self.batch(wanted))
        counts, found = self.grids(wanted).prod(axis=1), [Tensor()] * len(wanted)
        for num_tokens in np.unique(counts).tolist():
            places = np.flatnonzero(counts == num_tokens)
            unpacked = self._unpacked(self._matrix(wanted[places], num_tokens), num_tokens)
            for place, one in zip(places.tolist(), unpacked, strict=True):
                found[place] = one
        return found

    def packed(self, rows: Sequence[int] | Numbers) -> list[bytes]:
        """Packed bits of rows, for any dataset's coding; see `qlip.tokens.pack`."""
        wanted = self._rows(rows)
        stored: list[bytes] = self.groups.take(wanted, "tokens").to_pylist() if len(wanted) else []
        return stored if self.info.coding == "raw" else self._decoded(stored, wanted)

    def grids(self, rows: Sequence[int] | Numbers) -> NDArray[np.int64]:
        """Return (height, width) in tokens of rows, int64 (B, 2)."""
        wanted = self._rows(rows)
        if self.info.grid is not None:
            return np.tile(np.array(self.info.grid, np.int64), (len(wanted), 1))
        return _pairs(self.groups.take(wanted, "grid")) if len(wanted) else np.empty((0, 2), np.int64)

    def row(self, index: int) -> Row:
        """Return all columns of one row."""
        return self.rows([index])[0]

    def rows(self, rows: Sequence[int] | Numbers) -> list[Row]:
        """Return all columns of rows, in the given order."""
        wanted = self._rows(rows)
        if not len(wanted):
            return []
        nothing: list[Any] = [None] * len(wanted)
        captions, labels = self.captions_and_labels(wanted) if self.info.captions else ([()] * len(wanted), nothing)
        vectors = self.embeddings(wanted) if self.info.embedding_dim is not None else nothing
        sizes = _pairs(self.groups.take(wanted, "original_size")).tolist()
        names = self.info.columns or ()
        extra = [self.groups.objects(wanted, name) for name in names]
        columns = zip(
            self.keys(wanted),
            self.groups.take(wanted, "view").to_pylist(),
            self.packed(wanted),
            self.grids(wanted).tolist(),
            sizes,
            captions,
            labels,
            vectors,
            zip(*extra, strict=True) if extra else [()] * len(wanted),
            strict=True,
        )
        return [
            Row(
                key,
                view,
                tokens,
                (grid[0], grid[1]),
                (size[0], size[1]),
                texts,
                label,
                vector,
                dict(zip(names, more, strict=True)),
            )
            for key, view, tokens, grid, size, texts, label, vector, more in columns
        ]

    def keys(self, rows: Sequence[int] | Numbers | None = None) -> list[str]:
        """Return the keys of rows, of all by default."""
        wanted = self._rows(range(len(self)) if rows is None else rows)
        return self.groups.objects(wanted, "key")

    def captions_and_labels(self, rows: Sequence[int] | Numbers) -> tuple[list[tuple[str, ...]], list[str | None]]:
        """Return captions and labels of rows.

        Raises:
            QLIPError: the dataset was made without.
        """
        wanted = self._rows(rows)
        if not self.info.captions:
            raise QLIPError(f"{self.layout.address}: holds no captions; tokenise again with --captions")
        captions = self.groups.objects(wanted, "captions")
        return [tuple(texts or ()) for texts in captions], self.groups.objects(wanted, "label")

    def embeddings(self, rows: Sequence[int] | Numbers | None = None) -> NDArray[np.float16]:
        """Return the unit vectors of rows, of all by default: float16 (B, E).

        Raises:
            QLIPError: the dataset was made without.
        """
        if self.info.embedding_dim is None:
            raise QLIPError(f"{self.layout.address}: holds no embeddings; tokenise again with --embeddings")
        wanted = self._rows(np.arange(len(self)) if rows is None else rows)
        found = np.empty((len(wanted), self.info.embedding_dim), np.float16)
        for start in range(0, len(wanted), NUMBERS):
            array = self.groups.take(wanted[start : start + NUMBERS], "embedding")
            if array.null_count:
                raise QLIPError(f"{self.layout.address}: a row without its embedding; run `qlip tokens verify`")
            found[start : start + NUMBERS] = values_of(array.flatten()).reshape(-1, self.info.embedding_dim)
        return found

    def _rows(self, rows: Sequence[int] | Numbers) -> Numbers:
        where = self.layout.address
        if not isinstance(rows, np.ndarray):
            try:
                rows = np.array([operator.index(row) for row in rows], dtype=np.int64)
            except (TypeError, OverflowError):
                shown = repr(rows)[:70]
                raise QLIPError(f"{where}: rows {shown}: give a list of integers, such as [0]") from None
        elif rows.ndim != 1 or (len(rows) and rows.dtype.kind not in "iu"):
            kind = f"{rows.dtype} {rows.shape}"
            raise QLIPError(f"{where}: rows are a list of integers, not {kind}; for a mask write np.flatnonzero(mask)")
        rows = rows.astype(np.int64, copy=False)
        wanted = np.where(rows < 0, rows + len(self), rows)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            bad = rows[(wanted < 0) | (wanted >= len(self))][0]
            raise IndexError(f"row {bad} of {len(self):,}")
        return wanted

    def _runs(self) -> Iterator[Numbers]:
        """Yield all row numbers in order, in chunks."""
        for start in range(0, len(self), 1024):
            yield np.arange(start, min(start + 1024, len(self)))

    def _matrix(self, rows: Numbers, num_tokens: int) -> NDArray[np.uint8]:
        """Return packed bits of rows with the same number of tokens, uint8 (B, S)."""
        size = packed_size(num_tokens, self.info.bits_per_token)
        if self.info.token_bytes is None:
            packed = self.packed(rows)
            for row, data in zip(rows.tolist(), packed, strict=True):
                if len(data) != size:
                    raise QLIPError(f"{self._name(row)}: {len(data):,} bytes of tokens, and its grid asks for {size:,}")
            return np.frombuffer(b"".join(packed), np.uint8).reshape(-1, size)
        found = np.empty((len(rows), size), np.uint8)
        for places, part, group, inside in self.groups.scattered(rows):
            found[places] = fixed_size(self.groups.column(part, group, "tokens"))[inside]
        return found

    def _unpacked(self, packed: NDArray[np.uint8], num_tokens: int) -> Tensor:
        try:
            return unpack_rows(packed, num_tokens, self.info.bits_per_token, self.group_size)
        except QLIPError as error:
            raise QLIPError(f"{self.layout.address}: {error}; run `qlip tokens verify`") from None

    def _name(self, row: int) -> str:
        return f"{self.layout.address}: row {row:,} ({self.keys([row])[0]})"

    @cached_property
    def _coder(self) -> Any:
        from qlip.archive.dataset.entropy_coding import open_coder

        return open_coder(self.layout, self.info)

    def _decoded(self, stored: list[bytes], rows: Numbers) -> list[bytes]:
        """Decode entropy-coded tokens to packed bits."""
        grids = [(height, width) for height, width in self.grids(rows).tolist()]
        decoded: list[bytes] = self._coder.decode(stored, grids)
        return decoded

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_coder"}


def fixed_size(array: Any) -> NDArray[np.uint8]:
    """Convert a pyarrow array of fixed-size binary to uint8 (rows, bytes), without a copy."""
    size = array.type.byte_width
    data = np.frombuffer(array.buffers()[1], np.uint8)
    return data[array.offset * size : (array.offset + len(array)) * size].reshape(len(array), size)


def _pairs(array: Any) -> NDArray[np.int64]:
    return values_of(array.flatten()).reshape(-1, 2).astype(np.int64)


def check_dataset(dataset: object) -> TokenDataset:
    """Refuse what is no `TokenDataset`. Raises QLIPError."""
    if not isinstance(dataset, TokenDataset):
        raise QLIPError(f"{str(dataset)[:70]}: give a TokenDataset, not {type(dataset).__name__}")
    return dataset
