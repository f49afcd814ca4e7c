"""`qlip tokenize`: a large set of images to a token dataset."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.cli import options
from qlip.cli.console import (
    Failures,
    new_table,
    note,
    plural,
    print_json,
    print_table,
    progress,
    say,
    show,
    stoppable,
    usage_error,
)
from qlip.errors import QLIPError, install_command, require
from qlip.runtime.progress import ProgressBar, duration

if TYPE_CHECKING:
    from qlip import QLIPModel
    from qlip.archive.tokenize.dry_run import Estimate
    from qlip.archive.tokenize.runner import Outcome, Run
    from qlip.runtime.ray import Cluster

INPUT_PANEL, LIST_PANEL, RUN_PANEL, KEPT_PANEL = "Input", "Lists of addresses", "Workers", "Contents of the dataset"
ADVICE = "finished parts are kept; run the same command to continue"


class Dtype(StrEnum):
    """Data types of weights; int8 is for CPUs."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"


class Crops(StrEnum):
    """Views of an image."""

    one = "one"
    flip = "flip"
    ten = "ten"


def tokenize(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Images: a folder, a public set such as cifar10:train, tar shards ('shards/\\*.tar'), Parquet files"
            " ('data/\\*.parquet') or a list of addresses (.txt, .csv, .tsv, .jsonl); paths, or s3://, gs://, https://.",
        ),
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="DATASET", help="Folder for the dataset: a path, or s3://.")
    ],
    model: options.Model = options.DEFAULT_MODEL,
    tables: options.EntropyTables = None,
    device: options.Device = options.AUTO,
    dtype: Annotated[
        Dtype,
        typer.Option(help="Data type of the model's weights; int8 is for CPUs.", rich_help_panel=options.MODEL_PANEL),
    ] = Dtype.float32,
    batch_size: options.BatchSize = 32,
    fit: options.FitOption = options.FitMode.square,
    tiles: options.Tiles = False,
    size: options.Size = None,
    crops: Annotated[
        Crops,
        typer.Option(
            help="Rows per image. one: the image; flip: also its mirror image; ten: corners, centre, and their mirror "
            "images. Tiles are neither cropped nor mirrored.",
            rich_help_panel=options.SIZE_PANEL,
        ),
    ] = Crops.one,
    embeddings: Annotated[
        bool,
        typer.Option(
            "--embeddings", help="Store the image embeddings that qlip search needs.", rich_help_panel=KEPT_PANEL
        ),
    ] = False,
    captions: Annotated[
        bool, typer.Option("--captions/--no-captions", help="Store captions and labels.", rich_help_panel=KEPT_PANEL)
    ] = True,
    entropy_code: Annotated[
        bool,
        typer.Option(
            "--entropy-code",
            help="Compress the tokens further, in a column of variable size.",
            rich_help_panel=KEPT_PANEL,
        ),
    ] = False,
    caption_field: Annotated[
        str | None, typer.Option(help="JSON field or Parquet column of the captions.", rich_help_panel=INPUT_PANEL)
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Parquet column of the images.", rich_help_panel=INPUT_PANEL)
    ] = None,
    key_column: Annotated[
        str | None,
        typer.Option(help="Column or JSON field that becomes the key of a row.", rich_help_panel=INPUT_PANEL),
    ] = None,
    keep_columns: Annotated[
        list[str] | None,
        typer.Option(
            "--keep-column",
            help="Column or JSON field that becomes a column of the dataset, as text. May be repeated.",
            rich_help_panel=KEPT_PANEL,
        ),
    ] = None,
    shard_size: Annotated[
        int,
        typer.Option(min=1, help="Images per part, if the input is not already sharded.", rich_help_panel=INPUT_PANEL),
    ] = 4096,
    allow_local: Annotated[
        bool,
        typer.Option(
            "--allow-local",
            help="Let a list of addresses name files of this machine, and protocols other than those of web servers "
            "and stores.",
            rich_help_panel=LIST_PANEL,
        ),
    ] = False,
    fetch_threads: Annotated[
        int, typer.Option(min=1, help="Images of a list that are fetched at once.", rich_help_panel=LIST_PANEL)
    ] = 8,
    fetch_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds for one image of a list.", rich_help_panel=LIST_PANEL)
    ] = 20,
    fetch_tries: Annotated[
        int,
        typer.Option(min=1, help="Requests for one image of a list before it is broken.", rich_help_panel=LIST_PANEL),
    ] = 3,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Number of Ray workers, each with its own model; default: one per GPU, or one. 0: run in this "
            "process, without Ray.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="Address of a running Ray cluster: auto (on this machine), or HOST:6379.", rich_help_panel=RUN_PANEL
        ),
    ] = None,
    append: Annotated[
        bool,
        typer.Option(
            "--append",
            help="Add further shards of the input, such as new tar or Parquet files, to a finished dataset.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = False,
    retry_errors: Annotated[
        bool,
        typer.Option(
            "--retry-errors", help="Also read the images again that errors.parquet lists.", rich_help_panel=RUN_PANEL
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate the work, its time and its size.")] = False,
    as_json: options.Json = False,
) -> None:
    """Turn millions of images into a token dataset, on one machine or on a Ray cluster.

    Each input shard becomes one Parquet file with its checksum. The command may be stopped or killed at any time; run
    it again to continue with the missing parts. Images that cannot be read are listed in errors.parquet.
    """
    from qlip.archive.dataset.layout import Layout
    from qlip.archive.dataset.schema import Views
    from qlip.archive.tokenize import on_ray
    from qlip.archive.tokenize.encoder import describe
    from qlip.archive.tokenize.inputs import find
    from qlip.archive.tokenize.runner import Run, lock_dataset
    from qlip.archive.tokenize.url_list import Fetching
    from qlip.data.sources.parquet import SeveralColumnsError
    from qlip.modeling.loading import LoadedModel

    require("pyarrow", extra="archive")
    if ray_address is not None and workers == 0:
        usage_error("--workers 0 runs in this process and --ray-address on a cluster; leave one out")
    mode = options.fit_mode(fit, tiles)
    if mode == "tiles" and crops is not Crops.one:
        usage_error(f"--crops {crops.value}: tiles are neither cropped nor mirrored; leave --crops or --tiles out")
    fetching = Fetching(fetch_tries, fetch_timeout, fetch_threads, allow_local=allow_local)
    try:
        found = find(
            inputs,
            shard_size,
            caption_field,
            image_column,
            fetching=fetching,
            key_column=key_column,
            columns=keep_columns or (),
        )
    except SeveralColumnsError as error:
        raise QLIPError(f"{error}: --image-column") from None
    views = Views(fit=mode, size=size, crops=crops.value)
    with ExitStack() as stack:
        stack.enter_context(stoppable(ADVICE))
        cluster = stack.enter_context(on_ray.start_ray(ray_address)) if ray_address else None
        place = _place(device, cluster)
        loaded = LoadedModel.from_pretrained(model, device="cpu")
        work = describe(
            model,
            views,
            batch_size=batch_size,
            dtype=dtype.value,
            device=place,
            embeddings=embeddings,
            captions=captions,
            columns=keep_columns or (),
            key_column=key_column,
            entropy_code=entropy_code or tables is not None,
            tables=tables,
            loaded=loaded,
        )
        layout = Layout(output)
        if not dry_run:
            stack.enter_context(lock_dataset(layout))
        run = Run(layout, found, work, append=append, retry_errors=retry_errors)
        workers = _workers(workers, run, work.info.device, cluster)
        here = loaded.model if workers == 0 or dry_run else None
        del loaded  # on Ray the workers load their own
        if dry_run:
            if cluster is not None:
                on_ray.check_room(cluster, workers, place == "cuda")
            forecast = _forecast(run, workers, place, here)
        else:
            outcome = _tokenize(run, workers, cluster, place, here)
    if dry_run:
        _print_forecast(run, forecast, workers, place, as_json)
        return
    _report(run, outcome, workers, as_json)
    failures = Failures()
    for shard, reason in outcome.failed:
        failures.add(shard, ValueError(reason))
    failures.finish(len(run.inputs.shards), "shard")
    if outcome.inputs and not outcome.rows:
        first = next(error for entry in outcome.entries for error in entry.errors)
        raise QLIPError(
            f"{run.inputs.given}: none of its {plural(outcome.inputs, 'image')} can be read; the first, {first.key}:"
            f" {first.reason}"
        )


def _place(device: str, cluster: Cluster | None) -> str:
    """Return the device that was asked for; on a cluster only its type, since Ray assigns the device."""
    from qlip.cli import models

    if cluster is None:
        return str(models.pick_device(device))
    if device not in ("auto", "cpu", "cuda"):
        usage_error(f"--device {device}: must be auto, cpu or cuda on a cluster, where Ray assigns devices")
    return device if device != "auto" else "cuda" if cluster.gpus else "cpu"


def _workers(requested: int | None, run: Run, device: str, cluster: Cluster | None) -> int:
    """Return the number of Ray workers; 0 means this process."""
    import torch

    from qlip.archive.tokenize import on_ray

    if requested is not None:
        if requested and not on_ray.is_installed():
            usage_error(
                f"--workers: this needs the package 'ray': {install_command('archive')}; --workers 0 runs without it"
            )
        return requested
    if cluster is None and (len(run.todo) < 2 or not on_ray.is_installed()):
        return 0
    if device == "cuda":
        return max(1, torch.cuda.device_count() if cluster is None else cluster.gpus)
    return 1 if cluster is None else max(1, min(cluster.nodes, cluster.cpus - 1))


def _tokenize(run: Run, workers: int, cluster: Cluster | None, device: str, model: QLIPModel | None) -> Outcome:
    import os

    from qlip.archive.tokenize import on_ray
    from qlip.archive.tokenize.encoder import Encoder
    from qlip.archive.tokenize.runner import encode_here

    run.begin()
    left = plural(len(run.todo), "shard")
    done = f", {plural(len(run.finished), 'part')} done already" if run.finished else ""
    if not run.todo:
        note(f"all {plural(len(run.finished), 'part')} done already")
        return run.write_parts(iter(()))
    with ExitStack() as stack:
        if workers == 0:
            note(f"{left} in this process, on {device}{done}")
            threads = max(1, min(4, (os.cpu_count() or 1) - 1))
            pieces = encode_here(run.todo, Encoder(run.work, device, model), run.work, threads)
        else:
            where = "here" if cluster is None else f"at {cluster.address}, {plural(cluster.nodes, 'machine')}"
            note(f"{left} on Ray {where}, {plural(workers, 'worker')} on {device}{done}")
            if cluster is None:
                cluster = stack.enter_context(on_ray.start_ray(None, workers))
            pieces = on_ray.encode_on_ray(run.todo, run.work, cluster, workers)
        watch = stack.enter_context(_watched(run))
        return run.write_parts(stack.enter_context(closing(pieces)), watch.advance)


@contextmanager
def _watched(run: Run) -> Iterator[_Watch]:
    from qlip.archive.tokenize.inputs import count_images

    images = count_images(shard for _, shard in run.todo)
    unit = "images" if images is not None else "shards"
    total = len(run.todo) if images is None else images
    with progress(f"tokenising {unit}", total, unit=unit) as bar:
        yield _Watch(bar, unit)


class _Watch:
    """Advances the progress bar by images, or by shards if their numbers of images are unknown."""

    def __init__(self, bar: ProgressBar, unit: str) -> None:
        self.bar, self.unit, self.began = bar, unit, 0.0
        self.images = self.parts = self.shown = self.early = 0

    def advance(self, images: int, part: bool) -> None:
        """Count images whose first row was written, and a part if it is finished."""
        now = time.monotonic()
        if not self.images and not self.parts:  # the time of the start does not count
            self.began, self.early = now, images
        self.images, self.parts = self.images + images, self.parts + part
        done = self.parts if self.unit == "shards" else self.images
        rate = (self.images - self.early) / max(now - self.began, 1)
        self.bar.advance(done - self.shown, f"{rate:,.1f} images/s")
        self.shown = done


def _report(run: Run, outcome: Outcome, workers: int, as_json: bool) -> None:
    rate = outcome.images / outcome.seconds if outcome.made and outcome.seconds else None
    row: dict[str, Any] = {
        "dataset": run.layout.address,
        "parts": len(outcome.entries),
        "parts_made": outcome.made,
        "images": outcome.inputs,
        "skipped": outcome.skipped,
        "text_faults": len(outcome.text_faults),
        "rows": outcome.rows,
        "bytes": outcome.bytes,
        "bytes_per_image": round(outcome.bytes / (outcome.inputs - outcome.skipped), 1) if outcome.rows else None,
        "seconds": round(outcome.seconds, 2),
        "images_per_second": None if rate is None else round(rate, 1),
        "workers": workers,
    }
    if as_json:
        failed = [{"shard": shard, "reason": reason} for shard, reason in outcome.failed]
        print_json(
            {"model": run.work.info.model, "info": run.work.info.model_dump(mode="json")} | row | {"failed": failed}
        )
        return
    table = new_table("dataset", "parts", "images", "skipped", "rows", "bytes", "per image", "images/s")
    per_image = "" if row["bytes_per_image"] is None else f"{row['bytes_per_image']:,}"
    numbers = [f"{row[name]:,}" for name in ("parts", "images", "skipped", "rows", "bytes")]
    table.add_row(row["dataset"], *numbers, per_image, "" if rate is None else f"{rate:,.1f}")
    print_table(table)
    if outcome.skipped:
        say(f"{plural(outcome.skipped, 'image')} could not be read; {run.layout.path('errors.parquet')} lists them")
    if outcome.text_faults:
        images = plural(len(outcome.text_faults), "image")
        say(f"captions, labels or columns of {images} left out, empty or repaired; the first: {outcome.text_faults[0]}")


def _forecast(run: Run, workers: int, place: str, model: QLIPModel | None) -> Estimate:
    import torch

    from qlip.archive.tokenize.dry_run import estimate

    here = place if place != "cuda" or torch.cuda.is_available() else "cpu"  # a cluster's GPUs are on other machines
    return estimate(run, workers, here, model)


def _print_forecast(run: Run, found: Estimate, workers: int, place: str, as_json: bool) -> None:
    if as_json:
        engine = "this process" if workers == 0 else "Ray"
        print_json({"dataset": run.layout.address, "engine": engine, "workers": workers} | asdict(found))
        return
    for name, value in _forecast_lines(found, workers, place):
        show(f"{name:<10} {value}")


def _forecast_lines(found: Estimate, workers: int, place: str) -> Iterator[tuple[str, str]]:
    yield "shards", f"{found.shards:,}, {found.finished:,} of them done"
    yield "images", "unknown: tars without an index" if found.images is None else f"{found.images:,} left"
    yield "bytes", "unknown" if found.bytes is None else f"about {found.bytes:,} more"
    if found.images_per_second is not None:
        here = "" if found.device == place else f", measured here on {found.device}, not on {place}"
        yield "speed", f"{found.images_per_second:,.1f} images/s per worker, from {found.sampled:,} images{here}"
    on = "in this process" if workers == 0 else f"with {plural(workers, 'worker')}"
    yield "time", f"unknown, {on}" if found.seconds is None else f"about {duration(found.seconds)}, {on}"
