"""Where a run's numbers go besides the console: ``log.jsonl``, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from torch import Tensor

from qlip.errors import QLIPError, require
from qlip.files import write_text

Kind = Literal["training", "validation"]


class Sink(Protocol):
    """Takes lines of numbers and images, in the order of steps."""

    def numbers(self, step: int, kind: Kind, samples: int | None, values: Mapping[str, float]) -> None:
        """One line; ``samples`` consumed so far, where that is known."""
        ...

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        """(3, H, W) in [0, 1], on the CPU."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


class JSONLines:
    """``log.jsonl``: a JSON object a line; those of validations have ``"kind": "validation"``.

    Args:
        path: of the file.
        step: lines of later steps, written before a kill, are dropped, so that none comes twice.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        if path.exists():
            _drop_after(path, step)
        self._file = path.open("a", encoding="utf-8")

    def numbers(self, step: int, kind: Kind, samples: int | None, values: Mapping[str, float]) -> None:
        """Written and flushed. Raises QLIPError where the disk is full."""
        line: dict[str, Any] = {"step": step}
        if kind == "validation":
            line["kind"] = kind
        if samples is not None:
            line["samples"] = samples
        try:
            self._file.write(json.dumps(line | dict(values)) + "\n")
            self._file.flush()
        except OSError as error:
            raise QLIPError(f"{self.path}: cannot write ({error.strerror}); free the disk and start again") from None

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        """Images are no numbers."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _drop_after(path: Path, step: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            if line and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue  # a kill cut the line short; its step comes again
    write_text(path, "".join(kept))


class TensorBoard:
    """``tensorboard/``.

    Args:
        folder: of the run.
        step: later ones, written before a kill, are not shown.
    """

    def __init__(self, folder: Path, step: int) -> None:
        board = require("torch.utils.tensorboard", extra="train")
        self._writer: Any = board.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def numbers(self, step: int, kind: Kind, samples: int | None, values: Mapping[str, float]) -> None:
        """A curve a name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        """Beside those of other steps."""
        self._writer.add_image(name, pixels, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases; ``WANDB_MODE=offline`` writes ``wandb/`` only, for ``wandb sync``.

    A run that goes on goes on in the same run there: its id, and nothing else, is kept in ``wandb/run.json``. Steps
    that a killed run had sent come again with the same numbers. Keys and servers are W&B's own matter (``wandb login``,
    its environment variables); nothing of them is read or stored here.

    Whatever fails, the training goes on: there is one warning, and nothing more is sent until the next start.

    Args:
        folder: of the run.
        project: at Weights & Biases.
        name: shown for the run.
        config: the resolved recipe.
        say: prints a line for people.

    Raises:
        QLIPError: the package is not installed.
    """

    def __init__(
        self, folder: Path, project: str, name: str, config: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self._wandb: Any = require("wandb", extra="train")
        self._run: Any = None
        self._say = say
        with self._tolerant():
            run_id = _run_id(folder / "wandb" / "run.json", project)
            self._run = self._wandb.init(
                project=project,
                id=run_id,
                resume="allow",
                name=name,
                dir=str(folder),
                config=dict(config),
                # the console is ours, and a working tree may hold what nobody wants sent
                settings=self._wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
            )
            where = "offline" if self._run.offline else self._run.url
            say(f"Weights & Biases: run {run_id} of {project}, {where}")

    def numbers(self, step: int, kind: Kind, samples: int | None, values: Mapping[str, float]) -> None:
        """A row of the step; what comes for the same step is joined to it."""
        if self._run is not None:
            with self._tolerant():
                self._run.log(dict(values) | ({} if samples is None else {"samples": samples}), step=step)

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        """In the step's row."""
        if self._run is not None:
            with self._tolerant():
                self._run.log({name: self._wandb.Image(_as_array(pixels))}, step=step)

    def close(self) -> None:
        """Send what is left."""
        if self._run is not None:
            with self._tolerant():
                self._run.finish()

    def _tolerant(self) -> _Tolerant:
        return _Tolerant(self._give_up)

    def _give_up(self, error: BaseException) -> None:
        self._run = None
        reason = " ".join(str(error).split()) or type(error).__name__
        self._say(f"Weights & Biases failed ({reason}); training goes on without it, log.jsonl has everything")


def _run_id(path: Path, project: str) -> str:
    """The stored id, or a new one where there is none or the project is another."""
    if path.exists():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["project"] == project:
                return str(stored["id"])
        except (json.JSONDecodeError, KeyError, TypeError):
            pass  # damaged: a new run is better than none
    run_id = uuid.uuid4().hex[:12]
    write_text(path, json.dumps({"project": project, "id": run_id}) + "\n")
    return run_id


class _Tolerant:
    """Hands on what W&B raises, and what breaks below it (connections, processes, files), instead of raising it."""

    def __init__(self, give_up: Callable[[BaseException], None]) -> None:
        self._give_up = give_up

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if kind is None or error is None:
            return False
        foreign = issubclass(kind, Exception) and kind.__module__.partition(".")[0] == "wandb"
        if foreign or issubclass(kind, OSError | RuntimeError | ValueError):
            self._give_up(error)
            return True
        return False


def _as_array(pixels: Tensor) -> Any:
    """(3, H, W) in [0, 1] to uint8 (H, W, 3)."""
    return (pixels.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
