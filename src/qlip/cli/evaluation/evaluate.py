"""`qlip eval`: the figures of a model, with everything they depend on."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlip.cli import options
from qlip.cli.console import FAILURE, print_json, progress, say, stoppable, usage_error
from qlip.cli.evaluation import eval_models as subjects
from qlip.cli.evaluation import generated
from qlip.cli.evaluation import print_results as figures

if TYPE_CHECKING:
    from qlip.evaluation.models.base import EvalModel
    from qlip.evaluation.report.result import Result
    from qlip.evaluation.run.evaluate import EvalSpec, Outcome, Ranks

app = typer.Typer()
app.command("statistics")(generated.statistics)
app.command("generated")(generated.generated)

BATCH_SIZE = 64
CODED = 500
"""Images of a set that --codecs codes where no --limit is given: a search for each one's quality is slow."""
VERIFICATION = "verification"
"""Its rows' folder, which begins anew each time."""
HELP_DATA = "cifar10:test, a folder, tar shards, PATH#imagenet; may be given again (docs/evaluation.md)."
HELP_CODECS = f"JPEG, WebP and AVIF at equal bytes beside the model; the first {CODED} of a set, or as --limit says."
HELP_EVALUATOR = "What to measure there: reconstruction, sets, zero_shot, retrieval, codebook, ..."
HELP_PROBE = "Train linear, nearest-neighbour and few-shot probes on this set's features, and test them on --data."
HELP_PAIRS = "A .csv or .jsonl of original,rebuilt: files that something else rebuilt, compared as they are."
HELP_THROUGHPUT = "Images a second and memory as well; nothing else should run on the machine."
HELP_OUTPUT = "Folder for the result, made if absent; a stopped run goes on from it."
_WHAT = ("--suite", "--data", "--probe", "--throughput", "--codecs")
UNREAD = {
    "--verify": ("--verify measures what the result says", (*_WHAT, "--evaluator", "--limit")),
    "--pairs": ("--pairs compares files as they are", (*_WHAT, "--model", "--size", "--device", "--dtype")),
}
"""By an option: why others would do nothing beside it, and which."""


@app.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    model: options.Model = options.DEFAULT_MODEL,
    suite: Annotated[str | None, typer.Option(help="What to measure: quick, card or full; card by default.")] = None,
    data: Annotated[list[str] | None, typer.Option(metavar="SET", help=HELP_DATA)] = None,
    evaluator: Annotated[list[str] | None, typer.Option(metavar="NAME", help=HELP_EVALUATOR)] = None,
    probe: Annotated[str | None, typer.Option(metavar="SET", help=HELP_PROBE)] = None,
    pairs: Annotated[Path | None, typer.Option(metavar="LIST", help=HELP_PAIRS)] = None,
    throughput: Annotated[bool, typer.Option(help=HELP_THROUGHPUT)] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many images of each set.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help=HELP_OUTPUT)] = None,
    verify: Annotated[
        Path | None, typer.Option(metavar="RESULT", help="Measure what a result says again, and say whether it holds.")
    ] = None,
    codecs: Annotated[bool, typer.Option(help=HELP_CODECS)] = False,
    size: options.Size = None,
    batch_size: options.BatchSize = BATCH_SIZE,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    device: options.Device = options.AUTO,
    dtype: options.DtypeOption = options.Dtype.float32,
    as_json: options.Json = False,
) -> None:
    """Measure a model on held-out images: what its tokens keep, whether it names what they show, how bits are used.

    The suites use the sets that qlip data get fetches: cifar10, emoji, clipart, wallpapers. Every figure carries set,
    count, preparation and fingerprints; with -o the whole result is written and a stopped run goes on. Under torchrun
    processes share the images, and the figures are the same.
    """
    from qlip.evaluation.models.base import QLIPEvalModel
    from qlip.evaluation.run.evaluate import specs_of

    if context.invoked_subcommand is not None:
        _alone(context)
        return
    given = _given(context)
    for mode, (why, unread) in UNREAD.items():
        if mode in given:
            _refuse(why, given, unread)
    _check_shared(output)
    claimed = None if verify is None else _claimed(verify, pairs)
    if claimed is not None:
        items = specs_of(claimed)
    else:
        items = _items(suite, data, evaluator, probe, limit, throughput, pairs, model)
        _refuse_unread(given, items)
    if pairs is None:
        eval_model, opened = subjects.model(model, subjects.own_device(device), dtype, size)
    else:
        eval_model, opened = subjects.pairs(pairs)
    if codecs and not isinstance(eval_model, QLIPEvalModel):
        usage_error("--codecs stand beside a QLIP's bytes an image; leave it out")
    same = _same(model, pairs, size, device, dtype, batch_size)
    how = _How(opened, output, batch_size, workers, same)
    if claimed is not None:
        _verify(claimed, eval_model, items, how, as_json)
        return
    with _together(how) as shared:
        outcome = _measured(eval_model, items, shared, "model")
    if outcome is not None:
        beside = _codecs(eval_model, items, how, limit or CODED) if codecs else {}
        _tell(eval_model, outcome, beside, how, as_json)


@dataclass(frozen=True)
class _How:
    """What does not change the figures: where rows lie, and who computes them."""

    opened: subjects.Opened
    output: Path | None
    batch_size: int
    workers: int
    same: tuple[str, ...] = ()
    """Options without which another command would measure something else."""
    ranks: Ranks | None = None


def _same(
    model: str,
    pairs: Path | None,
    size: tuple[int, int] | None,
    device: str,
    dtype: options.Dtype,
    batch_size: int,
) -> tuple[str, ...]:
    """What has to be given again to measure the same thing in the same way; what has its default is left out."""
    given: dict[str, tuple[object, ...]] = {
        "--model": () if model == options.DEFAULT_MODEL else (model,),
        "--pairs": () if pairs is None else (pairs,),
        "--size": size or (),
        "--device": () if device == options.AUTO else (device,),
        "--dtype": () if dtype == options.Dtype.float32 else (dtype.value,),
        "--batch-size": () if batch_size == BATCH_SIZE else (batch_size,),
    }
    return tuple(str(one) for name, values in given.items() if values for one in (name, *values))


def _alone(context: typer.Context) -> None:
    """Options before a command of its own would do nothing."""
    for name in _given(context):
        usage_error(f"{name} before {context.invoked_subcommand} does nothing; give options behind it")


def _given(context: typer.Context) -> list[str]:
    """Options that stand in the command, whatever their values."""
    found = []
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is not None and source.name == "COMMANDLINE":
            found.append(parameter.opts[0])
    return found


def _refuse(why: str, given: list[str], unread: tuple[str, ...]) -> None:
    if wrong := [name for name in given if name in unread]:
        usage_error(f"{why}; leave out {', '.join(wrong)}")


def _refuse_unread(given: list[str], items: list[EvalSpec]) -> None:
    """What would do nothing beside what is measured."""
    from qlip.evaluation.evaluators.throughput import THROUGHPUT

    if all(item.evaluator == THROUGHPUT for item in items):
        unread = ("--limit", "--workers", "--batch-size", "--codecs")
        _refuse("throughput is of no set, and of batches of its own", given, unread)
    if "--codecs" in given and not any(item.evaluator == "reconstruction" for item in items):
        usage_error("--codecs stand beside what a model rebuilds; measure reconstruction too, or leave it out")


def _items(
    suite: str | None,
    data: list[str] | None,
    evaluators: list[str] | None,
    probe: str | None,
    limit: int | None,
    throughput: bool,
    pairs: Path | None,
    model: str,
) -> list[EvalSpec]:
    from qlip.evaluation.evaluators.seen_classes import training_sources
    from qlip.evaluation.evaluators.throughput import THROUGHPUT
    from qlip.evaluation.run import suites

    if pairs is not None:
        return suites.specs_for([str(pairs)], evaluators or ["reconstruction"], limit)
    if suite is not None and (data or evaluators or probe):
        usage_error("--suite names sets and evaluators itself; leave out --data, --evaluator and --probe")
    if (set(evaluators or ()) - {THROUGHPUT} or probe) and not data:
        usage_error("--evaluator and --probe need --data: what should be measured, or tested on?")
    if data or evaluators:
        items = suites.specs_for(data or [], evaluators or ([] if probe else ["reconstruction"]), limit)
        items += [suites.probe_spec(one, probe, limit) for one in data or [] if probe]
    else:
        items = suites.suite(suite or "card", limit)
    if throughput and not any(item.evaluator == THROUGHPUT for item in items):
        items.append(suites.throughput_spec())
    return suites.with_training_sources(items, training_sources(model))


def _claimed(path: Path, pairs: Path | None) -> Result:
    """What a result says that can be measured again, of what is given here."""
    from qlip.evaluation.generation.images import GENERATED
    from qlip.evaluation.report.result import Result
    from qlip.evaluation.run.evaluate import repeatable

    claimed = Result.load(path)
    kind = claimed.subject.get("kind")
    if kind == GENERATED:
        usage_error(f"{path}: of generated images; measure them again with qlip eval generated")
    if (kind == "PairedFiles") != (pairs is not None):
        given = "give the list with --pairs" if pairs is None else "leave out --pairs"
        usage_error(f"{path}: {'of pairs of files' if pairs is None else 'of a model'}; {given}")
    return repeatable(claimed)


def _check_shared(output: Path | None) -> None:
    from qlip.runtime.ranks import world_size

    if world_size() > 1 and output is None:
        usage_error("several processes share a folder; give --output")


def _tell(model: EvalModel, outcome: Outcome, beside: dict[str, Outcome], how: _How, as_json: bool) -> None:
    """Write and print what was found."""
    from qlip.evaluation.report.bundle import write_bundle

    output = how.output
    if output is not None:
        _write(model, outcome, how, output)
        for name, one in beside.items():
            write_bundle(output / "codecs" / name, one.result, one.metric_results)
    results = [outcome.result, *(one.result for one in beside.values())]
    if as_json:
        print_json(
            results[0].model_dump(mode="json") | {"beside": [one.model_dump(mode="json") for one in results[1:]]}
        )
        return
    figures.print_figures(results)
    if output is not None:
        again = shlex.join(["qlip", "eval", *how.same, "--verify", str(output / "result.json")])
        print(f"\nTo read: {output / 'report.html'}. To measure it again: {again}")


def _write(model: EvalModel, outcome: Outcome, how: _How, output: Path) -> None:
    """The result as a folder, with a page to read: each set's worst and best images are rebuilt once more for it."""
    from qlip.data.loader.eval_set import EvalSet
    from qlip.data.loader.transforms import EvalTransform
    from qlip.evaluation.models.batch import reconstruct_by_key
    from qlip.evaluation.report.bundle import write_bundle
    from qlip.evaluation.report.html import write_report
    from qlip.evaluation.report.pages import ENDS, SHOWN

    pairs = {}
    for row, one in enumerate(outcome.result.measured):
        ends = [table for name, table in one.tables.items() if name.startswith(ENDS)]
        keys = [str(record["key"]) for table in ends for record in table[:SHOWN] if "key" in record]
        if keys:
            data = EvalSet(how.opened(one.data), EvalTransform(model.preprocessing), one.limit)
            pairs[row] = reconstruct_by_key(model, data, list(dict.fromkeys(keys)))
    write_bundle(output, outcome.result, outcome.metric_results, pairs=pairs)
    write_report(output)


@contextmanager
def _together(how: _How) -> Iterator[_How]:
    """This process alone, or among those that torchrun started."""
    from qlip.evaluation.run.evaluate import Ranks
    from qlip.runtime.ranks import world_size

    world = world_size()
    if world == 1:
        yield how
        return
    from torch import distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=7))  # the slowest one's share is waited for
    try:
        yield replace(how, ranks=Ranks(distributed.get_rank(), world, distributed.barrier))
    finally:
        distributed.destroy_process_group()


def _measured(model: EvalModel, items: list[EvalSpec], how: _How, what: str) -> Outcome | None:
    from qlip.evaluation.run.evaluate import Ranks, count_images, run_specs

    work = None if how.output is None else how.output / "rows" / what
    goes_on = work is not None and what != VERIFICATION
    advice = "the same command goes on from there" if goes_on else "nothing was reported"
    with stoppable(advice), progress(f"measuring {what}", count_images(items, how.opened)) as bar:
        return run_specs(
            model,
            items,
            open_images=how.opened,
            work=work,
            ranks=how.ranks or Ranks(),
            batch_size=how.batch_size,
            num_workers=how.workers,
            on_progress=bar.advance,
        )


def _codecs(model: EvalModel, items: list[EvalSpec], how: _How, limit: int) -> dict[str, Outcome]:
    """What codecs make of the same images, or the first of each set, at the model's bytes; in this process."""
    from qlip.evaluation.models.base import QLIPEvalModel
    from qlip.evaluation.models.codecs import at_equal_bytes
    from qlip.evaluation.run.suites import limited

    rebuilt = limited([item for item in items if item.evaluator == "reconstruction"], limit)
    assert isinstance(model, QLIPEvalModel)
    judged, why_not = at_equal_bytes(model.bytes_per_image, model.preprocessing)
    for codec, reason in why_not.items():
        say(f"{codec} is left out: {reason}")
    found = {}
    for one in judged:
        outcome = _measured(one, rebuilt, replace(how, ranks=None), one.codec)
        assert outcome is not None
        found[str(one.codec)] = outcome
    return found


def _verify(claimed: Result, model: EvalModel, items: list[EvalSpec], how: _How, as_json: bool) -> None:
    """Measure again what a result says, and say what does not hold."""
    from qlip.evaluation.report.result import differences

    with _together(how) as shared:
        rank = 0 if shared.ranks is None else shared.ranks.rank
        if how.output is not None and rank == 0:
            shutil.rmtree(
                how.output / "rows" / VERIFICATION, ignore_errors=True
            )  # rows of before would only say the same
        if shared.ranks is not None:
            shared.ranks.barrier()
        outcome = _measured(model, items, shared, VERIFICATION)
    if outcome is None:
        return
    gone = differences(claimed, outcome.result)
    if as_json:
        print_json({"holds": not gone, "differences": [one.model_dump() for one in gone]})
    elif gone:
        figures.print_differences(gone)
    else:
        count = sum(len(one.values) for one in claimed.measured)
        print(f"It holds: {count} figures of {len(claimed.measured)} measurements came out again.")
    if gone:
        say(f"{len(gone)} of what the result says did not come out again")
        raise typer.Exit(FAILURE)
