"""Storage for torch.distributed.checkpoint without pickle: tensors in safetensors files, their index in JSON.

A folder holds ``<group>.safetensors``, or ``<group>.rank-<number>.safetensors`` if ranks hold shards, and
``index.json``: dtype, shape and pieces (file, offset, shape, checksum) of each tensor. The group of a tensor is the
first component of its name. PyTorch's own Hugging Face storage has no such index, so it does not detect missing or
damaged files.
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
    """A block of a tensor, stored in one file.

    Attributes:
        file: file name in the folder.
        offset, shape: position and size of the block in the whole tensor.
        crc32: checksum of the block's bytes.
    """

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    crc32: int


@dataclass(frozen=True)
class Entry:
    """Index entry of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def read_index(folder: Path) -> dict[str, Entry]:
    """Read the index of a folder: tensor name to entry.

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
        raise ValueError(f"{value['dtype']!r} is not a dtype")
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
    """Writes this rank's items of the plan; rank 0 writes the index once all ranks have written.

    Args:
        folder: created by rank 0.
        finish: called on rank 0 with the folder, after all files are written and flushed.
    """

    def __init__(self, folder: Path, finish: Callable[[Path], None]) -> None:
        self.folder, self._finish = folder, finish

    def reset(self, checkpoint_id: Any = None) -> None:
        """No-op: nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Create the folder, on rank 0."""
        if is_coordinator:
            self.folder.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Add to each rank's plan its rank and the groups that several ranks hold."""
        ranks: dict[str, set[int]] = defaultdict(set)
        for rank, plan in enumerate(plans):
            for item in plan.items:
                ranks[_group(item.index.fqn)].add(rank)
        spread = sorted(group for group, holders in ranks.items() if len(holders) > 1)
        return [replace(plan, storage_data={"rank": rank, "spread": spread}) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write and flush one file per group."""
        groups: dict[str, list[tuple[WriteItem, Tensor]]] = defaultdict(list)
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            if tensor.numel():  # with fewer rows than ranks, some ranks hold no row of a tensor
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
        assert len(tensors) == len(items), "a rank holds at most one block of each tensor"
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
        """Write the index, which completes the folder."""
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
        """Accept any path."""
        return True


class Reader(StorageReader):
    """Reads the blocks that the planner requests; verifies the checksum of each block that is read in full.

    Args:
        folder: written by :class:`Writer`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def reset(self, checkpoint_id: Any = None) -> None:
        """No-op: nothing is kept between loads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index in the form that planners expect."""
        stored: dict[str, Any] = {}
        pieces: dict[MetadataIndex, Piece] = {}
        for name, entry in read_index(self.folder).items():
            chunks = [ChunkStorageMetadata(torch.Size(one.offset), torch.Size(one.shape)) for one in entry.pieces]
            stored[name] = TensorStorageMetadata(TensorProperties(entry.dtype), torch.Size(entry.shape), chunks)
            pieces |= {MetadataIndex(name, one.offset): one for one in entry.pieces}
        return Metadata(stored, storage_data=pieces)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Store the locations of all pieces."""
        self._pieces: dict[MetadataIndex, Piece] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged."""
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
        """Accept any path."""
        return True


def read_whole(folder: Path, group: str) -> dict[str, Tensor]:
    """Assemble the tensors of a group from their pieces; keys are names without the group."""
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
        raise QLIPError(f"{folder / piece.file}: damaged (wrong checksum of {key!r})")
    return block


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; errors are raised with its path."""
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
