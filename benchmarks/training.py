"""Cost and savings of the fast paths of training: ``python -m benchmarks.training``.

- the contrastive loss in chunks compared with the full table, at growing batch sizes: time and peak memory;
- exact gradients in micro-batches (two passes) compared with one pass: time;
- a checkpoint: delay of the step that saves;
- a step of stage 1 and of stage 2 at growing batch sizes: peak memory (the paper's reason for two stages).

Medians of interleaved rounds; each peak memory is measured in its own process. No other program should run on the
machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import measure
from benchmarks.report import publish
from qlip import QLIPConfig, QLIPModel, QLIPProcessor, assets
from qlip.data.loader.batch import Batch
from qlip.training.accumulate import backward
from qlip.training.losses import info_nce
from qlip.training.parallel.distributed import Parallel
from qlip.training.recipe import check_recipe
from qlip.training.recipe_schema import CheckpointSection
from qlip.training.state.checkpoints import Checkpoints
from qlip.training.task import Task
from qlip.training.tasks import Stage1, Stage2
from qlip.training.tasks.recipe import AnyRecipe, Stage1Recipe, Stage2Recipe

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- training: begin -->", "<!-- training: end -->"
WIDTH = 512
"""Size of the published models' embeddings."""

Piece = Callable[[], None]


def main() -> None:
    """Measure, print the tables, and write the files that were asked for."""
    options = _options()
    if options.peak:
        print(_peak(**json.loads(options.peak)))
        return
    measure.prepare(options.threads, options.tiny)
    tables = {"chunks": contrastive, "micro-batches": micro_batches, "checkpoint": checkpoint, "stages": stages}
    lines = (line for name in options.tables for line in (*tables[name](options.rounds, options.tiny), ""))
    publish(f"medians of {options.rounds} rounds", lines, README, BEGIN, END, options.write)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.split("\n")[0])
    names = ["chunks", "micro-batches", "checkpoint", "stages"]
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per measurement (default: 5)")
    parser.add_argument("--tables", nargs="+", choices=names, default=names, help="tables to make (default: all)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to test the benchmark itself")
    parser.add_argument("--threads", type=int, help="number of PyTorch threads (default: chosen by PyTorch)")
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/README.md")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---------------------------------------------------------------- the contrastive loss


def contrastive(rounds: int, tiny: bool) -> Iterator[str]:
    """Make the table of the contrastive loss: full table compared with chunks."""
    yield "| global batch | plain, s | chunks of 512, s | time | plain peak, MiB | chunked peak, MiB |"
    yield "|---|---|---|---|---|---|"
    for batch in (64, 128) if tiny else (2048, 4096, 8192, 16384):
        pieces = {kind: _contrast(kind, batch) for kind in ("plain", "chunked")}
        seconds = {name: measure.median(times) for name, times in measure.interleaved(pieces, rounds).items()}
        empty = _subprocess(work="contrast", kind="nothing", batch=batch)
        peaks = {kind: _subprocess(work="contrast", kind=kind, batch=batch) - empty for kind in pieces}
        yield (
            f"| {batch:,} | {seconds['plain']:.3f} | {seconds['chunked']:.3f} |"
            f" {seconds['chunked'] / seconds['plain']:.2f}x | {peaks['plain'] / 2**20:.0f} |"
            f" {peaks['chunked'] / 2**20:.0f} |"
        )


def _contrast(kind: str, batch: int) -> Piece:
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        F.normalize(torch.randn(batch, WIDTH, generator=generator), dim=-1).requires_grad_() for _ in range(2)
    )
    scale = torch.tensor(2.6592, requires_grad=True)
    ids = torch.arange(batch) // 2  # pairs of equal captions

    def run() -> None:
        if kind == "nothing":
            return
        inputs = (images, texts, scale, ids)
        loss = _plain(*inputs) if kind == "plain" else info_nce(*inputs, chunk_size=512)
        loss.backward()
        for one in (images, texts, scale):
            one.grad = None

    return run


def _plain(images: Tensor, texts: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """Compute the loss by its definition, with the full tables of logits and targets."""
    logits = images @ texts.t() * scale.exp()
    equal = (ids[:, None] == ids).float()
    targets = equal / equal.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)) / 2


# ---------------------------------------------------------------- steps


def micro_batches(rounds: int, tiny: bool) -> Iterator[str]:
    """Make the table of a step in one pass and in micro-batches."""
    yield "| model | batch | micro-batches | one shot, s | two passes, s | ratio (aim: at most 1.35) |"
    yield "|---|---|---|---|---|---|"
    batch = 8 if tiny else 64
    for number in (2,) if tiny else (2, 4):
        task = stage1()
        whole, size = make_batch(task.model, batch), batch // number
        work = {"whole": _step(task, [whole]), "pieces": _step(task, whole.split(number))}
        seconds = {name: measure.median(times) for name, times in measure.interleaved(work, rounds).items()}
        yield (
            f"| qlip-nano-64 | {batch} | {number} of {size} | {seconds['whole']:.3f} | {seconds['pieces']:.3f} |"
            f" {seconds['pieces'] / seconds['whole']:.2f} |"
        )


def checkpoint(rounds: int, tiny: bool) -> Iterator[str]:
    """Make the table of the delay of a step by a checkpoint."""
    yield "| model | step, s | saved at once, s | asynchronously, s | in steps (aim: below 1) |"
    yield "|---|---|---|---|---|"
    task = stage1()
    step = _step(task, [make_batch(task.model, 4 if tiny else 32)])
    step()
    for optimizer in task.phases[0].optimizers:
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(1)
        work: dict[str, Piece] = {"step": step}
        stores = {}
        for name, asynchronous in (("at once", False), ("asynchronously", True)):
            stores[name] = Checkpoints(
                Path(folder) / name, CheckpointSection(keep=1, asynchronous=asynchronous), Parallel(recipe)
            )
            work[name] = _saving(stores[name], task)
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for turn in range(rounds + 1):
            for name, piece in work.items():
                began = time.perf_counter()
                piece()
                took = time.perf_counter() - began
                if name in stores:
                    stores[name].wait()  # the write in the background is not part of the step
                if turn:
                    seconds[name].append(took)
    medians = {name: measure.median(times) for name, times in seconds.items()}
    yield (
        f"| qlip-nano-64, batch 32 | {medians['step']:.3f} | {medians['at once']:.3f} |"
        f" {medians['asynchronously']:.3f} | {medians['asynchronously'] / medians['step']:.2f} |"
    )


def _saving(store: Checkpoints, task: Task) -> Piece:
    steps = iter(range(1, 10**6))
    return lambda: store.save(next(steps), task, None, {})  # type: ignore[func-returns-value]


def stages(rounds: int, tiny: bool) -> Iterator[str]:
    """Make the table of the peak memory of a step of each stage."""
    del rounds
    yield "| batch | stage 1, MiB | stage 2, pixels and codes only, MiB | with LPIPS, MiB | with LPIPS and a GAN, MiB |"
    yield "|---|---|---|---|---|"
    kinds = {"stage1": {}, "stage2": {"p": 0.0, "g": 0.0}, "lpips": {"p": 0.1, "g": 0.0}, "gan": {"p": 0.1, "g": 0.1}}
    for batch in (2, 4) if tiny else (8, 16, 32, 64):
        peaks = []
        for kind in kinds:
            peaks.append(_subprocess(work="stage", kind=kind, batch=batch) / 2**20)
        yield f"| {batch} | " + " | ".join(f"{peak:.0f}" for peak in peaks) + " |"


# ---------------------------------------------------------------- pieces


def _recipe(stage: int, p: float = 0.1, g: float = 0.1) -> AnyRecipe:
    values: dict[str, Any] = {
        "name": "benchmark",
        "stage": stage,
        "model": {"init": "bundled"},
        "data": {"sources": [{"path": "unused"}]},
        "batch_size": 1,
        "schedule": {"steps": 1},
    }
    if stage == 2:
        values["losses"] = {"alpha_p": p, "alpha_g": g}
        values["discriminator"] = {} if g else None
    return check_recipe(values, "benchmark")


def stage1() -> Stage1:
    """Make the stage 1 task of the bundled model."""
    recipe = _recipe(1)
    assert isinstance(recipe, Stage1Recipe)
    return Stage1(QLIPModel.from_pretrained("bundled").train(), QLIPProcessor.from_pretrained("bundled"), recipe)


def make_batch(model: QLIPModel, size: int) -> Batch:
    """Make a batch of noise with captions: time and memory do not depend on the content."""
    side, length = model.image_size, QLIPConfig.named(assets.BUNDLED).text_config.max_position_embeddings
    return Batch(
        pixel_values=torch.randn(size, 3, side, side),
        input_ids=torch.randint(0, 500, (size, length)),
        has_caption=torch.ones(size, dtype=torch.bool),
        match_ids=torch.arange(size) // 2,
        keys=[str(number) for number in range(size)],
        captions=[None] * size,
    )


def _step(task: Task, pieces: list[Batch]) -> Piece:
    def run() -> None:
        for phase in task.phases:
            for optimizer in phase.optimizers:
                optimizer.zero_grad()
            backward(phase, pieces)

    return run


def _subprocess(**request: Any) -> int:
    command = [sys.executable, "-m", "benchmarks.training", "--peak", json.dumps(request)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _peak(work: str, kind: str, batch: int) -> int:
    if work == "contrast":
        return measure.peak_bytes(_contrast(kind, batch))
    return measure.peak_bytes(_step(_task_of(kind), [make_batch(QLIPModel.from_pretrained("bundled"), batch)]))


def _task_of(kind: str) -> Task:
    if kind == "stage1":
        return stage1()
    recipe = _recipe(2, 0.0 if kind == "stage2" else 0.1, 0.1 if kind == "gan" else 0.0)
    assert isinstance(recipe, Stage2Recipe)
    model, processor = QLIPModel.from_pretrained("bundled").train(), QLIPProcessor.from_pretrained("bundled")
    return Stage2(model, processor, recipe)


if __name__ == "__main__":
    main()
