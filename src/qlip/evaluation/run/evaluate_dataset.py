"""One pass over a dataset for several evaluators: resumable, and shared among processes.

`evaluate_dataset` cuts the dataset into chunks of consecutive positions. A chunk always goes through the model by
itself, in batches that are cut alike, so its rows are equal whichever process computes them: a killed evaluation
continues with the first missing chunk, and any number of processes give equal metrics to the last digit. `_Store` keeps
the chunks, in a folder (a `Workspace`) or in memory. A chunk whose images were replaced since is computed again, if
its source can tell (`CaptionedImages.stamp`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from qlip.data.loader.eval_set import EvalBatch, EvalSet
from qlip.errors import QLIPError
from qlip.evaluation.evaluators.base import (
    BROKEN,
    Chunk,
    Columns,
    Evaluator,
    MetricResult,
    PassResult,
    Rows,
    check_evaluators,
)
from qlip.evaluation.models.base import EvalModel
from qlip.evaluation.models.batch import ModelBatch
from qlip.runtime.finite import require_finite
from qlip.runtime.workspace import Workspace

CHUNK = 256
"""Images per chunk. Batches never cross the border of a chunk."""


def evaluate_dataset(
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
    on_progress: Callable[[int], None] = lambda done: None,
) -> PassResult | None:
    """Run all evaluators over a dataset.

    Args:
        model: in eval mode.
        data: preprocessed for the model.
        evaluators: each with a name of its own.
        folder: keeps rows, from which a killed pass continues; None keeps them in memory, for one process.
        rank, world: this process and their number; each takes every world-th chunk.
        barrier: returns when all processes have called it.
        batch_size: images per batch; part of the plan, as the last digits of floats may depend on it.
        num_workers: of the loader.
        on_progress: called with the number of images done since the last call, stored ones included.

    Returns:
        The metrics; None on all ranks but the first.

    Raises:
        QLIPError: a model that cannot serve, a folder of another evaluation, several processes without a folder,
            or no image that could be read.
    """
    check_evaluators(evaluators, model)
    if folder is None and world > 1:
        raise QLIPError("several processes need a folder that all of them see; name an output folder")
    if rank == 0 and folder is not None:  # the plan needs the model's fingerprint, which reads all weights
        Workspace(folder, _plan(model, data, evaluators, batch_size), of="evaluation").claim()
    barrier()
    store = _Store(folder)
    chunks = {start: range(start, min(start + CHUNK, len(data))) for start in range(0, len(data), CHUNK)}
    mine = list(chunks)[rank::world]
    # stamps are taken before images are read; in memory nothing outlasts them
    stamps = {start: "" if folder is None else data.stamp(chunks[start]) for start in mine}
    missing = [start for start in mine if not store.holds(start, stamps[start])]
    on_progress(sum(len(chunks[start]) for start in mine if start not in missing))
    batches = data.batches(batch_size, num_workers, parts=[chunks[start] for start in missing])
    for start in missing:
        of_chunk = islice(batches, -(-len(chunks[start]) // batch_size))
        store.put(_chunk(model, evaluators, start, of_chunk), stamps[start])
        on_progress(len(chunks[start]))
    barrier()
    return None if rank else _summary(model, data, evaluators, store, list(chunks))


def _summary(
    model: EvalModel, data: EvalSet, evaluators: Sequence[Evaluator], store: _Store, starts: Sequence[int]
) -> PassResult:
    """Compute the metrics from the rows of all chunks."""
    metric_results: dict[str, MetricResult] = {}
    for evaluator in evaluators:
        rows = Rows(lambda name=evaluator.name: (_of(chunk, name) for chunk in store.chunks(starts)))  # type: ignore[misc]
        if not len(rows):
            raise QLIPError(f"{data.source.name}: no image could be read; look at one with qlip info")
        metric_results[evaluator.name] = evaluator.summarize(model, rows)
        metric_results[evaluator.name].keep_keys(rows.keys)
    count, broken, digest = 0, [], hashlib.sha256()
    for chunk in store.chunks(starts):
        count += len(chunk)
        broken += chunk.broken
        digest.update(chunk.digest.encode())
    return PassResult(metric_results, count, broken, digest.hexdigest())


def _plan(model: EvalModel, data: EvalSet, evaluators: Sequence[Evaluator], batch_size: int) -> dict[str, object]:
    """Everything that stored rows depend on; the keys are those of version 0.1."""
    positions = list(data.positions)
    drawn = (
        {}
        if positions == list(range(len(data)))
        else {"positions": hashlib.sha256(str(positions).encode()).hexdigest()}
    )
    return {
        "subject": model.fingerprint,
        "set": data.source.name,
        "pictures": len(data),
        "preprocessing": repr(model.preprocessing),
        "batch_size": batch_size,
        "evaluators": {one.name: dict(one.settings()) for one in evaluators},
        **drawn,
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
        shared = ModelBatch(model, batch.to(model.device))
        with torch.autocast(model.device.type, enabled=False) if model.device.type != "mps" else nullcontext():
            for evaluator in evaluators:
                for name, column in _checked_rows(evaluator, shared).items():
                    columns.setdefault(f"{evaluator.name}/{name}", []).append(column)
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    return Chunk(start, joined, keys, labels, captions, broken, digest.hexdigest())


def _checked_rows(evaluator: Evaluator, batch: ModelBatch) -> Columns:
    found = evaluator.rows(batch)
    for name, column in found.items():
        if len(column) != len(batch):
            raise QLIPError(f"{evaluator.name}: {name} has {len(column)} rows for {len(batch)} images")
        if column.is_floating_point():
            infinite = name in evaluator.may_be_infinite
            checked = column.masked_fill(column.isinf(), 0) if infinite else column
            require_finite(checked, f"{evaluator.name}'s values of {name}", BROKEN, batch.keys)
    return {name: column.cpu() for name, column in found.items()}


def _of(chunk: Chunk, evaluator: str) -> Chunk:
    """Return a chunk with the columns of one evaluator, under the names that it gave."""
    start = f"{evaluator}/"
    columns = {name.removeprefix(start): one for name, one in chunk.columns.items() if name.startswith(start)}
    return Chunk(chunk.start, columns, chunk.keys, chunk.labels, chunk.captions, chunk.broken, chunk.digest)


class _Store:
    """Chunks in a folder, one safetensors file each, written atomically; or in memory."""

    def __init__(self, folder: Path | None) -> None:
        self.workspace = None if folder is None else Workspace(folder, {})
        self._kept: dict[int, Chunk] = {}

    def holds(self, start: int, stamp: str) -> bool:
        """Return whether a readable chunk with this stamp is stored; a damaged one is computed again."""
        if self.workspace is None:
            return False
        try:
            with safe_open(self.workspace.path(_name(start)), framework="pt") as file:
                words = json.loads(file.metadata()["words"])
                return "digest" in words and words.get("stamp", "") == stamp
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return False

    def put(self, chunk: Chunk, stamp: str) -> None:
        """Store a chunk."""
        if self.workspace is None:
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
        self.workspace.write(_name(chunk.start), save(tensors, {"words": json.dumps(words)}))

    def chunks(self, starts: Sequence[int]) -> Iterator[Chunk]:
        """Yield stored chunks."""
        for start in starts:
            yield self._kept[start] if self.workspace is None else self._read(self.workspace.path(_name(start)), start)

    def _read(self, path: Path, start: int) -> Chunk:
        try:
            with safe_open(path, framework="pt") as file:
                words = json.loads(file.metadata()["words"])
                columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError, KeyError, ValueError):
            raise QLIPError(f"{path}: rows of this evaluation are gone or damaged; run it again") from None
        return Chunk(
            start,
            columns,
            words["keys"],
            words["labels"],
            [tuple(one) for one in words["captions"]],
            [(key, reason) for key, reason in words["broken"]],
            words["digest"],
        )


def _name(start: int) -> str:
    return f"rows-{start:09d}.safetensors"
