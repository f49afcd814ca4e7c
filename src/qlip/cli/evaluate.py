"""`qlip eval`: the figures of a model, with everything they depend on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlip.cli import options
from qlip.cli.console import FAILURE, new_table, print_json, print_table, progress, say, stoppable, usage_error

if TYPE_CHECKING:
    from qlip.data.sources import CaptionedImages
    from qlip.evaluation.result import Figure, Measured, Result
    from qlip.evaluation.running import Item, Outcome, Ranks
    from qlip.evaluation.subjects import Subject

HEADLINES = {
    "reconstruction": ("psnr", "ssim", "ms_ssim", "l1", "lpips_vgg", "lpips_alex", "shrink_psnr", "bits_per_pixel"),
    "codebook": ("bit_entropy", "bit_entropy_min", "dead_bits", "tied_bits"),
}
"""Which figures the table on the terminal has; all of them where nothing is said. The JSON has all."""
SHOWN = 8
"""Worst and best pictures of a set on the page."""
HELP_DATA = "cifar10:test, a folder, tar shards, PATH#imagenet; may be given again (docs/evaluation.md)."
HELP_EVALUATOR = "What to measure there: reconstruction, sets, zero_shot, retrieval, codebook, robustness, ..."
HELP_PROBE = "Train linear, nearest-neighbour and few-shot probes on this set's features, and test them on --data."
HELP_OUTPUT = "Folder for the result, made if absent; a stopped run goes on from it."


def evaluate(
    model: options.Model = options.DEFAULT_MODEL,
    suite: Annotated[str | None, typer.Option(help="What to measure: quick, card or full; card by default.")] = None,
    data: Annotated[list[str] | None, typer.Option(metavar="SET", help=HELP_DATA)] = None,
    evaluator: Annotated[list[str] | None, typer.Option(metavar="NAME", help=HELP_EVALUATOR)] = None,
    probe: Annotated[str | None, typer.Option(metavar="SET", help=HELP_PROBE)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many pictures of each set.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help=HELP_OUTPUT)] = None,
    verify: Annotated[
        Path | None, typer.Option(metavar="RESULT", help="Measure what a result says again, and say whether it holds.")
    ] = None,
    codecs: Annotated[bool, typer.Option(help="JPEG, WebP and AVIF at equal bytes beside the model.")] = False,
    size: options.Size = None,
    batch_size: options.BatchSize = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read pictures.")] = 0,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.float32,
    as_json: options.Json = False,
) -> None:
    """Measure a model on held-out pictures: what its tokens keep, whether it names what they show, how bits are used.

    The suites use the sets that qlip data get fetches: cifar10, emoji, clipart, wallpapers. Every figure carries set,
    count, preparation and fingerprints; with -o the whole result is written and a stopped run goes on. Under torchrun
    the processes share the pictures, and the figures are the same.
    """
    from qlip.evaluation import suites
    from qlip.evaluation.bundle import write_bundle
    from qlip.evaluation.result import Result
    from qlip.evaluation.running import items_of
    from qlip.evaluation.subjects import QLIPSubject
    from qlip.evaluation.trained import known_sources

    if verify is not None and (suite or data or evaluator or probe or limit):
        usage_error(
            "--verify measures what the result says; leave out --suite, --data, --evaluator, --probe and --limit"
        )
    _opened.cache_clear()
    claimed = Result.load(verify) if verify is not None else None
    items = items_of(claimed) if claimed is not None else _items(suite, data, evaluator, probe, limit)
    if claimed is None:
        items = suites.knowing(items, known_sources(model))
    subject = _subject(model, _own(device), dtype, size)
    if codecs and not isinstance(subject, QLIPSubject):
        usage_error("--codecs stand beside a QLIP's bytes a picture; leave it out")
    with _together(output) as ranks:
        what = "model" if claimed is None else "verification"
        if claimed is not None and output is not None:
            _empty(output / "rows" / what, ranks)  # rows of before would only say the same again
        outcome = _measured(subject, items, output, ranks, batch_size, workers, what)
        if outcome is None:
            return
    if claimed is not None:
        _verified(claimed, outcome.result, as_json)
        return
    beside = _codecs(subject, items, output, batch_size, workers) if codecs else {}
    if output is not None:
        _write(subject, outcome, output, _card(model))
        for name, one in beside.items():
            write_bundle(output / "codecs" / name, one.result, one.findings)
    results = [outcome.result, *(one.result for one in beside.values())]
    if as_json:
        print_json(
            results[0].model_dump(mode="json") | {"beside": [one.model_dump(mode="json") for one in results[1:]]}
        )
        return
    _print(results)
    if output is not None:
        print(f"\nTo read: {output / 'report.html'}. To measure it again: qlip eval --verify {output / 'result.json'}")


def _items(
    suite: str | None, data: list[str] | None, evaluators: list[str] | None, probe: str | None, limit: int | None
) -> list[Item]:
    from qlip.evaluation import suites

    if suite is not None and (data or evaluators or probe):
        usage_error("--suite names sets and evaluators itself; leave out --data, --evaluator and --probe")
    if (evaluators or probe) and not data:
        usage_error("--evaluator and --probe need --data: what should be measured, or tested on?")
    if data:
        items = suites.items_for(data, evaluators or ([] if probe else ["reconstruction"]), limit)
        return [*items, *(suites.probe_item(one, probe, limit) for one in data if probe)]
    return suites.suite(suite or "card", limit)


def _own(device: str) -> str:
    """This process's GPU where torchrun started several and none was named."""
    import torch

    from qlip.training.environment import local_rank, world_size

    shared = device == "auto" and world_size() > 1 and torch.cuda.is_available()
    return f"cuda:{local_rank()}" if shared else device


def _subject(model: str, device: str, dtype: options.Dtype, size: tuple[int, int] | None) -> Subject:
    """A QLIP, or what an adapter opens: `diffusers.AutoencoderKL:FOLDER`, `module:callable`."""
    from qlip.cli import models
    from qlip.evaluation.adapters import open_subject
    from qlip.evaluation.subjects import QLIPSubject

    if ":" in model and not Path(model).exists():
        return open_subject(model, size=size, device=models.pick_device(device))
    tokenizer = models.load(model, device, dtype)
    return QLIPSubject(tokenizer.model, tokenizer.processor, tokenizer.name, size)


def _write(subject: Subject, outcome: Outcome, output: Path, card: str) -> None:
    """The result as a folder, with a page to read: each set's worst and best pictures are rebuilt once more for it."""
    from qlip.data.evalset import EvalSet
    from qlip.data.transforms import EvalTransform
    from qlip.evaluation.bundle import write_bundle
    from qlip.evaluation.rebuilding import pairs_again
    from qlip.evaluation.report import write_report

    pairs = {}
    for row, one in enumerate(outcome.result.measured):
        tables = [one.tables.get(name, []) for name in ("worst_psnr", "best_psnr")]
        keys = [str(record["key"]) for table in tables for record in table[:SHOWN]]
        if keys:
            data = EvalSet(_opened(one.data), EvalTransform(subject.preprocessing), one.limit)
            pairs[row] = pairs_again(subject, data, list(dict.fromkeys(keys)))
    write_bundle(output, outcome.result, outcome.findings, pairs=pairs, card=card)
    write_report(output)


def _card(model: str) -> str:
    """What a checkpoint says of itself, wherever it lies, without the metadata at its head."""
    from qlip.modeling.checkpoint import Files

    if ":" in model and not Path(model).exists():
        return ""  # an adapter's
    path = Files(model).path("README.md")
    text = "" if path is None else path.read_text(encoding="utf-8", errors="replace")
    return text.split("---\n", 2)[-1] if text.startswith("---\n") else text


@cache
def _opened(name: str) -> CaptionedImages:
    """A set by its name, opened once a command: for the bar, the passes, and the page."""
    from qlip.evaluation.protocol import open_set

    return open_set(name)


@contextmanager
def _together(output: Path | None) -> Iterator[Ranks]:
    """This process alone, or among those that torchrun started."""
    from qlip.evaluation.running import Ranks
    from qlip.training.environment import world_size

    world = world_size()
    if world == 1:
        yield Ranks()
        return
    if output is None:
        usage_error("several processes share a folder; give --output")
    from torch import distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=7))  # the slowest one's share is waited for
    try:
        yield Ranks(distributed.get_rank(), world, distributed.barrier)
    finally:
        distributed.destroy_process_group()


def _empty(folder: Path, ranks: Ranks) -> None:
    if ranks.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    ranks.barrier()


def _measured(
    subject: Subject,
    items: list[Item],
    output: Path | None,
    ranks: Ranks,
    batch_size: int,
    workers: int,
    what: str,
) -> Outcome | None:
    from qlip.evaluation.running import run_items, total

    advice = "nothing was reported" if output is None else "the same command goes on from there"
    with stoppable(advice), progress(f"measuring {what}", total(items, _opened)) as bar:
        return run_items(
            subject,
            items,
            opened=_opened,
            work=None if output is None else output / "rows" / what,
            ranks=ranks,
            batch_size=batch_size,
            num_workers=workers,
            advance=bar.advance,
        )


def _codecs(
    subject: Subject, items: list[Item], output: Path | None, batch_size: int, workers: int, limit: int = 500
) -> dict[str, Outcome]:
    """What codecs make of the same pictures, or the first of them, at the model's bytes a picture."""
    from qlip.evaluation.codecs import at_equal_bytes
    from qlip.evaluation.running import Ranks
    from qlip.evaluation.subjects import QLIPSubject
    from qlip.evaluation.suites import limited

    rebuilt = limited([item for item in items if item.evaluator == "reconstruction"], limit)
    assert isinstance(subject, QLIPSubject)
    judged, why_not = at_equal_bytes(subject.bytes_a_picture, subject.preprocessing, "excluded")
    for codec, reason in why_not.items():
        say(f"{codec} is left out: {reason}")
    found = {}
    for one in judged:
        outcome = _measured(one, rebuilt, output, Ranks(), batch_size, workers, one.codec)
        assert outcome is not None
        found[str(one.codec)] = outcome
    return found


def _verified(claimed: Result, found: Result, as_json: bool) -> None:
    from qlip.evaluation.result import differences

    gone = differences(claimed, found)
    if as_json:
        print_json({"holds": not gone, "differences": [one.model_dump() for one in gone]})
    elif gone:
        table = new_table("figure", "was", "is now", numbers=("was", "is now"))
        for one in gone:
            table.add_row(one.name, str(one.was), str(one.now))
        print_table(table)
    else:
        count = sum(len(one.values) for one in claimed.measured)
        print(f"It holds: {count} figures of {len(claimed.measured)} measurements came out again.")
    if gone:
        say(f"{len(gone)} of what the result says did not come out again")
        raise typer.Exit(FAILURE)


def _print(results: list[Result]) -> None:
    """A table an evaluator; rows of sets, of several subjects where there are several."""
    rows = [(result.subject["name"], one) for result in results for one in result.measured]
    for number, name in enumerate(dict.fromkeys(one.evaluator for _, one in rows)):
        if number:
            print()
        _print_one(name, [(subject, one) for subject, one in rows if one.evaluator == name], len(results) > 1)
    prepared = {one.preparation: one.as_shipped for _, one in rows}
    for preparation, as_shipped in prepared.items():
        print(f"\nPrepared {'as the checkpoint says' if as_shipped else 'NOT as the checkpoint says'}: {preparation}.")
    _print_notes(rows)


def _print_notes(rows: list[tuple[str, Measured]]) -> None:
    """Each note once, with where it holds."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for name, one in rows:
        for about, note in one.notes.items():
            where.setdefault((one.evaluator, about, note), []).append(f"{name} on {one.data}")
    for (evaluator, about, note), places in where.items():
        some = places[0] if len(places) == 1 else f"{len(places)} measurements"
        say(f"{evaluator}, {about} ({some}): {note}")
    for _, one in rows:
        for key, reason in one.broken[:3]:
            say(f"{one.data}: {key} is in no figure: {reason}")
        if len(one.broken) > 3:
            say(f"{one.data}: {len(one.broken) - 3} more could not be read; the JSON names them")


def _print_one(evaluator: str, rows: list[tuple[str, Measured]], several: bool) -> None:
    present = list(dict.fromkeys(name for _, one in rows for name in one.values))
    figures = [name for name in HEADLINES.get(evaluator, present) if name in present]
    columns = [*(["of"] if several else []), evaluator, "set", "n", *figures]
    table = new_table(*columns, numbers=("n", *figures))
    for subject, one in rows:
        cells = [_cell(one.values.get(name)) for name in figures]
        table.add_row(*([subject] if several else []), one.title, one.data, f"{one.count:,}", *cells)
    print_table(table)


def _cell(figure: Figure | None) -> str:
    """With as many digits as the interval, if there is one, can bear."""
    if figure is None:
        return "-"
    if figure.value.is_integer() and abs(figure.value) < 1e6:
        return f"{figure.value:,.0f}{_unit(figure.unit)}"
    digits = 2 if figure.unit in ("dB", "bit") else 1 if figure.unit == "%" or abs(figure.value) >= 100 else 3
    return f"{figure.value:.{digits}f}{_unit(figure.unit)}"


def _unit(unit: str) -> str:
    return "%" if unit == "%" else f" {unit}" if unit else ""
