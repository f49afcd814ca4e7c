"""Checkpoints of a run: folders that are there whole or not at all, without a pickle.

``checkpoints/step-00001000/`` is a checkpoint that :meth:`QLIPModel.from_pretrained` loads (the averaged weights where
there is an average), and its ``training/`` what a run needs to go on, on any number of ranks: ``state.json``, and
tensors as :mod:`qlip.training.state.dcp_safetensors` lays them out. torch.distributed.checkpoint plans who writes and
reads what.
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
"""Before a checkpoint's number, where a folder is none: not yet whole; whole, until its equal is there; no longer."""

# a single process is nothing to warn of
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Checkpoints:
    """The checkpoints of one run. All ranks make one together, and call what follows together.

    Args:
        folder: holds ``step-<number>`` folders, seen by all ranks; made if absent. What an interrupted save left is
            removed, or put back where it is the only one of its step.
        settings: of the recipe: how many to keep, the newest ones; whether to write in a thread while training goes on,
            so that only the copy to the CPU is waited for; whether each checkpoint is exported.
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
        """Whole checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / TRAINING / STATE).is_file())

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None, the same on all ranks."""
        name = self.parallel.on_rank0(lambda: found[-1].name if (found := self.all()) else None)
        return None if name is None else self.folder / name

    # ---------------------------------------------------------------- saving

    def save(self, step: int, task: Task, ema: EMA | None, state: dict[str, Any]) -> None:
        """Write a checkpoint aside, flush it to disk, rename it when every rank has, and drop the oldest.

        An earlier save that is still being written is waited for.

        Args:
            step: steps taken.
            task: its networks and optimizers are stored, and it exports its weights.
            ema: averages, exported in place of the weights.
            state: what else must come back, as JSON; the first rank's counts.

        Raises:
            QLIPError: this save, or the one before where it was asynchronous, could not be written; earlier checkpoints
                stay whole.
        """
        self.wait()
        staged = self._staging.copy(collect(task, ema), lambda: self.parallel.mesh("cpu"))
        frozen = self._describe_frozen(task)
        written = json.dumps(state | ({"frozen": frozen} if frozen else {}), indent=1)  # now: training changes it
        self._thread = threading.Thread(target=self._write, args=(step, staged, task.export, written), daemon=True)
        self._thread.start()
        if not self.settings.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until what was saved is on disk. Raises QLIPError where it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed; :meth:`wait` says how."""
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
            """On the first rank, when all have written."""
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
                with suppress(OSError):  # the disk's fault is said below; the next start tidies again
                    _tidy(self.folder)
            self._fault = self._cannot_save(final, _cause(error))
        except BaseException as error:  # noqa: BLE001 (of a thread: the training one raises it)
            self._fault = error

    def _cannot_save(self, final: Path, cause: BaseException) -> BaseException:
        if not isinstance(cause, OSError | QLIPError):
            return cause
        reason = getattr(cause, "strerror", None) or cause
        found = self.all()
        kept = f"the last whole checkpoint is {found[-1]}" if found else "there is no earlier one"
        return CollectiveError(f"{final}: cannot save ({reason}); {kept}; free the disk and start again")

    # ---------------------------------------------------------------- loading

    def load(self, path: Path, task: Task, ema: EMA | None) -> dict[str, Any]:
        """Put weights, optimizers and averages back, whatever the number of ranks that saved them.

        Returns:
            The ``state`` that was saved.

        Raises:
            QLIPError: a file of the checkpoint is damaged, or it is of another model.
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
        """Source and fingerprint of each network that the task uses and never trains."""
        for name, frozen in task.frozen.items():
            if name not in self._fingerprints:  # once: they never change
                self._fingerprints[name] = fingerprint(frozen.network)
        return {
            name: {"source": frozen.source, "sha256": self._fingerprints[name]} for name, frozen in task.frozen.items()
        }

    def _check_frozen(self, task: Task, stored: dict[str, dict[str, str]], path: Path) -> None:
        for name, now in self._describe_frozen(task).items():
            then = stored.get(name, now)  # version 0.1 stored none
            if then["sha256"] != now["sha256"]:
                raise QLIPError(
                    f"{path}: trained beside {name} of {then['source']} (sha256 {then['sha256'][:12]}), and {name} of"
                    f" {now['source']} has other weights ({now['sha256'][:12]}); put the former back"
                )


def fingerprint(network: nn.Module) -> str:
    """SHA-256 over names, shapes and values of a network's parameters and buffers, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _cause(error: CheckpointException) -> BaseException:
    """The first rank's fault; one that only says that another rank is silent comes last."""
    causes = [cause for cause, _ in error.failures.values()]
    return min(causes, key=is_about_a_peer)


def _read_index(path: Path) -> dict[str, Entry]:
    try:
        return read_index(path / TRAINING)
    except QLIPError as error:
        raise QLIPError(_to_delete(error, path)) from None


def _to_delete(fault: BaseException, path: Path) -> str:
    return f"{fault}; delete {path} to go on from the checkpoint before"


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QLIPError(f"{path}: damaged ({error}); delete its checkpoint to go on from the one before") from None
    return state


def _make_final(aside: Path, final: Path) -> None:
    """Flush all of a folder, then give it its name."""
    for path in [*aside.rglob("*"), aside]:
        flush(path)
    replaced = final.with_name(_REPLACED + _number(final))
    if final.exists():  # saved at this very step before; whole until its equal has the name
        os.replace(final, replaced)
    os.replace(aside, final)
    flush(final.parent)
    if replaced.exists():
        _remove(replaced)


def _remove(folder: Path) -> None:
    """Delete a checkpoint that nobody may take for a whole one meanwhile."""
    gone = folder.with_name(_GONE + _number(folder))
    os.replace(folder, gone)
    flush(gone.parent)  # the name goes before the files do, in a power cut too
    shutil.rmtree(gone)


def _tidy(folder: Path) -> None:
    """End what a kill or a fault cut short; only whole checkpoints are left."""
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
