"""Storage for torch.distributed.checkpoint without a pickle: safetensors for what ranks hold, JSON for where it is.

A folder holds ``<group>.safetensors``, or ``<group>.rank-<number>.safetensors`` where ranks hold shards, and
``index.json``: for each tensor its dtype, its shape, and its pieces (file, offset, shape, checksum). Its group is the
first part of its name. PyTorch's own Hugging Face storage keeps no such index: a lost file goes unnoticed, and so does
a damaged one.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from qlip.errors import QLIPError
from qlip.files import flush, write_text

INDEX = "index.json"


@dataclass(frozen=True)
class Piece:
    """A block of a tensor in a file.

    Attributes:
        file: name in the folder.
        offset, shape: of the block in the whole tensor.
        crc32: checksum of its bytes.
    """

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    crc32: int


@dataclass(frozen=True)
class Entry:
    """A tensor of the index."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def read_index(folder: Path) -> dict[str, Entry]:
    """All tensors of a folder by name.

    Raises:
        QLIPError: there is no index, or it is damaged.
    """
    path = folder / INDEX
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {name: _entry(value) for name, value in stored["tensors"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise QLIPError(f"{path}: damaged or missing ({error})") from None


def _entry(value: dict[str, Any]) -> Entry:
    pieces = [
        Piece(one["file"], tuple(one["offset"]), tuple(one["shape"]), int(one["crc32"])) for one in value["pieces"]
    ]
    if not pieces or any(Path(piece.file).name != piece.file for piece in pieces):
        raise ValueError("not an index")
    dtype = getattr(torch, str(value["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{value['dtype']!r} is no dtype")
    return Entry(dtype, tuple(value["shape"]), tuple(pieces))


def _write_index(folder: Path, entries: dict[str, Entry]) -> None:
    tensors = {
        name: {
            "dtype": str(entry.dtype).removeprefix("torch."),
            "shape": entry.shape,
            "pieces": [vars(piece) for piece in entry.pieces],
        }
        for name, entry in sorted(entries.items())
    }
    write_text(folder / INDEX, json.dumps({"tensors": tensors}) + "\n")


def crc32(tensor: Tensor) -> int:
    """Checksum of a contiguous CPU tensor's bytes."""
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


class Writer(StorageWriter):
    """Writes what the planner gives this rank, and, on the first rank, the index when all have written.

    Args:
        folder: made by the first rank.
        finish: called on the first rank with the folder when everything in it is written and flushed.
    """

    def __init__(self, folder: Path, finish: Callable[[Path], None]) -> None:
        self.folder, self._finish = folder, finish

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the folder."""
        if is_coordinator:
            self.folder.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell each rank its number and which groups lie on more than one rank."""
        ranks: dict[str, set[int]] = defaultdict(set)
        for rank, plan in enumerate(plans):
            for item in plan.items:
                ranks[_group(item.index.fqn)].add(rank)
        spread = sorted(group for group, holders in ranks.items() if len(holders) > 1)
        return [replace(plan, storage_data={"rank": rank, "spread": spread}) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write and flush a file a group."""
        groups: dict[str, list[tuple[WriteItem, Tensor]]] = defaultdict(list)
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            if tensor.numel():  # a rank beyond the rows of a small tensor holds nothing of it
                groups[_group(item.index.fqn)].append((item, tensor.detach().cpu().contiguous()))
        results = []
        for group, items in groups.items():
            suffix = f".rank-{plan.storage_data['rank']:05d}" if group in plan.storage_data["spread"] else ""
            results += self._write(f"{group}{suffix}.safetensors", items)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, file: str, items: list[tuple[WriteItem, Tensor]]) -> list[WriteResult]:
        tensors = {_key(item.index.fqn): tensor for item, tensor in items}
        assert len(tensors) == len(items), "a rank holds one block of a tensor"
        try:
            save_file(tensors, self.folder / file)
        except SafetensorError as error:  # it wraps the operating system's errors
            raise OSError(str(error)) from None
        flush(self.folder / file)
        return [
            WriteResult(
                item.index,
                tensor.nbytes,
                Piece(file, tuple(item.index.offset or ()), tuple(tensor.shape), crc32(tensor)),
            )
            for item, tensor in items
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index; nothing is complete before."""
        pieces: dict[str, list[Piece]] = defaultdict(list)
        for result in (result for of_rank in results for result in of_rank):
            pieces[result.index.fqn].append(result.storage_data)
        entries = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata), "only tensors are stored here"
            entries[name] = Entry(stored.properties.dtype, tuple(stored.size), tuple(pieces[name]))
        _write_index(self.folder, entries)
        self._finish(self.folder)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Any path."""
        return True


class Reader(StorageReader):
    """Reads what the planner asks for; a block read whole is checked against its checksum.

    Args:
        folder: written by :class:`Writer`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept between loads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, as planners want it."""
        stored: dict[str, Any] = {}
        pieces: dict[MetadataIndex, Piece] = {}
        for name, entry in read_index(self.folder).items():
            chunks = [ChunkStorageMetadata(torch.Size(one.offset), torch.Size(one.shape)) for one in entry.pieces]
            stored[name] = TensorStorageMetadata(TensorProperties(entry.dtype), torch.Size(entry.shape), chunks)
            pieces |= {MetadataIndex(name, one.offset): one for one in entry.pieces}
        return Metadata(stored, storage_data=pieces)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Remember where pieces are."""
        self._pieces: dict[MetadataIndex, Piece] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors, file by file."""
        files: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            files[self._pieces[item.storage_index].file].append(item)
        for file, items in files.items():
            with _opened(self.folder / file) as stored:
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(self._block(stored, item))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _block(self, stored: Any, item: ReadItem) -> Tensor:
        piece, key = self._pieces[item.storage_index], _key(item.storage_index.fqn)
        if tuple(item.lengths) == piece.shape:
            return _checked(stored, key, piece, self.folder)
        bounds = zip(item.storage_offsets, item.lengths, strict=True)
        block: Tensor = stored.get_slice(key)[tuple(slice(start, start + length) for start, length in bounds)]
        return block

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Any path."""
        return True


def read_whole(folder: Path, group: str) -> dict[str, Tensor]:
    """The tensors of a group, put together, by name without the group's."""
    files: dict[str, list[tuple[str, Piece]]] = defaultdict(list)
    whole: dict[str, Tensor] = {}
    for name, entry in read_index(folder).items():
        if _group(name) == group:
            whole[_key(name)] = torch.empty(entry.shape, dtype=entry.dtype)
            for piece in entry.pieces:
                files[piece.file].append((_key(name), piece))
    for file, pieces in files.items():
        with _opened(folder / file) as stored:
            for key, piece in pieces:
                block = whole[key]
                for axis, (start, length) in enumerate(zip(piece.offset, piece.shape, strict=True)):
                    block = block.narrow(axis, start, length)
                block.copy_(_checked(stored, key, piece, folder))
    return whole


def _checked(stored: Any, key: str, piece: Piece, folder: Path) -> Tensor:
    block: Tensor = stored.get_tensor(key)
    if tuple(block.shape) != piece.shape or crc32(block) != piece.crc32:
        raise QLIPError(f"{folder / piece.file}: damaged (the checksum of {key!r} is another)")
    return block


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file whose faults name it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise QLIPError(f"{path}: damaged or missing ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(getattr(error, "strerror", None) or error))


def _group(name: str) -> str:
    return name.partition("/")[0]


def _key(name: str) -> str:
    return name.partition("/")[2]
