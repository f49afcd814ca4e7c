"""One pass over a set for all evaluators: in chunks, stored as it goes, shared among processes.

A chunk is so many consecutive positions of the set, and always runs through the model alone, in batches cut the same
way. Its rows are therefore the same numbers whoever computes them, whenever: a killed measurement goes on with the
first chunk that is missing, and any number of processes give figures that are equal to the last digit. A chunk whose
images were replaced since is computed again, where its source can tell (`CaptionedImages.stamp`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from qlip.data.loader.eval_set import EvalBatch, EvalSet
from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import Chunk, Columns, Evaluator, MetricResult, Rows, checked
from qlip.evaluation.models.base import EvalModel
from qlip.files import write_bytes, write_text

CHUNK = 256
"""Images; part of the protocol only through batches, which never cross a chunk's border."""
PLAN = "plan.json"


@dataclass(frozen=True)
class PassResult:
    """What a pass gave.

    Attributes:
        metric_results: by evaluator's name.
        count: images that were measured.
        broken: (key, reason) of those that could not be.
        digest: SHA-256 (hex) of all images' files and keys, in order.
    """

    metric_results: dict[str, MetricResult]
    count: int
    broken: list[tuple[str, str]]
    digest: str


def measure(
    model: EvalModel,
    data: EvalSet,
    evaluators: Sequence[Evaluator],
    *,
    folder: Path | None = None,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
    batch_size: int = 64,
    num_workers: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> PassResult | None:
    """Run all evaluators over a set.

    Args:
        model: in eval mode.
        data: prepared as the model says.
        evaluators: that the model can serve.
        folder: keeps rows, so that a killed pass goes on; None keeps them in memory, for one process.
        rank, world: this process and their number; each takes every world-th chunk.
        barrier: returns when all processes have come to it.
        batch_size: images at once; part of the plan, for floats may depend on it in their last digits.
        num_workers: of the loader.
        advance: called with the number of images done, stored ones included.

    Returns:
        What was found; None on all ranks but the first.

    Raises:
        QLIPError: a model that cannot serve, a folder of another measurement, several processes without a folder,
            or not one image that could be read.
    """
    checked(evaluators, model)
    if folder is None and world > 1:
        raise QLIPError("several processes need a folder that all of them see; give --output")
    store, starts = _Store(folder), _starts(data)
    if rank == 0 and folder is not None:  # nothing is kept otherwise, and a fingerprint is of all weights
        claim(model, data, evaluators, folder, batch_size)
    barrier()
    mine = _parts(data, starts[rank::world])
    todo = _todo(data, store, mine)
    advance(sum(len(part) for start, part in mine.items() if start not in todo))
    _compute(model, data, evaluators, store, todo, batch_size, num_workers, advance)
    barrier()
    if rank:
        return None
    metric_results: dict[str, MetricResult] = {}
    for evaluator in evaluators:
        rows = Rows(lambda name=evaluator.name: (_of(chunk, name) for chunk in store.chunks(starts)))  # type: ignore[misc]
        if not len(rows):
            raise QLIPError(f"{data.source.name}: not one picture could be read; look at one with qlip info")
        metric_results[evaluator.name] = evaluator.summarize(model, rows)
    count, broken, digest = 0, [], hashlib.sha256()
    for chunk in store.chunks(starts):
        count += len(chunk)
        broken += chunk.broken
        digest.update(chunk.digest.encode())
    return PassResult(metric_results, count, broken, digest.hexdigest())


def claim(model: EvalModel, data: EvalSet, evaluators: Sequence[Evaluator], folder: Path, batch_size: int) -> None:
    """Say in a folder what its rows depend on, or refuse rows of something else.

    Raises:
        QLIPError: the folder holds rows of another measurement.
    """
    _Store.claim(folder, _plan(model, data, evaluators, batch_size))


def missing(data: EvalSet, folder: Path) -> dict[int, range]:
    """Chunks that are not in a folder, or that are of images which were replaced since: positions by the first one.

    Args:
        data: the set.
        folder: of its rows.
    """
    parts = _parts(data, _starts(data))
    return {start: parts[start] for start in _todo(data, _Store(folder), parts)}


def compute(
    model: EvalModel,
    data: EvalSet,
    evaluators: Sequence[Evaluator],
    folder: Path,
    starts: Sequence[int],
    batch_size: int,
    num_workers: int = 0,
) -> None:
    """Store the rows of some chunks: a share of a pass, wherever it is computed.

    Args:
        model, data, evaluators, batch_size, num_workers: as for :func:`measure`.
        folder: that was claimed for them.
        starts: first positions of the chunks.
    """
    store = _Store(folder)
    _compute(model, data, evaluators, store, _stamps(data, store, _parts(data, starts)), batch_size, num_workers)


def _compute(
    model: EvalModel,
    data: EvalSet,
    evaluators: Sequence[Evaluator],
    store: _Store,
    stamps: Mapping[int, str],
    batch_size: int,
    num_workers: int,
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    """Chunks by their first positions, with stamps from before their images are read."""
    parts = _parts(data, stamps)
    batches = data.batches(batch_size, num_workers, parts=list(parts.values()))
    for start, part in parts.items():
        some = islice(batches, -(-len(part) // batch_size))
        store.put(_chunk(model, evaluators, start, some), stamps[start])
        advance(len(part))


def _starts(data: EvalSet) -> range:
    return range(0, len(data), CHUNK)


def _parts(data: EvalSet, starts: Iterable[int]) -> dict[int, range]:
    return {start: range(start, min(start + CHUNK, len(data))) for start in starts}


def _stamps(data: EvalSet, store: _Store, parts: Mapping[int, range]) -> dict[int, str]:
    """What tells a chunk's images from others under their names; in memory nothing outlasts them."""
    return {start: "" if store.folder is None else data.stamp(part) for start, part in parts.items()}


def _todo(data: EvalSet, store: _Store, parts: Mapping[int, range]) -> dict[int, str]:
    """Stamps of the chunks that a store does not hold."""
    return {start: stamp for start, stamp in _stamps(data, store, parts).items() if not store.holds(start, stamp)}


def _plan(model: EvalModel, data: EvalSet, evaluators: Sequence[Evaluator], batch_size: int) -> dict[str, object]:
    """What stored rows depend on."""
    return {
        "subject": model.fingerprint,
        "set": data.source.name,
        "pictures": len(data),
        "preprocessing": repr(model.preprocessing),
        "batch_size": batch_size,
        "evaluators": {one.name: dict(one.settings()) for one in evaluators},
    }


@torch.inference_mode()
def _chunk(model: EvalModel, evaluators: Sequence[Evaluator], start: int, batches: Iterable[EvalBatch]) -> Chunk:
    columns: dict[str, list[torch.Tensor]] = {}
    keys: list[str] = []
    labels: list[str | None] = []
    captions: list[tuple[str, ...]] = []
    broken: list[tuple[str, str]] = []
    digest = hashlib.sha256()
    for batch in batches:
        for one in batch.digests:
            digest.update(one)
        broken += [(one.key, one.reason) for one in batch.skipped]
        if not len(batch):
            continue
        keys, labels, captions = keys + batch.keys, labels + batch.labels, captions + batch.captions
        batch = batch.to(model.device)
        with torch.autocast(model.device.type, enabled=False) if model.device.type != "mps" else nullcontext():
            for evaluator in evaluators:
                for name, column in _checked_rows(evaluator, model, batch).items():
                    columns.setdefault(f"{evaluator.name}/{name}", []).append(column)
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    return Chunk(start, joined, keys, labels, captions, broken, digest.hexdigest())


def _checked_rows(evaluator: Evaluator, model: EvalModel, batch: EvalBatch) -> Columns:
    found = evaluator.rows(model, batch)
    for name, column in found.items():
        if len(column) != len(batch):
            raise QLIPError(f"{evaluator.name}: {name} has {len(column)} rows for {len(batch)} pictures")
        if column.is_floating_point() and torch.isnan(column).any():
            number = int(torch.isnan(column.flatten(1) if column.dim() > 1 else column[:, None]).any(1).nonzero()[0, 0])
            raise QLIPError(f"{batch.keys[number]}: {evaluator.name} gave no number (NaN) for {name}")
    return {name: column.cpu() for name, column in found.items()}


def _of(chunk: Chunk, evaluator: str) -> Chunk:
    """A chunk's rows of one evaluator, by the names it gave."""
    start = f"{evaluator}/"
    columns = {name.removeprefix(start): one for name, one in chunk.columns.items() if name.startswith(start)}
    return Chunk(chunk.start, columns, chunk.keys, chunk.labels, chunk.captions, chunk.broken, chunk.digest)


class _Store:
    """Chunks in a folder, a safetensors file each, written whole or not at all; or in memory."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._kept: dict[int, Chunk] = {}

    @staticmethod
    def claim(folder: Path, plan: dict[str, object]) -> None:
        """Say what the folder's rows depend on, or refuse rows of something else."""
        path = folder / PLAN
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            plan = json.loads(json.dumps(plan))
            if changed := sorted(key for key in plan if stored.get(key) != plan[key]):
                raise QLIPError(
                    f"{folder}: holds rows of another measurement ({', '.join(changed)} differ);"
                    " choose another folder, or delete it"
                )
            return
        write_text(path, json.dumps(plan, indent=1) + "\n")

    def _path(self, start: int) -> Path:
        assert self.folder is not None
        return self.folder / f"rows-{start:09d}.safetensors"

    def holds(self, start: int, stamp: str) -> bool:
        """A whole chunk of these very images lies there; one that cannot be read is computed again."""
        if self.folder is None:
            return False
        try:
            with safe_open(self._path(start), framework="pt") as file:
                words = json.loads(file.metadata()["words"])
                return "digest" in words and words.get("stamp", "") == stamp
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return False

    def put(self, chunk: Chunk, stamp: str) -> None:
        if self.folder is None:
            self._kept[chunk.start] = chunk
            return
        words = {
            "keys": chunk.keys,
            "labels": chunk.labels,
            "captions": chunk.captions,
            "broken": chunk.broken,
            "digest": chunk.digest,
            "stamp": stamp,
        }
        tensors = {name: column.contiguous() for name, column in chunk.columns.items()}
        write_bytes(self._path(chunk.start), save(tensors, {"words": json.dumps(words)}))

    def chunks(self, starts: Sequence[int]) -> Iterator[Chunk]:
        for start in starts:
            yield self._kept[start] if self.folder is None else self._read(start)

    def _read(self, start: int) -> Chunk:
        path = self._path(start)
        try:
            with safe_open(path, framework="pt") as file:
                words = json.loads(file.metadata()["words"])
                columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError, KeyError, ValueError):
            raise QLIPError(f"{path}: rows of this measurement are gone or damaged; run it again") from None
        return Chunk(
            start,
            columns,
            words["keys"],
            words["labels"],
            [tuple(one) for one in words["captions"]],
            [(key, reason) for key, reason in words["broken"]],
            words["digest"],
        )
