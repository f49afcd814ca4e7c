"""Sinks for logged values and images: ``log.jsonl``, TensorBoard, Weights & Biases."""

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
    """Receives logged values and images, in the order of steps."""

    def numbers(self, step: int, kind: Kind, samples: int | None, values: Mapping[str, float]) -> None:
        """Log the values of one step; ``samples`` is the number consumed so far, or None if not applicable."""
        ...

    def image(self, step: int, name: str, pixels: Tensor) -> None:
        """Log an image, (3, H, W) in [0, 1], on the CPU."""
        ...

    def close(self) -> None:
        """Flush and close; nothing is logged afterwards."""
        ...


class JSONLines:
    """Writes ``log.jsonl``: one JSON object per line; validation lines have ``"kind": "validation"``.

    Args:
        path: path of the file.
        step: step to resume from; lines of later steps, written before the run was killed, are dropped as duplicates.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        if path.exists():
            _drop_after(path, step)
        self._file = path.open("a", encoding="utf-8")

    def numbers(self, step: int, kind: Kind, samples: int | None, values: Mapping[str, float]) -> None:
        """Write and flush a line. Raises QLIPError if it cannot be written, e.g. on a full disk."""
        line: dict[str, Any] = {"step": step}
        if kind == "validation":
            line["kind"] = kind
        if samples is not None:
            line["samples"] = samples
        try:
            self._file.write(json.dumps(line | dict(values)) + "\n")
            self._file.flush()
        except OSError as error:
            raise QLIPError(f"{self.path}: cannot write ({error.strerror}); free disk space and start again") from None

    def image(self, step: int, name: str, pixels: Tensor) -> None:
        """Do nothing: images are not written to the file."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _drop_after(path: Path, step: int) -> None:
    """Remove the lines of steps after ``step``, and damaged lines, from the file."""
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            if line and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue  # truncated when the run was killed; its step is repeated
    write_text(path, "".join(kept))


def require_packages(tensorboard: bool, wandb: bool) -> None:
    """Check the packages of the chosen logs, before the training starts.

    Args:
        tensorboard: TensorBoard event files are written.
        wandb: the run is sent to Weights & Biases.

    Raises:
        QLIPError: one is not installed.
    """
    for module, wanted, off in (
        ("torch.utils.tensorboard", tensorboard, "log.tensorboard=false"),
        ("wandb", wandb, "log.wandb=null"),
    ):
        try:
            if wanted:
                require(module, extra="train")
        except QLIPError as error:
            raise QLIPError(f"{error}; or train without it: {off}") from None


class TensorBoard:
    """Writes TensorBoard event files to ``tensorboard/``.

    Args:
        folder: folder of the run.
        step: step to resume from; later steps, written before the run was killed, are not shown.
    """

    def __init__(self, folder: Path, step: int) -> None:
        board = require("torch.utils.tensorboard", extra="train")
        self._writer: Any = board.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def numbers(self, step: int, kind: Kind, samples: int | None, values: Mapping[str, float]) -> None:
        """Add a point to the curve of each name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, pixels: Tensor) -> None:
        """Add an image of this name for the step."""
        self._writer.add_image(name, pixels, step)

    def close(self) -> None:
        """Flush and close the event files."""
        self._writer.close()


class WeightsAndBiases:
    """Logs to Weights & Biases; ``WANDB_MODE=offline`` writes ``wandb/`` only, for ``wandb sync``.

    A resumed training resumes the same W&B run: only the run's id is stored, in ``wandb/run.json``. Steps sent before
    the training was killed are sent again with the same values. API keys and servers are configured through W&B itself
    (``wandb login``, its environment variables); they are neither read nor stored here.

    A failure does not stop the training: it prints one warning, and nothing more is sent until the next start.

    Args:
        folder: folder of the run.
        project: name of the W&B project.
        name: display name of the run.
        config: the resolved recipe.
        say: prints a line on the console.

    Raises:
        QLIPError: if the package wandb is not installed.
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
                # do not capture the console, and upload no source code or git diff: they may be private
                settings=self._wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
            )
            where = "offline" if self._run.offline else self._run.url
            say(f"Weights & Biases: run {run_id} of {project}, {where}")

    def numbers(self, step: int, kind: Kind, samples: int | None, values: Mapping[str, float]) -> None:
        """Log the values of a step; W&B merges several calls for the same step."""
        if self._run is not None:
            with self._tolerant():
                self._run.log(dict(values) | ({} if samples is None else {"samples": samples}), step=step)

    def image(self, step: int, name: str, pixels: Tensor) -> None:
        """Log an image with the values of its step."""
        if self._run is not None:
            with self._tolerant():
                self._run.log({name: self._wandb.Image(_as_array(pixels))}, step=step)

    def close(self) -> None:
        """Send the remaining values and finish the run."""
        if self._run is not None:
            with self._tolerant():
                self._run.finish()

    def _tolerant(self) -> _Tolerant:
        """Context in which a failure of W&B ends logging to it instead of the training."""
        return _Tolerant(self._give_up)

    def _give_up(self, error: BaseException) -> None:
        self._run = None
        reason = " ".join(str(error).split()) or type(error).__name__
        self._say(f"Weights & Biases failed ({reason}); training continues without it; log.jsonl has all values")


def _run_id(path: Path, project: str) -> str:
    """The stored id, or a new one if none is stored or it belongs to another project."""
    if path.exists():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["project"] == project:
                return str(stored["id"])
        except (json.JSONDecodeError, KeyError, TypeError):
            pass  # damaged file: start a new W&B run
    run_id = uuid.uuid4().hex[:12]
    write_text(path, json.dumps({"project": project, "id": run_id}) + "\n")
    return run_id


class _Tolerant:
    """Context that passes errors of W&B, and OS errors below it (connections, processes, files), to a callback."""

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
    """Convert (3, H, W) in [0, 1] to a uint8 array (H, W, 3)."""
    return (pixels.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
