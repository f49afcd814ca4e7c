"""`qlip recipe dry-run`: estimate the resources of a training run."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.cli.console import new_table, note, plural, print_json, print_table, show, usage_error
from qlip.cli.options import Json

if TYPE_CHECKING:
    from qlip.training.dry_run import DryRun

GIB, MIB = 2**30, 2**20
RANKS_SHOWN = 8


def dry_run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Recipe: a packaged one such as nano/stage1, or a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE...]", help="Changes to the recipe, such as batch_size=64."),
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option("--world-size", min=1, help="Number of ranks to assume; default: torchrun's, or 1."),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="GIB", help="Memory per rank in GiB; default: that of this machine's device."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate a training run without training: parameters, memory, samples, learning rates, data."""
    from qlip import QLIPError, training
    from qlip.runtime import ranks
    from qlip.training import dry_run as estimates

    try:
        resolved = training.load_recipe(recipe, overrides or [], note)
    except QLIPError as error:
        usage_error(str(error))
    found = estimates.dry_run(resolved, world_size or ranks.world_size(), memory)
    if as_json:
        print_json(_as_report(found))
    else:
        _show(found)


def _as_report(found: DryRun) -> dict[str, Any]:
    """Return the whole estimate, for --json."""
    report = asdict(found)
    for source, summary in zip(report["sources"], found.sources, strict=True):
        source["epochs"] = summary.epochs
    report["memory"] |= {"peak": found.memory.peak, "total": found.memory.total}
    return report | {"samples": found.samples, "fits": found.fits}


def _show(found: DryRun) -> None:
    """Print the whole estimate."""
    ranks = f" on {plural(found.world, 'rank')}" if found.world > 1 else ""
    show(f"{found.name}: {found.task}, {plural(found.steps, 'step')}{ranks}; nothing is trained")
    for line in found.notes:
        show(line)
    _show_parts(found)
    _show_samples(found)
    _show_schedule(found)
    _show_sources(found)
    _show_memory(found)


def _show_parts(found: DryRun) -> None:
    table = new_table("part", "parameters", "trained", "peak learning rate", numbers=("parameters", "trained"))
    for part in found.parts:
        rates = [_span(part.rates)] if part.rates else []
        rates += [f"{_span(part.muon_rates)} (muon)"] if part.muon_rates else []
        table.add_row(part.part, f"{part.parameters:,}", f"{part.trained:,}", ", ".join(rates) or "frozen")
    total, trained = sum(part.parameters for part in found.parts), sum(part.trained for part in found.parts)
    table.add_row("total", f"{total:,}", f"{trained:,}", "")
    show()
    print_table(table)


def _span(rates: tuple[float, float]) -> str:
    low, high = rates
    return f"{high:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _show_samples(found: DryRun) -> None:
    table = new_table("", "per step", "total", numbers=("per step", "total"))
    for name, each in {"samples": 1.0, **found.units}.items():
        table.add_row(name, f"{found.batch_size * each:,.0f}", f"{found.samples * each:,.0f}")
    table.add_row("operations", f"{found.batch_size * found.flops:.2e}", f"{found.samples * found.flops:.2e}")
    show()
    print_table(table)
    pieces = "one piece" if found.micro_batches == 1 else f"{found.micro_batches:,} micro-batches"
    show(
        f"each rank processes its share of a batch in {pieces}, of at most"
        f" {plural(found.samples_at_a_time, 'sample')} at a time"
    )


def _show_schedule(found: DryRun) -> None:
    points = ", ".join(f"{factor:.3g} at step {step + 1:,}" for step, factor in found.schedule)
    show(f"\nlearning rates are their peaks times {points}")


def _show_sources(found: DryRun) -> None:
    if not found.sources:
        return
    table = new_table("source", "share", "images", "epochs", numbers=("share", "images", "epochs"))
    for source in found.sources:
        images = "missing" if source.missing else "streamed" if source.images is None else f"{source.images:,}"
        epochs = "" if source.epochs is None else f"{source.epochs:,.2f}"
        table.add_row(source.name, f"{source.share:.1%}", images, epochs)
    show()
    print_table(table)
    for source in found.sources:
        if source.missing is not None:
            show(f"missing: {source.missing}")
    for reads in found.ranks[:RANKS_SHOWN]:
        show(f"rank {reads.rank} reads positions {reads.first:,} to {reads.last:,} first: {', '.join(reads.keys)}, ...")
    if len(found.ranks) > RANKS_SHOWN:
        show(f"... up to rank {len(found.ranks) - 1} (--json lists all ranks)")


def _show_memory(found: DryRun) -> None:
    memory = found.memory
    unit, size = ("GiB", GIB) if memory.total >= GIB else ("MiB", MIB)
    step = memory.activations + sum(memory.passing.values())
    rows = [*memory.resident.items(), ("activations", memory.activations), *memory.passing.items()]
    rows += [("additional in the optimizer step", max(0, memory.update - step)), ("reserve", memory.reserve)]
    table = new_table("estimated memory per rank", unit, numbers=(unit,))
    for name, count in [*rows, ("total", memory.total)]:
        if count:
            table.add_row(name, f"{count / size:,.2f}")
    show()
    print_table(table)
    verdict = "it fits" if found.fits else "it does NOT fit"
    show(f"{verdict}: {memory.total / GIB:,.2f} of {found.device.memory / GIB:,.2f} GiB of {found.device.name}")
    for remedy in found.remedies:
        effect = "fits" if remedy.fits else "does not fit either"
        show(f"  {' '.join(remedy.settings)} {effect}: {remedy.total / GIB:,.2f} GiB")
