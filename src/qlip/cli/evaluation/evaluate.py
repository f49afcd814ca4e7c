"""`qlip eval`: metrics of a model, with all that they depend on."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from qlip.cli import options
from qlip.cli.console import FAILURE, note, plural, print_json, progress, say, show, stoppable, usage_error
from qlip.cli.evaluation import eval_models, generated, print_results
from qlip.cli.evaluation.output_folder import check_output

if TYPE_CHECKING:
    from qlip.evaluation.models.base import EvalModel
    from qlip.evaluation.report.result import Result
    from qlip.evaluation.run.evaluate import EvalSpec, Outcome, Ranks


class _Eval(TyperGroup):
    """The group, which is told its model by an option; qlip vlm eval and qlip um3 eval take an argument."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the subcommand; the error about another word says how to give a model."""
        try:
            return super().resolve_command(ctx, args)
        except typer.TyperException as error:
            error.message += f" To measure a model: qlip eval -m {shlex.quote(args[0])} -o DIR"
            raise


app = typer.Typer(cls=_Eval)
app.command("statistics")(generated.statistics)
app.command("generated")(generated.generated)

BATCH_SIZE = 64
NUM_CODED = 500
"""Default number of images per set for --codecs, which searches for each image's quality and is slow."""
VERIFICATION = "verification"
"""Folder of the rows of --verify, which is deleted each time."""
HELP_DATA = "Set of images: cifar10:test, a folder, tar shards, or PATH#imagenet. May be repeated."
HELP_CODECS = f"Also measure JPEG, WebP and AVIF at equal bytes, on {NUM_CODED} images per set, or as many as --limit."
HELP_EVALUATOR = (
    "Evaluator to run on --data: reconstruction, sets, zero_shot, retrieval, codebook, ... May be repeated or "
    "separated by commas."
)
HELP_METRICS = (
    "Metric to measure on --data or --pairs, such as psnr, ssim, lpips, rfid; runs the evaluator that computes it. "
    "May be repeated or separated by commas."
)
HELP_SET = "Setting of an evaluator, such as retrieval.captions=5, sets.neighbours=5. May be repeated."
HELP_PROBE = "Set whose features train linear, nearest-neighbour and few-shot probes, which are tested on --data."
HELP_PAIRS = "List of image files to compare: a .csv or .jsonl with columns original and rebuilt."
HELP_THROUGHPUT = "Also measure images per second and memory; nothing else should run on the machine."
HELP_PER_IMAGE = "File for a table of the metrics of each image; must end in .csv or .parquet."
HELP_OUTPUT = "Folder for the result, created if absent; a stopped evaluation continues from it."
_SPECS = ("--suite", "--data", "--probe", "--throughput", "--codecs")
UNREAD = {
    "--verify": (
        "--verify measures what the result holds",
        (*_SPECS, "--per-image", "--evaluator", "--metrics", "--set", "--limit"),
    ),
    "--pairs": ("--pairs compares existing files", (*_SPECS, "--model", "--size", "--device", "--dtype")),
}
"""By option: the reason why other options would have no effect, and these options."""


@app.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    model: options.Model = options.DEFAULT_MODEL,
    suite: Annotated[
        str | None, typer.Option(help="Suite of measurements to run: quick, card or full; default: card.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(metavar="SET", help=HELP_DATA)] = None,
    evaluator: Annotated[list[str] | None, typer.Option(metavar="NAME", help=HELP_EVALUATOR)] = None,
    metrics: Annotated[list[str] | None, typer.Option(metavar="NAME", help=HELP_METRICS)] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="EVALUATOR.KEY=VALUE", help=HELP_SET)] = None,
    probe: Annotated[str | None, typer.Option(metavar="SET", help=HELP_PROBE)] = None,
    pairs: Annotated[Path | None, typer.Option(metavar="LIST", help=HELP_PAIRS)] = None,
    throughput: Annotated[bool, typer.Option(help=HELP_THROUGHPUT)] = False,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Number of images per set, drawn at random, in proportion to labels; default: all."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help=HELP_OUTPUT)] = None,
    per_image: Annotated[Path | None, typer.Option(metavar="FILE", help=HELP_PER_IMAGE)] = None,
    verify: Annotated[
        Path | None,
        typer.Option(metavar="RESULT", help="Result to measure again and compare with: a result.json, or its folder."),
    ] = None,
    codecs: Annotated[bool, typer.Option(help=HELP_CODECS)] = False,
    size: options.Size = None,
    batch_size: options.BatchSize = BATCH_SIZE,
    workers: Annotated[int, typer.Option(min=0, help="Number of processes that read images.")] = 0,
    device: options.Device = options.AUTO,
    dtype: options.DtypeOption = options.Dtype.float32,
    as_json: options.Json = False,
) -> None:
    """Measure a model on held-out images: reconstruction, zero-shot classification, use of its codes.

    The suites use the sets that qlip data get fetches: cifar10, emoji, clipart, wallpapers. The result records set,
    count, preparation and fingerprints of each metric; -o writes it, with a report, and lets a stopped evaluation
    continue. Under torchrun, processes share the images, and the metrics are the same.
    """
    from qlip.data.public import require_datasets
    from qlip.evaluation.models.base import QLIPEvalModel
    from qlip.evaluation.report.html import require_packages
    from qlip.evaluation.report.per_image import check_path, write_per_image
    from qlip.evaluation.run.evaluate import require_packages as require_evaluators
    from qlip.evaluation.run.evaluate import specs_of
    from qlip.evaluation.run.suites import public_datasets

    if context.invoked_subcommand is not None:
        _refuse_before_subcommand(context)
        return
    given = options.given(context)
    for mode, (why, unread) in UNREAD.items():
        if mode in given:
            _refuse(why, given, unread)
    _check_shared(output)
    claimed = None if verify is None else _claimed(verify, pairs)
    if claimed is not None:
        items = specs_of(claimed)
    else:
        wanted = _Wanted(options.split_list(evaluator), options.split_list(metrics), settings or [])
        items = _items(suite, data, wanted, probe, limit, throughput, pairs)
        _refuse_unread(given, items)
        if output is not None:
            require_packages()
        if per_image is not None:
            check_path(per_image)
    require_evaluators(items)
    require_datasets(public_datasets(items))
    if pairs is None:
        eval_model, open_images = eval_models.model(model, eval_models.own_device(device), dtype, size)
    else:
        eval_model, open_images = eval_models.pairs(pairs)
    if codecs and not isinstance(eval_model, QLIPEvalModel):
        usage_error("--codecs needs the bytes per image of a QLIP model; leave it out")
    repeat = _repeat_options(model, pairs, size, device, dtype, batch_size)
    how = _How(open_images, output, batch_size, workers, repeat)
    if claimed is not None:
        _verify(claimed, eval_model, items, how, as_json)
        return
    _check_output(output, items, eval_model)
    with _together(how) as shared:
        outcome = _measured(eval_model, items, shared, "model")
    if outcome is not None:
        beside = _codecs(eval_model, items, how, limit or NUM_CODED) if codecs else {}
        _report(eval_model, outcome, beside, how, as_json)
        if per_image is not None:
            count = write_per_image(per_image, outcome.result, outcome.metric_results)
            note(f"metrics of {plural(count, 'image')} are in {per_image}")


@dataclass(frozen=True)
class _How:
    """Settings that do not change the metrics: files, batches and ranks."""

    open_images: eval_models.OpenImages
    output: Path | None
    batch_size: int
    workers: int
    repeat: tuple[str, ...] = ()
    """Options that another command needs to measure the same."""
    ranks: Ranks | None = None


def _repeat_options(
    model: str,
    pairs: Path | None,
    size: tuple[int, int] | None,
    device: str,
    dtype: options.Dtype,
    batch_size: int,
) -> tuple[str, ...]:
    """Options that another command needs to measure the same, except those that have their defaults."""
    given: dict[str, tuple[object, ...]] = {
        "--model": () if model == options.DEFAULT_MODEL else (model,),
        "--pairs": () if pairs is None else (pairs,),
        "--size": size or (),
        "--device": () if device == options.AUTO else (device,),
        "--dtype": () if dtype == options.Dtype.float32 else (dtype.value,),
        "--batch-size": () if batch_size == BATCH_SIZE else (batch_size,),
    }
    return tuple(str(one) for name, values in given.items() if values for one in (name, *values))


def _refuse_before_subcommand(context: typer.Context) -> None:
    """Refuse options before a subcommand, where they would have no effect."""
    for name in options.given(context):
        usage_error(f"{name} before {context.invoked_subcommand} has no effect; give options after it")


def _refuse(why: str, given: list[str], unread: tuple[str, ...]) -> None:
    if wrong := [name for name in given if name in unread]:
        usage_error(f"{why}; leave out {', '.join(wrong)}")


def _refuse_unread(given: list[str], items: list[EvalSpec]) -> None:
    """Refuse options that have no effect on what is measured."""
    from qlip.evaluation.evaluators.throughput import THROUGHPUT

    if all(item.evaluator == THROUGHPUT for item in items):
        unread = ("--limit", "--workers", "--batch-size", "--codecs", "--per-image")
        _refuse("throughput uses no set, and its own batches", given, unread)
    if "--codecs" in given and not any(item.evaluator == "reconstruction" for item in items):
        usage_error("--codecs needs the evaluator reconstruction; measure it too, or leave out --codecs")


@dataclass(frozen=True)
class _Wanted:
    """Values of --evaluator, --metrics and --set."""

    evaluators: list[str]
    metrics: list[str]
    settings: list[str]


def _settings(given: list[str]) -> dict[str, dict[str, object]]:
    """Settings per evaluator of EVALUATOR.KEY=VALUE, with values in YAML."""
    import yaml

    found: dict[str, dict[str, object]] = {}
    for one in given:
        place, mark, value = one.partition("=")
        name, dot, key = place.partition(".")
        if not (mark and dot and name and key):
            usage_error(f"--set {one}: give EVALUATOR.KEY=VALUE, such as retrieval.captions=5")
        try:
            found.setdefault(name, {})[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            usage_error(f"--set {one}: the value is not YAML; put quotes around it")
    return found


def _items(
    suite: str | None,
    data: list[str] | None,
    wanted: _Wanted,
    probe: str | None,
    limit: int | None,
    throughput: bool,
    pairs: Path | None,
) -> list[EvalSpec]:
    from qlip.evaluation.evaluators.throughput import THROUGHPUT
    from qlip.evaluation.run import suites

    own = suites.evaluators_of(wanted.metrics)
    evaluators = list(dict.fromkeys([*wanted.evaluators, *own]))
    for name, given in _settings(wanted.settings).items():
        own[name] = {**own.get(name, {}), **given}
    if pairs is not None:
        return suites.with_settings(suites.specs_for([str(pairs)], evaluators or ["reconstruction"], limit), own)
    if suite is not None and (data or evaluators or probe):
        usage_error("--suite chooses sets and evaluators; leave out --data, --evaluator, --metrics and --probe")
    if (set(evaluators) - {THROUGHPUT} or probe) and not data:
        usage_error("--evaluator, --metrics and --probe need --data, a set of images")
    if data or evaluators:
        items = suites.specs_for(data or [], evaluators or ([] if probe else ["reconstruction"]), limit)
        items += [suites.probe_spec(one, probe, limit) for one in data or [] if probe]
    else:
        items = suites.suite(suite or "card", limit)
    if throughput and not any(item.evaluator == THROUGHPUT for item in items):
        items.append(suites.throughput_spec())
    return suites.with_settings(items, own)


def _claimed(path: Path, pairs: Path | None) -> Result:
    """Load the measurements of a result that can be repeated with these options."""
    from qlip.evaluation.generation.images import GENERATED
    from qlip.evaluation.prompt_suites.scenes import DRAWER
    from qlip.evaluation.report.result import Result
    from qlip.evaluation.run.evaluate import REMOVED, repeatable
    from qlip.evaluation.run.scene_answers import TALKER, UM3

    claimed = Result.load(path)
    kind = claimed.subject.get("kind")
    if kind in (GENERATED, DRAWER):
        command = "qlip eval generated" if kind == GENERATED else "qlip draw --suite scenes"
        usage_error(f"{path}: is a result of generated images; measure them again with {command}")
    if kind in (TALKER, UM3):
        command = "qlip vlm eval" if kind == TALKER else "qlip um3 eval"
        usage_error(f"{path}: is a result of answers to questions; measure them again with {command}")
    if (kind == "PairedFiles") != (pairs is not None):
        given = "give the list with --pairs" if pairs is None else "leave out --pairs"
        usage_error(f"{path}: is a result of {'pairs of files' if pairs is None else 'a model'}; {given}")
    if gone := sorted({one.evaluator for one in claimed.measured} & REMOVED):
        say(f"{path}: {', '.join(gone)} is not verified, as this version no longer has it")
    return repeatable(claimed)


def _check_shared(output: Path | None) -> None:
    from qlip.runtime.ranks import world_size

    if world_size() > 1 and output is None:
        usage_error("several processes need a shared folder; give --output")


def _check_output(output: Path | None, items: list[EvalSpec], model: EvalModel) -> None:
    from qlip.evaluation.run.evaluate import specs_of

    def is_same(stored: Result) -> bool:
        return stored.subject.get("fingerprint") == model.fingerprint and specs_of(stored) == [
            replace(one, drawn=one.drawn and one.limit is not None) for one in items
        ]

    if output is not None:
        trained_on = [str(one.settings["train"]) for one in items if "train" in one.settings]
        check_output(output, [*(one.data for one in items), *trained_on], is_same)


def _report(model: EvalModel, outcome: Outcome, beside: dict[str, Outcome], how: _How, as_json: bool) -> None:
    """Write and print the results."""
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
    print_results.print_results(results)
    if output is not None:
        again = shlex.join(["qlip", "eval", *how.repeat, "--verify", str(output / "result.json")])
        show(f"\nReport: {output / 'report.html'}. Measure again: {again}")


def _write(model: EvalModel, outcome: Outcome, how: _How, output: Path) -> None:
    """Write the result and its HTML report, for which each set's worst and best images are reconstructed again."""
    from qlip.data.loader.eval_set import EvalSet
    from qlip.data.loader.transforms import EvalTransform
    from qlip.evaluation.models.batch import reconstruct_by_key
    from qlip.evaluation.report.bundle import write_bundle
    from qlip.evaluation.report.galleries import ENDS, SHOWN
    from qlip.evaluation.report.html import write_report

    pairs = {}
    for row, one in enumerate(outcome.result.measured):
        ends = [table for name, table in one.tables.items() if name.startswith(ENDS)]
        keys = [str(record["key"]) for table in ends for record in table[:SHOWN] if "key" in record]
        if keys:
            data = EvalSet(how.open_images(one.data), EvalTransform(model.preprocessing), one.limit, one.drawn)
            pairs[row] = reconstruct_by_key(model, data, list(dict.fromkeys(keys)))
    write_bundle(output, outcome.result, outcome.metric_results, pairs=pairs)
    write_report(output)


@contextmanager
def _together(how: _How) -> Iterator[_How]:
    """Join the processes that torchrun started, if any."""
    from qlip.evaluation.run.evaluate import Ranks
    from qlip.runtime.ranks import world_size

    world = world_size()
    if world == 1:
        yield how
        return
    from torch import distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=7))  # ranks wait for the slowest one
    try:
        yield replace(how, ranks=Ranks(distributed.get_rank(), world, distributed.barrier))
    finally:
        distributed.destroy_process_group()


def _measured(model: EvalModel, items: list[EvalSpec], how: _How, name: str) -> Outcome | None:
    from qlip.evaluation.run.evaluate import Ranks, count_images, run_specs

    work = None if how.output is None else how.output / "rows" / name
    resumable = work is not None and name != VERIFICATION
    advice = "run the same command to continue" if resumable else "nothing was reported"
    with stoppable(advice), progress(f"measuring {name}", count_images(items, how.open_images)) as bar:
        return run_specs(
            model,
            items,
            open_images=how.open_images,
            work=work,
            ranks=how.ranks or Ranks(),
            batch_size=how.batch_size,
            num_workers=how.workers,
            on_progress=bar.advance,
        )


def _codecs(model: EvalModel, items: list[EvalSpec], how: _How, limit: int) -> dict[str, Outcome]:
    """Measure image codecs on the same images, or some of each set, at the model's bytes; in this process."""
    from qlip.evaluation.models.base import QLIPEvalModel
    from qlip.evaluation.models.codecs import at_equal_bytes
    from qlip.evaluation.run.suites import limited

    specs = limited([item for item in items if item.evaluator == "reconstruction"], limit)
    assert isinstance(model, QLIPEvalModel)
    codecs, unavailable = at_equal_bytes(model.bytes_per_image, model.preprocessing)
    for codec, reason in unavailable.items():
        note(f"{codec} is not measured: {reason}")
    found = {}
    for one in codecs:
        outcome = _measured(one, specs, replace(how, ranks=None), one.codec)
        assert outcome is not None
        found[str(one.codec)] = outcome
    return found


def _verify(claimed: Result, model: EvalModel, items: list[EvalSpec], how: _How, as_json: bool) -> None:
    """Measure a result again and report the differences."""
    from qlip.evaluation.report.result import differences

    with _together(how) as shared:
        rank = 0 if shared.ranks is None else shared.ranks.rank
        if how.output is not None and rank == 0:
            shutil.rmtree(how.output / "rows" / VERIFICATION, ignore_errors=True)  # earlier rows would be reused
        if shared.ranks is not None:
            shared.ranks.barrier()
        outcome = _measured(model, items, shared, VERIFICATION)
    if outcome is None:
        return
    differing = differences(claimed, outcome.result)
    if as_json:
        print_json({"holds": not differing, "differences": [one.model_dump() for one in differing]})
    elif differing:
        print_results.print_differences(differing)
    else:
        count = sum(len(one.values) for one in claimed.measured)
        show(f"Verified: {count} metrics of {len(claimed.measured)} measurements are the same.")
    if differing:
        say(f"{plural(len(differing), 'value')} {'differs' if len(differing) == 1 else 'differ'} from the result")
        raise typer.Exit(FAILURE)
