"""Checkpoints of a run: folders that are there whole or not at all, without a pickle.

``checkpoints/step-00001000/`` is a checkpoint that :meth:`QLIPModel.from_pretrained` loads, and beside it
``optimizer.safetensors`` and ``state.json``, what else a run needs to go on.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlip.errors import QLIPError
from qlip.files import flush
from qlip.training.optimizers import load_named_state, named_state
from qlip.training.task import Task

_ASIDE = ".part-"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: holds ``step-<number>`` folders; made if absent. What an interrupted save left is removed.
        keep: how many to keep, the newest ones.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{_ASIDE}*"):
            shutil.rmtree(leftover)

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / "state.json").is_file())

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        return found[-1] if (found := self.all()) else None

    def save(self, step: int, task: Task, state: dict[str, Any]) -> Path:
        """Write a checkpoint aside, flush it to disk, rename it, and drop the oldest.

        Args:
            step: steps taken.
            task: exports its weights; its optimizers are stored here.
            state: what else must come back, as JSON.

        Raises:
            QLIPError: the disk is full; earlier checkpoints stay whole.
        """
        final = self.folder / f"step-{step:08d}"
        aside = self.folder / f"{_ASIDE}{step:08d}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            task.export(aside)
            _write_optimizers(aside / "optimizer.safetensors", task)
            (aside / "state.json").write_text(json.dumps(state, indent=1))
            for path in [*aside.iterdir(), aside]:
                flush(path)
            if final.exists():  # saved at this very step before; it is replaced by its equal
                shutil.rmtree(final)
            os.replace(aside, final)
            flush(self.folder)
        except (OSError, SafetensorError, QLIPError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            reason = getattr(error, "strerror", None) or error
            last = self.latest()
            kept = f"the last whole checkpoint is {last}" if last else "there is no earlier one"
            raise QLIPError(f"{final}: cannot save ({reason}); {kept}; free the disk and start again") from None
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def load(self, path: Path, task: Task) -> dict[str, Any]:
        """Put weights and optimizers back.

        Returns:
            The ``state`` that was saved.

        Raises:
            QLIPError: a file of the checkpoint is damaged or of another model.
        """
        try:
            state: dict[str, Any] = json.loads((path / "state.json").read_text())
            weights = load_file(path / "model.safetensors")
            optimizers = load_file(path / "optimizer.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise QLIPError(f"{path}: damaged checkpoint ({error}); delete it to go on from the one before") from None
        try:
            task.model.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise QLIPError(f"{path}: holds another model ({reason}); choose another run folder") from None
        for number, optimizer in enumerate(_optimizers(task)):
            prefix = f"{number}/"
            own = {key.removeprefix(prefix): value for key, value in optimizers.items() if key.startswith(prefix)}
            load_named_state(optimizer, own)
        return state


def _optimizers(task: Task) -> list[Any]:
    return [optimizer for phase in task.phases for optimizer in phase.optimizers]


def _write_optimizers(path: Path, task: Task) -> None:
    tensors: dict[str, Tensor] = {}
    for number, optimizer in enumerate(_optimizers(task)):
        tensors |= {f"{number}/{key}": value.detach().contiguous() for key, value in named_state(optimizer).items()}
    save_file(tensors, path)
