"""From a recipe to a run folder: everything is built here, trained by the Trainer, and exported.

A run folder holds ``recipe.yaml`` (resolved), ``sessions.json`` (versions and git state of each start),
``vocabulary/``, ``checkpoints/``, ``log.jsonl``, ``tensorboard/``, ``pictures/`` and, at the end, ``model/``, a
checkpoint to load by path.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

import torch
import yaml
from rich.console import Console

from qlip.data.config import open_stream
from qlip.data.stream import TrainingStream, batches
from qlip.errors import QLIPError, validate
from qlip.files import write_text
from qlip.modeling import CLIPTokenizer, Preprocessing, QLIPConfig, QLIPModel, QLIPProcessor
from qlip.training.checkpoints import Checkpoints
from qlip.training.environment import record_session
from qlip.training.pictures import PictureHook
from qlip.training.recipe import Recipe, VocabularySection
from qlip.training.runlog import RunLog
from qlip.training.tasks import Stage1
from qlip.training.trainer import Trainer
from qlip.training.vocabulary import train_vocabulary

FREE_KEYS = ("checkpoint", "log", "data.num_workers", "data.prefetch", "data.broken_limit")
"""What may change when a run goes on: it moves no weight."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        finished: all steps are taken and ``model`` is written.
        step: steps taken.
        model: the exported checkpoint folder; of the last saved checkpoint where the run was stopped.
        stopped_by: the signal that asked to stop, or None.
    """

    finished: bool
    step: int
    model: Path
    stopped_by: Signals | None


def run(recipe: Recipe, folder: Path, console: Console | None = None) -> Outcome:
    """Train a recipe in a folder, going on from its last checkpoint if it has one.

    Args:
        recipe: checked, from :func:`qlip.training.load_recipe`.
        folder: of the run; made if absent.
        console: for progress; standard error by default.

    Raises:
        QLIPError: the folder is another run's or in use, data cannot be read, a loss is not finite, the disk is full.
    """
    console = console or Console(stderr=True)
    with _locked(folder):
        _claim(recipe, folder)
        record_session(folder)
        return _run(recipe, folder, console)


def _run(recipe: Recipe, folder: Path, console: Console) -> Outcome:
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    processor = _processor(recipe, folder, console)
    assert processor.tokenizer is not None
    model = _model(recipe, processor.tokenizer)
    model.set_activation_checkpointing(recipe.activation_checkpointing)
    task = Stage1(model.train(), processor, recipe.losses, recipe.optimizer)
    stream = _stream(recipe, processor.preprocessing, processor.tokenizer)
    checkpoints = Checkpoints(folder / "checkpoints", recipe.checkpoint.keep)
    hooks = (
        [PictureHook(task.reconstruct, stream, recipe.log, folder / "pictures")] if recipe.log.pictures_every else []
    )
    trainer = Trainer(
        task,
        recipe,
        checkpoints,
        lambda start: batches(stream, recipe.batch_size, start, recipe.data.num_workers, recipe.data.prefetch),
        lambda step: RunLog(folder, step, recipe.schedule.steps, recipe.log.tensorboard, console),
        hooks,
    )
    _announce(recipe, model, stream, trainer.progress.step, folder, console)
    trainer.run()
    finished = trainer.progress.step >= recipe.schedule.steps
    if finished:
        task.export(folder / "model")
    exported = folder / "model" if finished else checkpoints.latest()
    assert exported is not None
    return Outcome(finished, trainer.progress.step, exported, trainer.stopped_by)


def _announce(
    recipe: Recipe, model: QLIPModel, stream: TrainingStream, step: int, folder: Path, console: Console
) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    pictures = sum(len(source.images) for source in stream.sources)
    start = f"going on from step {step}" if step else "starting"
    console.print(
        f"{recipe.name}: {start} of {recipe.schedule.steps}, batch {recipe.batch_size}, {parameters / 1e6:.2f} M"
        f" parameters, {pictures:,} pictures of {len(stream.sources)} sources; in {folder}",
        highlight=False,
        soft_wrap=True,
    )


def _processor(recipe: Recipe, folder: Path, console: Console) -> QLIPProcessor:
    if recipe.model.init is not None:
        processor = QLIPProcessor.from_pretrained(recipe.model.init)
        if processor.tokenizer is None:
            raise QLIPError(f"{recipe.model.init}: has no vocabulary, so its text tower cannot be trained")
        return processor
    assert recipe.model.config is not None
    config = QLIPConfig.named(recipe.model.config)
    length, side = config.text_config.max_position_embeddings, config.vision_config.image_size
    preprocessing = Preprocessing((side, side), side, patch_size=config.vision_config.patch_size)
    vocabulary = folder / "vocabulary"
    tokenizer = (
        CLIPTokenizer.from_folder(vocabulary, length) if (vocabulary / "tokenizer_config.json").exists() else None
    )
    if tokenizer is None:
        size = (recipe.vocabulary or VocabularySection()).size
        stream = _stream(recipe, preprocessing, _no_text)
        tokenizer = train_vocabulary(stream, size, length, console)
        tokenizer.save(vocabulary)
    return QLIPProcessor(preprocessing, tokenizer)


def _no_text(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    empty = torch.zeros(len(texts), 1, dtype=torch.int64)
    return empty, empty


def _stream(recipe: Recipe, preprocessing: Preprocessing, tokenize: object) -> TrainingStream:
    return open_stream(
        recipe.data,
        recipe.seed,
        preprocessing.size,
        preprocessing.mean,
        preprocessing.std,
        tokenize,  # type: ignore[arg-type]
    )


def _model(recipe: Recipe, tokenizer: CLIPTokenizer) -> QLIPModel:
    if recipe.model.init is not None:
        return QLIPModel.from_pretrained(recipe.model.init)
    assert recipe.model.config is not None
    values = QLIPConfig.named(recipe.model.config).to_json_dict()
    values["text_config"] |= {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
    }
    return QLIPModel(QLIPConfig.from_dict(values, recipe.model.config))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process a run folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise QLIPError(f"{folder}: cannot be written ({error.strerror}); choose another run folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise QLIPError(f"{folder}: another process trains here; wait for it, or choose another folder") from None
        yield


def _claim(recipe: Recipe, folder: Path) -> None:
    """Store the resolved recipe, or refuse to go on with another one."""
    path = folder / "recipe.yaml"
    if path.exists():
        stored = validate(Recipe, yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
        changed = _first_difference(stored.model_dump(mode="json"), recipe.model_dump(mode="json"))
        if changed is not None:
            raise QLIPError(
                f"{folder}: was started with another {changed}; choose another folder, or start anew with --restart"
            )
    write_text(path, recipe.to_yaml())


def _first_difference(old: object, new: object, key: str = "") -> str | None:
    if key in FREE_KEYS or old == new:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            inner = f"{key}.{name}".lstrip(".")
            if (found := _first_difference(old.get(name), new.get(name), inner)) is not None:
                return found
        return None
    return f"{key} ({old!r}, now {new!r})"


def start_anew(folder: Path) -> None:
    """Delete a run, for ``--restart``."""
    with _locked(folder):
        for name in ("checkpoints", "tensorboard", "pictures", "vocabulary", "model"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("recipe.yaml", "sessions.json", "log.jsonl"):
            (folder / name).unlink(missing_ok=True)
