"""Checkpoints of a run: written atomically, without pickle.

``checkpoints/step-00001000/`` is a checkpoint that :meth:`QLIPModel.from_pretrained` loads (the EMA weights if the run
has an EMA). Its subfolder ``training/`` holds the state to resume from, on any number of ranks: ``state.json``, and
tensors in the format of :mod:`qlip.training.state.dcp_safetensors`. torch.distributed.checkpoint plans which rank
writes and reads which tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from qlip.errors import QLIPError
from qlip.files import flush, write_text
from qlip.training.optim.ema import EMA, UPDATES
from qlip.training.parallel.distributed import Parallel
from qlip.training.parallel.faults import CollectiveError, is_about_a_peer
from qlip.training.recipe_schema import CheckpointSection
from qlip.training.state.dcp_safetensors import Entry, Reader, Writer, read_index, read_whole
from qlip.training.state.train_state import AVERAGE, MODEL, Staging, collect, restore, targets
from qlip.training.task import Task

TRAINING, STATE = "training", "state.json"
_ASIDE, _REPLACED, _GONE = ".part-", ".old-", ".gone-"
"""Prefixes of folders that do not count as checkpoints: incomplete; complete but being replaced; being deleted."""

# running in a single process is intended
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Checkpoints:
    """Saves and loads the checkpoints of one run; the constructor and all methods are collective.

    Args:
        folder: shared by all ranks, holds the ``step-<number>`` folders; created if absent. Leftovers of an interrupted
            save are removed, or restored if they are the only complete checkpoint of their step.
        settings: the recipe's section: number of checkpoints to keep (the newest), whether to write in a background
            thread so that training waits only for the copy to the CPU, and whether each checkpoint is exported.
        parallel: the ranks.
    """

    def __init__(self, folder: Path, settings: CheckpointSection, parallel: Parallel) -> None:
        self.folder, self.settings, self.parallel = folder, settings, parallel
        self._fingerprints: dict[str, str] = {}
        self._group = parallel.group()
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None
        parallel.on_rank0(self._prepare)

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _tidy(self.folder)
        except OSError as error:
            raise QLIPError(f"{self.folder}: cannot be written ({error.strerror}); choose another run folder") from None

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / TRAINING / STATE).is_file())

    def latest(self) -> Path | None:
        """Newest complete checkpoint, or None; equal on all ranks."""
        name = self.parallel.on_rank0(lambda: found[-1].name if (found := self.all()) else None)
        return None if name is None else self.folder / name

    # ---------------------------------------------------------------- saving

    def save(self, step: int, task: Task, ema: EMA | None, state: dict[str, Any]) -> None:
        """Write a checkpoint to a temporary folder, flush it, rename it once every rank has, and drop the oldest.

        First waits for a previous save that is still being written.

        Args:
            step: number of steps taken.
            task: provides the networks and optimizers to store, and exports the weights.
            ema: averages, exported instead of the weights.
            state: the rest of the state, for JSON; rank 0's is stored.

        Raises:
            QLIPError: this save, or a previous asynchronous one, could not be written; earlier checkpoints stay intact.
        """
        self.wait()
        staged = self._staging.copy(collect(task, ema), lambda: self.parallel.mesh("cpu"))
        frozen = self._describe_frozen(task)
        written = json.dumps(
            state | ({"frozen": frozen} if frozen else {}), indent=1
        )  # serialised now: training changes it
        self._thread = threading.Thread(target=self._write, args=(step, staged, task.export, written), daemon=True)
        self._thread.start()
        if not self.settings.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Block until the last save is on disk.

        Raises:
            QLIPError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    @property
    def failed(self) -> bool:
        """True if a background save has failed; :meth:`wait` raises its error."""
        return self._fault is not None

    def check(self) -> None:
        """Raise QLIPError if a save has failed."""
        if (fault := self._fault) is not None:
            self._fault = None
            raise fault

    def _write(
        self, step: int, staged: dict[str, Tensor], export: Callable[[Path, Mapping[str, Tensor]], None], state: str
    ) -> None:
        final, aside = self.folder / f"step-{step:08d}", self.folder / f"{_ASIDE}{step:08d}"

        def finish(training: Path) -> None:
            """Export and rename the checkpoint; called on rank 0 after all ranks have written."""
            if self.settings.export == "always":
                weights = read_whole(training, MODEL)
                weights |= {name: value for name, value in read_whole(training, AVERAGE).items() if name != UPDATES}
                export(aside, weights)
            write_text(training / STATE, state + "\n")
            _make_final(aside, final)
            for old in self.all()[: -self.settings.keep]:
                _remove(old)

        try:
            save(
                staged,
                storage_writer=Writer(aside / TRAINING, finish),
                planner=DefaultSavePlanner(
                    flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
                ),
                process_group=self._group,
            )
        except CheckpointException as error:
            if self.parallel.first:
                with suppress(OSError):  # the write error is reported below; the next start tidies again
                    _tidy(self.folder)
            self._fault = self._cannot_save(final, _cause(error))
        except BaseException as error:  # noqa: BLE001 (raised again in the training thread)
            self._fault = error

    def _cannot_save(self, final: Path, cause: BaseException) -> BaseException:
        if not isinstance(cause, OSError | QLIPError):
            return cause
        reason = getattr(cause, "strerror", None) or cause
        found = self.all()
        kept = f"the last complete checkpoint is {found[-1]}" if found else "there is no earlier checkpoint"
        return CollectiveError(f"{final}: cannot save ({reason}); {kept}; free disk space and restart")

    # ---------------------------------------------------------------- loading

    def load(self, path: Path, task: Task, ema: EMA | None) -> dict[str, Any]:
        """Restore weights, optimizers and averages, saved from any number of ranks.

        Returns:
            The saved ``state``.

        Raises:
            QLIPError: a file of the checkpoint is damaged, or the checkpoint is of another model.
        """
        training = path / TRAINING
        try:
            state = self.parallel.on_rank0(lambda: _read_state(training / STATE))
            self.parallel.all_or_none(lambda: self._check_frozen(task, state.get("frozen", {}), path))
            into = self.parallel.all_or_none(lambda: targets(task, ema, _read_index(path), str(path)))
            load(
                into,
                storage_reader=Reader(training),
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=self._group,
            )
        except CheckpointException as error:
            cause = _cause(error)
            if not isinstance(cause, QLIPError):
                raise cause from None
            raise CollectiveError(_to_delete(cause, path)) from None
        restore(task, ema, into)
        return state

    # ---------------------------------------------------------------- frozen networks

    def _describe_frozen(self, task: Task) -> dict[str, dict[str, str]]:
        """Source and fingerprint of each frozen network of the task."""
        for name, frozen in task.frozen.items():
            if name not in self._fingerprints:  # computed once: frozen networks never change
                self._fingerprints[name] = fingerprint(frozen.network)
        return {
            name: {"source": frozen.source, "sha256": self._fingerprints[name]} for name, frozen in task.frozen.items()
        }

    def _check_frozen(self, task: Task, stored: dict[str, dict[str, str]], path: Path) -> None:
        for name, now in self._describe_frozen(task).items():
            then = stored.get(name, now)  # version 0.1 stored none
            if then["sha256"] != now["sha256"]:
                raise QLIPError(
                    f"{path}: trained with the frozen network {name!r} from {then['source']} (sha256"
                    f" {then['sha256'][:12]}), but {name!r} from {now['source']} has different weights"
                    f" ({now['sha256'][:12]}); restore the original weights"
                )


def fingerprint(network: nn.Module) -> str:
    """SHA-256 (hex) over the names, shapes, dtypes and values of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _cause(error: CheckpointException) -> BaseException:
    """Error of the lowest rank; errors that only report an unresponsive rank are the last choice."""
    causes = [cause for cause, _ in error.failures.values()]
    return min(causes, key=is_about_a_peer)


def _read_index(path: Path) -> dict[str, Entry]:
    try:
        return read_index(path / TRAINING)
    except QLIPError as error:
        raise QLIPError(_to_delete(error, path)) from None


def _to_delete(fault: BaseException, path: Path) -> str:
    return f"{fault}; delete {path} to resume from the previous checkpoint"


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QLIPError(f"{path}: damaged ({error}); delete its checkpoint to resume from the previous one") from None
    return state


def _make_final(aside: Path, final: Path) -> None:
    """Flush a folder with all its files, then rename it to its final name."""
    for path in [*aside.rglob("*"), aside]:
        flush(path)
    replaced = final.with_name(_REPLACED + _number(final))
    if final.exists():  # the same step was saved before; kept until the new one has the name
        os.replace(final, replaced)
    os.replace(aside, final)
    flush(final.parent)
    if replaced.exists():
        _remove(replaced)


def _remove(folder: Path) -> None:
    """Delete a checkpoint; it is renamed first, so a half-deleted one never counts as complete."""
    gone = folder.with_name(_GONE + _number(folder))
    os.replace(folder, gone)
    flush(gone.parent)  # the rename must reach the disk before any deletion, even in a power cut
    shutil.rmtree(gone)


def _tidy(folder: Path) -> None:
    """Clean up after an interrupted save or deletion; leaves only complete checkpoints."""
    for leftover in [*folder.glob(f"{_ASIDE}*"), *folder.glob(f"{_GONE}*")]:
        shutil.rmtree(leftover)
    for replaced in folder.glob(f"{_REPLACED}*"):
        final = folder / f"step-{_number(replaced)}"
        if final.exists():
            _remove(replaced)
        else:
            os.replace(replaced, final)
    flush(folder)


def _number(folder: Path) -> str:
    return folder.name.rpartition("-")[2]
